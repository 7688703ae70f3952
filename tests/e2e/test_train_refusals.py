"""What ends a run before it starts: rows, settings and command lines that are wrong, each with an error that says where."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tensorflow_datasets", reason="training needs the train extra")
pytest.importorskip("tensorboardX", reason="training needs the train extra")

import train.contrastive
from tests.small_run import small_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_step(monkeypatch):
    monkeypatch.setattr(train.contrastive, "make_step", lambda *_: pytest.fail("a step was made"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query": "fox", "pos": ["the fox"]', "one JSON object"),
        ('{"query": "fox"}', "`pos` is required"),
        ('{"query": "fox", "pos": []}', "`pos` must be a non-empty list"),
        ('{"query": ["fox"], "pos": ["the fox"]}', "`query` must be a non-empty str"),
    ],
    ids=["not JSON", "no field", "empty", "type"],
)
def test_bad_rows_end_a_run_before_it_starts(small_data, tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text((small_data / "train.jsonl").read_text() + line + "\n")
    with pytest.raises(ValueError) as error:
        train.contrastive.train(small_config(small_data, tmp_path / "run", **{"data.train": str(path)}))
    assert f"{path}:13: " in str(error.value) and message in str(error.value)
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.train": ""}, "data.train names the training rows"),
        ({"data.train": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ({"data.test": "nowhere"}, "nowhere/corpus.jsonl: expected a file"),
        ({"tokenizer": ""}, "random weights need a tokenizer"),
        ({"tokenizer": "nowhere.json"}, "nowhere.json"),
        ({"init_from": "nowhere", "tokenizer": ""}, "nowhere"),
        ({"init_from": "nowhere"}, "init_from brings its tokenizer"),
        ({"passage_max_length": 33}, "passage_max_length must fit the position table, at most 32, got 33"),
        ({"model.num_attention_heads": 3}, "multiple of num_attention_heads"),
        ({"length_groups": ((16, 13),)}, "12 rows, fewer than its batch_size 13"),
        ({"length_groups": (16, 4)}, "length_groups"),
        ({"log_every": 0, "warmup": 3.0}, "log_every = 0, expected at least 1; warmup = 3.0, expected from 0 to 1"),
        ({"dtype": "bf16"}, "dtype = 'bf16', expected one of .'float32', 'bfloat16'."),
        ({"distill_start": -5}, "distill_start = -5, expected a step, or -1 for never"),
        ({"hybrid_weights": (1.0, 0.3)}, r"hybrid_weights = \(1.0, 0.3\), expected three numbers from 0 up"),
        ({"loss_weights": (1.0, -0.1, float("nan"))}, r"loss_weights = \(1.0, -0.1, nan\), expected three numbers"),
        (
            {"encoder_mask": 0.15, "decoder_seen": 0.7},
            r"encoder_mask = 0\.15, which is of stage 1 alone; expected 0\.3; decoder_seen = 0\.7",
        ),
        ({"seed": -1}, "seed = -1, expected from 0 to below"),
        ({"checkpoints": "memory://run"}, "checkpoints = 'memory://run', expected a local folder or gs://…"),
        ({"keep_best": "dev/all/ndcg"}, "keep_best = 'dev/all/ndcg', expected '' or one of dev/dense/ndcg_at_10, "),
        ({"mesh.data": 3}, "mesh sizes must multiply to the number of devices"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_settings_end_a_run_before_it_starts(small_data, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train.contrastive.train(small_config(small_data, tmp_path, evaluate_untrained=False, **changes))


def test_wrong_command_lines_are_answered_in_a_line():
    quickstart = "--config=configs/quickstart.py"
    wrong = {
        "Did you mean": [quickstart, "--config.learning_rat=1e-3"],
        "hidden_size": [quickstart, "--config.model.hiden_size=8"],
        "--config must have a value": [],
        "nowhere.py": ["--config=configs/nowhere.py"],
        "steps=many": [quickstart, "--config.steps=many"],
    }
    started = {
        expected: subprocess.Popen(
            [sys.executable, "-m", "train.main", *arguments], cwd=ROOT, stdout=-1, stderr=-1, text=True
        )
        for expected, arguments in wrong.items()
    }
    answers = {expected: (*process.communicate(), process.returncode) for expected, process in started.items()}
    for expected, (out, error, code) in answers.items():
        assert code == 1 and out == "", (expected, error)
        assert error.startswith("error: ") and expected in error and "Traceback" not in error, error
        assert len(error.strip().splitlines()) == 1, error
