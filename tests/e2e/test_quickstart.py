"""The README's first command: configs/quickstart.py from its command line, at small sizes."""

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("tensorflow_datasets", reason="training needs the train extra")

import train.contrastive  # imports grain, whose flags must be there before the command line is parsed
import train.data.cldr
import train.main as program
from tests.conftest import command_line
from tests.small_run import SIZES, TRAINING, write_set
from train.results import read_metrics

pytestmark = pytest.mark.usefixtures("compiled_quickly")
ROOT = Path(__file__).parents[2]


def test_the_quickstart_from_its_command_line(tiny_tokenizer_json, tmp_path, monkeypatch, capfd):
    """configs/quickstart.py as it stands but for sizes, through the program's own flags and the "cldr" paths."""
    seeds = []

    def write_demo(directory, *, seed):
        seeds.append(seed)
        write_set(directory, tiny_tokenizer_json)

    monkeypatch.setattr(train.data.cldr, "write_demo", write_demo)
    changes = {f"model.{name}": size for name, size in SIZES.items()} | TRAINING
    changes |= {"output": tmp_path / "run", "data.folder": tmp_path / "data"}
    flags = [f"--config.{name}={value}" for name, value in changes.items()]
    arguments = ["train.main", f"--config={ROOT / 'configs' / 'quickstart.py'}", *flags]
    with command_line(arguments):
        assert program.parse(arguments) == arguments[:1]
        program.main(arguments[:1])
    shown = capfd.readouterr()
    for part in (
        "writing the embedded demo set",
        "quickstart: M3(1 layers × 16",
        "12 rows of cldr",
    ):
        assert part in shown.out
    for part in ("test-unseen", "before all", "BM25", "Query (Swahili)", "report.html", "python -m train.evaluate"):
        assert part in shown.out
    assert "Traceback" not in shown.err and "100%" in shown.err
    assert (tmp_path / "run" / "log.txt").read_text()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["name"] == "quickstart" and len(results["evaluations"]) == 4 and results["example"]
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row] == [1, 2, 3, 4]
    folder = next((tmp_path / "data").glob("cldr-*"))
    assert f"--data {folder / 'test-unseen'}" in shown.out and not list((tmp_path / "data").glob("*.partial"))
    shutil.rmtree(tmp_path / "run" / "model")
    program.main(arguments[:1])
    assert seeds == [0] and (tmp_path / "run" / "model" / "config.json").exists()
