"""Runs on two real processes, with two devices each, beside a run on one: metrics, files, going on from a checkpoint."""

import json
import shutil

import pytest

pytest.importorskip("tensorflow_datasets", reason="training needs the train extra")

import numpy as np

import m3jax
import train.contrastive
from tests.real_processes import train_on_two
from tests.small_run import SIZES, TRAINING, small_config

pytestmark = pytest.mark.usefixtures("compiled_quickly")
CHANGES = {"dropout": 0.1}


def on_two(small_data, output, *, first="", code=0, **changes):
    """What two processes say that train into `output` with the settings that `small_config` has, and changes, after the
    statement `first`, and end with the code."""
    settings = {f"model.{name}": value for name, value in SIZES.items()} | TRAINING
    settings |= {
        "tokenizer": small_data / "tokenizer.json",
        "output": output,
        "data.folder": output.parent / "prepared",
    }
    files = {"train": "train.jsonl", "dev": "dev", "test": "test"}
    settings |= {f"data.{name}": small_data / path for name, path in files.items()}
    settings |= {"example.language": "Swahili"} | CHANGES | changes
    return train_on_two(settings, first=first, code=code)


def on_one(small_data, output):
    """Train into `output` in this process, on its one device."""
    train.contrastive.train(small_config(small_data, output, **CHANGES, **{"data.test": str(small_data / "test")}))


def losses(output):
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "gradient_norm", "dev/all/ndcg_at_10")
    return [{name: row[name] for name in kept if name in row} for row in rows]


def assert_same(one, other):
    assert [set(row) for row in one] == [set(row) for row in other]
    for a, b in zip(one, other, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


@pytest.fixture(scope="module")
def alone(small_data, tmp_path_factory):
    output = tmp_path_factory.mktemp("alone") / "run"
    on_one(small_data, output)
    return output


@pytest.fixture(scope="module")
def on_both(small_data, tmp_path_factory):
    """The folder of a run on two processes, and what each of them said."""
    output = tmp_path_factory.mktemp("both") / "run"
    return output, on_two(small_data, output, **{"mesh.fsdp": 2})


def test_two_processes_train_as_one(on_both, alone):
    output, (first, second) = on_both
    assert_same(losses(output), losses(alone))
    assert "compiling for 4 queries" in first and "report" in first and not second.strip()
    assert {path.name for path in output.iterdir()} == {path.name for path in alone.iterdir()} | {
        "log.txt",
        "log-1.txt",
    }
    model, expected = m3jax.load(output / "model"), m3jax.load(alone / "model")
    given = [m3jax.encode(m3, ["sun and moon"]).dense_vecs for m3 in (model, expected)]
    np.testing.assert_allclose(*given, atol=1e-4)


def test_what_two_began_one_ends_and_the_reverse(small_data, on_both, alone, tmp_path, capfd):
    """The last checkpoint is taken away, as after a kill; other processes and another mesh go on."""
    output = shutil.copytree(on_both[0], tmp_path / "run")
    shutil.rmtree(output / "checkpoints/4")
    on_one(small_data, output)
    assert "going on after step 2" in capfd.readouterr().out
    assert_same(losses(output), losses(alone))
    shutil.rmtree(output / "checkpoints/4")
    said, _ = on_two(small_data, output, **{"mesh.data": 2, "mesh.tensor": 2, "data.test": ""})
    assert "going on after step 2" in said
    assert_same(losses(output), losses(alone))


# The second of two processes is asked to stop when it first encodes. Texts go one by one, slowly enough that both hear of it.
ASKED = """
import os, signal, time
import train.processes

join, calls = train.processes.join, []

def joined(distributed):
    join(distributed)
    import m3jax, train.evaluation
    encode = m3jax.encode

    def slowly(*given, **how):
        calls.append(0)
        if {index} == len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
        return encode(*given, **how)

    m3jax.encode, train.evaluation._AT_ONCE = slowly, 1

train.processes.join = joined
"""


def test_asked_to_stop_while_they_measure_two_save_and_end_together(small_data, alone, tmp_path):
    output = tmp_path / "run"
    once = {"mesh.fsdp": 2, "evaluate_untrained": False, "save_every": 4}
    first, _ = on_two(small_data, output, first=ASKED, code=75, **once)
    assert "stopped after step 2, which is saved; start the same command again to go on" in first
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["2"]
    assert [row["step"] for row in losses(output)] == [1, 2]  # and no line of dev scores
    on_one(small_data, output)
    assert_same(losses(output), losses(alone))


# The first of two processes takes its time to write the held-out rows, and the second cannot write them.
FIRST_WRITES = """
import time
import train.data.held_out as made

write = made._write

def slowly(*given, **how):
    if {index}:
        raise AssertionError("written by the second process")
    time.sleep(3)
    write(*given, **how)

made._write = slowly
"""


def test_a_plan_of_two_processes_writes_what_is_made_of_the_data_once(small_data, tmp_path):
    said = on_two(small_data, tmp_path / "run", first=FIRST_WRITES, plan_only=True, **{"data.held_out": 0.1})
    assert "s/step" in said[0]
