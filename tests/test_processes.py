"""What one process prepares for the others, on two real ones: they wait with a message, find it made, and fail as it fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tensorflow_datasets", reason="training needs the train extra")

from tests.real_processes import free_address

ROOT = Path(__file__).parents[1]
ROWS = [{"query": "quick fox", "pos": ["a lazy cat"], "neg": ["the small house"]}] * 8

# Process 0 waits at the gate, if there is one, so that the other has to.
PROCESS = """
import sys, time
from pathlib import Path
from m3jax.tokenization import Tokenizer
from train import processes
from train.data import builders
folder, address, index = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
processes._FIRST_SAID = 1
processes.join(f"{address},2,{index}")
tokenise = builders._encode
builders._encode = lambda *given: ((folder / f"tokenised-by-{index}").touch(), tokenise(*given))[1]

def prepare():
    while index == 0 and (folder / "gate").exists():
        time.sleep(0.1)
    return builders.prepare(
        [folder / "rows.jsonl"], Tokenizer.from_file(folder / "tokenizer.json"), data_dir=folder / "data",
        query_max_length=64, passage_max_length=64,
    )

try:
    source = processes.first_then_others(prepare, "tokenise the training rows")
except ValueError as error:
    raise SystemExit(f"error: {error}")
print(source.name, len(source), [row.query.tolist() for row in source.rows(range(len(source)))])
"""


@pytest.fixture
def folder(tmp_path, tiny_tokenizer_json):
    (tmp_path / "tokenizer.json").write_text(tiny_tokenizer_json, encoding="utf-8")
    return tmp_path


def two(folder):
    address = free_address()
    # sys.executable: the interpreter's own packages, from the root where the programs are.
    return [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(folder), address, str(index)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        for index in (0, 1)
    ]


def test_the_first_prepares_and_the_other_says_that_it_waits(folder):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "gate").touch()
    first, other = two(folder)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "process 1 waits for process 0 to tokenise the training rows, 1 s so far\n"
        assert not list(folder.rglob("*.array_record*"))
        (folder / "gate").unlink()
        (said, error), (rest, _) = first.communicate(timeout=120), other.communicate(timeout=120)
    finally:
        first.kill(), other.kill()
    assert first.returncode == other.returncode == 0, error
    assert rest.splitlines()[-1] == said.splitlines()[-1] and " 8 [[" in said
    assert "waits" not in said
    assert [path.name for path in folder.glob("tokenised-by-*")] == ["tokenised-by-0"]


def test_where_the_first_fails_all_do_with_its_message_and_at_once(folder):
    (folder / "rows.jsonl").write_text('{"query": 1}\n')
    processes = two(folder)
    try:
        ends = [process.communicate(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [1, 1], ends
    first, other = (error[error.index("error:") :] for _, error in ends)
    assert first == other and "rows.jsonl:1: the field `pos` is required" in first
