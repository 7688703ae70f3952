"""Training as a real process that is killed, or asked to stop: started again by the same command it is the run that never was.

Not here: interruptions at a chosen step within one process (test_train.py).
"""

import json
import re
import shutil
import signal
import subprocess
import time

import pytest

pytest.importorskip("tensorflow_datasets", reason="training needs the train extra")
pytest.importorskip("tensorboardX", reason="training needs the train extra")

from tests.real_processes import free_address, start_training
from tests.small_run import SIZES, TRAINING

STEPS, DISTILL = 40, 20
# Steps of some tens of milliseconds: a signal finds the run among them.
CHANGES = {f"model.{name}": size for name, size in (SIZES | {"hidden_size": 32, "num_hidden_layers": 2}).items()}
CHANGES |= TRAINING | {"steps": STEPS, "distill_start": DISTILL, "learning_rate": 3e-4, "dropout": 0.1}
CHANGES |= {"length_groups": ((16, 12),), "group_size": 4, "save_every": 4, "keep_checkpoints": 3}
# Above what rounding leaves of a gradient of 0, of which Adam would make full steps, another one on each mesh.
CHANGES |= {"adam_eps": 1e-4}


@pytest.fixture(scope="module")
def start(small_data):
    """start(run, key=value, …): the process that trains into `run`; the same run is the same command."""
    paths = {"tokenizer": small_data / "tokenizer.json", "data.train": small_data / "train.jsonl"}
    paths |= {"data.folder": small_data / "prepared"}
    started = []

    def start(run, *, devices=1, first="", **changes):
        settings = CHANGES | paths | {"output": run, "name": "tiny"} | changes
        process = start_training(settings, devices=devices, first=first, stderr=subprocess.STDOUT)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()


def finished(process):
    """What a process says, when it has ended well."""
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """The folder of a run that nothing disturbs."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert "going on" not in finished(start(run))
    return run


def lines(run):
    """The finished lines of metrics.jsonl."""
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def saved(run):
    """The finished checkpoints."""
    folder = run / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal()) if folder.exists() else []


def when(process, seen):
    """Wait for `seen()` while a process runs."""
    while not seen():
        assert process.poll() is None, process.communicate()
        time.sleep(0.0005)


def kill(process):
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def saving(run):
    """Whether a checkpoint is being written, after others that are there."""
    return bool(saved(run)) and any("tmp" in path.name for path in (run / "checkpoints").iterdir())


def numbers(run):
    """The lines without what depends on the clock."""
    clock = ("seconds", "steps_per_second", "tokens_per_second", "padding", "mfu")
    return [{name: value for name, value in row.items() if name not in clock} for row in lines(run)]


def files(directory):
    return {path.relative_to(directory): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def killed(start, tmp_path_factory):
    """The folder of a run that was killed while it saved."""
    run = tmp_path_factory.mktemp("runs") / "killed"
    process = start(run)
    when(process, lambda: saving(run))
    kill(process)
    assert saved(run)[-1] < DISTILL < STEPS
    return run


def test_killed_while_saving_and_between_it_goes_on_as_if_never_stopped(start, killed, whole, tmp_path):
    """PEER §2.7: there the steps before self-distillation are counted from 0 again."""
    run = shutil.copytree(killed, tmp_path / "run")
    left = saved(run)[-1]
    process = start(run)
    when(process, lambda: len(lines(run)) > saved(run)[-1] > left)  # among the steps
    kill(process)
    assert left < saved(run)[-1] < STEPS
    assert f"going on after step {saved(run)[-1]}\n" in finished(start(run))
    assert [row["step"] for row in lines(run)] == list(range(1, STEPS + 1))
    assert numbers(run) == numbers(whole)
    assert files(run / "model") == files(whole / "model")


def test_killed_it_goes_on_with_another_mesh(start, killed, whole, tmp_path):
    """The same rows, steps and start of distillation; the numbers are those of other sums, in another order."""
    run = shutil.copytree(killed, tmp_path / "run")
    said = finished(start(run, devices=4, **{"mesh.fsdp": 2}))
    assert f"going on after step {saved(killed)[-1]}\n" in said and "on 4 devices" in said
    assert [row["step"] for row in lines(run)] == list(range(1, STEPS + 1))
    for found, expected in zip(numbers(run), numbers(whole), strict=True):
        # Rounding is another one on each mesh, and each step starts from what the one before made of it.
        soon = found["step"] <= saved(killed)[-1] + 10
        assert found == pytest.approx(expected, rel=1e-3 if soon else 1e-2), found["step"]
        assert ("distill/dense" in found) == (found["step"] > DISTILL)


def stop(process, run):
    """Ask a process to stop among its steps; after which step it did, and what it said."""
    left = len(lines(run))
    when(process, lambda: len(lines(run)) > left + 2)
    process.terminate()
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 75, said
    step = saved(run)[-1]
    assert left < step == len(lines(run)) < STEPS
    assert re.search(f"stopped after step {step}, which is saved; start the same command again to go on\n", said)
    assert "Traceback" not in said and not (run / "model").exists()
    return step, said


def test_asked_to_stop_it_saves_and_says_so(start, whole, tmp_path):
    """As it is, and again under jax.distributed, which sees to SIGTERM itself."""
    run = tmp_path / "run"
    step, _ = stop(start(run, save_every=1000), run)
    joined = f"import jax; jax.distributed.initialize({free_address()!r}, 1, 0); "
    again, said = stop(start(run, save_every=1000, first=joined), run)
    assert f"going on after step {step}\n" in said and saved(run) == [step, again]
    assert f"going on after step {again}\n" in finished(start(run))
    assert numbers(run) == numbers(whole)
    assert files(run / "model") == files(whole / "model")


def test_one_of_two_processes_killed_the_other_ends_and_both_go_on(start, whole, tmp_path):
    """It does not wait for ever for one that is gone: JAX's coordinator, here after 10 seconds in place of 100, ends it."""
    run = tmp_path / "run"
    soon = "import jax, functools; jax.distributed.initialize = functools.partial(jax.distributed.initialize, "
    soon += "heartbeat_timeout_seconds=10); "

    def both():
        address = free_address()
        return [start(run, first=soon, devices=2, distributed=f"{address},2,{index}") for index in (0, 1)]

    first, second = both()
    when(first, lambda: len(lines(run)) > max(saved(run), default=STEPS))  # among the steps, and one is saved
    kill(second)
    said, _ = first.communicate(timeout=120)
    assert first.returncode not in (0, 75), said
    left = saved(run)[-1]
    assert 0 < left < STEPS and not (run / "model").exists()
    again = [finished(process) for process in both()]
    assert f"going on after step {left}\n" in again[0]
    assert [row["step"] for row in lines(run)] == list(range(1, STEPS + 1))
    for found, expected in zip(numbers(run), numbers(whole), strict=True):
        assert found == pytest.approx(expected, rel=1e-2), found["step"]
