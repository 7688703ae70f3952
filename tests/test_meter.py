"""What is seen of steps, on made-up measures and a clock of the test's own."""

import contextlib
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("tensorboardX", reason="training needs the train extra")
pytest.importorskip("optax", reason="training needs the train extra")

import train.meter
from configs import base
from train.data.pipeline import Batch, LengthGroup
from train.log import Log
from train.meter import Meter

MEASURES = {
    "loss": 2.0,
    "loss/dense": 1.0,
    "distill/dense": 3.0,
    "active_terms/query": 4.0,
    "active_terms/passage": 9.0,
    "gradient_norm/sparse": 0.25,
}
MEASURES = {"loss/colbert": 5.0} | MEASURES | {"tokens": 60.0, "places": 80.0, "flops": 500.0}


class Clock:
    """In place of time.perf_counter: `now` is what the test says."""

    now = 0.0

    def __call__(self):
        return self.now


class Places:
    """In place of Batches: twenty rows of one file a step."""

    def places(self, step):
        return LengthGroup(16, 20), [f"rows.jsonl:{20 * step + line}" for line in range(1, 21)]


def batch(length):
    texts = np.zeros((2, length), np.int32), np.ones((2, length), bool)
    identity = np.zeros((2, 2), np.uint32)
    return Batch(*texts, *texts, identity, identity[:, None], np.ones(2, bool), np.zeros(2, bool), np.zeros((2, 1)))


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(train.meter, "time", SimpleNamespace(perf_counter=clock))
    return clock


@contextlib.contextmanager
def metering(run, **settings):
    config = base.get_config()
    config.update(steps=100, log_every=1, warmup=0.0, distill_start=2)
    config.update(settings)
    with Log(run, after=0) as log, Meter(config, log, Places(), first=0, rate=1000.0) as meter:
        yield meter


def steps(meter, first, last, *, length=8, **changes):
    for number in range(first, last + 1):
        meter.begin(batch(length))
        meter.run(number, MEASURES | {name.replace("__", "/"): value for name, value in changes.items()})


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def rates(row):
    return {name: row[name] for name in ("steps_per_second", "tokens_per_second", "padding", "mfu") if name in row}


def expected(count, seconds):
    """Each step has 60 tokens in 80 places and 500 FLOPs, where 1000 a second could be done."""
    return {
        "steps_per_second": pytest.approx(count / seconds),
        "tokens_per_second": pytest.approx(60 * count / seconds),
        "padding": pytest.approx(0.25),
        "mfu": pytest.approx(0.5 * count / seconds),
    }


def run_seven_steps(meter, clock):
    """Compiled twice and paused once; steps 2, 3, 4, 6 and 7 run for 2, 3, 4, 6 and 7 seconds."""
    meter.begin(batch(8))
    clock.now = 50  # compiling
    meter.run(1, MEASURES)
    meter.begin(batch(8))
    clock.now = 52  # step 1 ends
    meter.run(2, MEASURES)
    meter.begin(batch(8))
    clock.now = 54
    meter.run(3, MEASURES)
    clock.now = 57
    meter.finish()
    clock.now = 1057  # measuring, saving
    meter.begin(batch(8))
    meter.run(4, MEASURES)
    clock.now = 1061
    meter.begin(batch(16))  # step 4 ends before it compiles
    clock.now = 1100
    meter.run(5, MEASURES)
    meter.begin(batch(16))
    clock.now = 1105
    meter.run(6, MEASURES)
    meter.begin(batch(16))
    clock.now = 1111
    meter.run(7, MEASURES)
    clock.now = 1118
    meter.finish()
    meter.finish()  # nothing runs


def test_rates_leave_out_compiling_and_pauses(tmp_path, clock):
    with metering(tmp_path) as meter:
        run_seven_steps(meter, clock)
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]
    found = {row["step"]: rates(row) for row in lines(tmp_path)}
    assert found == {1: {}, 5: {}} | {step: expected(1, step) for step in (2, 3, 4, 6, 7)}


def test_rates_are_of_all_steps_since_the_line_before(tmp_path, clock):
    with metering(tmp_path, log_every=3) as meter:
        run_seven_steps(meter, clock)
    assert {row["step"]: rates(row) for row in lines(tmp_path)} == {1: {}, 3: expected(2, 5), 6: expected(2, 10)}


def test_a_line_holds_the_measures_of_its_step(tmp_path):
    with metering(tmp_path, learning_rate=0.5) as meter:
        steps(meter, 1, 2, loss=7.0)
        steps(meter, 3, 3)
        assert len(lines(tmp_path)) == 2  # the third still runs
        meter.finish()
    first, _, third = lines(tmp_path)
    kept = {"loss/dense": 1.0, "active_terms/query": 4.0, "active_terms/passage": 9.0}
    for row in (first, third):
        assert not row.keys() & {"tokens", "places", "flops"} and row.items() >= kept.items()
    assert (first["loss"], third["loss"]) == (7.0, 2.0)
    assert "distill/dense" not in first and third["distill/dense"] == 3.0  # from step 3 on: two were to be without
    assert [row["learning_rate"] for row in (first, third)] == pytest.approx([0.5, 0.49])


def test_what_is_not_finite_is_named_with_its_rows(tmp_path, caplog):
    with metering(tmp_path) as meter:
        steps(meter, 1, 1)
        steps(meter, 2, 2, loss=math.nan, loss__dense=math.inf)
        with pytest.raises(ValueError, match="in step 2 these are not: loss, loss/dense") as error:
            meter.finish()
    assert "up to 16 tokens, rows rows.jsonl:21, rows.jsonl:22, " in str(error.value)
    assert "rows.jsonl:28 and 12 more, all of them in log.txt" in str(error.value)
    assert "rows.jsonl:29" not in str(error.value) and "rows.jsonl:40" in caplog.text
    assert [row["step"] for row in lines(tmp_path)] == [1]


@pytest.mark.parametrize("texts", ["active_terms__query", "active_terms__passage"])
def test_a_collapsed_sparse_head_is_said_once(tmp_path, capsys, texts):
    """PEER §2.11: there it goes unseen."""
    with metering(tmp_path) as meter:
        steps(meter, 1, 9, **{texts: 0.9})
        steps(meter, 10, 10)
        steps(meter, 11, 19, **{texts: 0.9})
        meter.finish()
        assert "warning" not in capsys.readouterr().out
        steps(meter, 20, 40, **{texts: 0.5})
        meter.finish()
    shown = capsys.readouterr().out
    assert shown.count("the sparse head has collapsed: for 10 steps, up to step 20,") == 1
    assert f"0.50 a {texts.split('__')[1]}" in shown and "loss_weights" in shown


def test_the_bar(tmp_path, clock, capsys, monkeypatch):
    monkeypatch.setattr(train.meter.os, "isatty", lambda _: True)
    with metering(tmp_path) as meter:
        run_seven_steps(meter, clock)
    shown = capsys.readouterr().err
    assert "colbert=5.000, gradient_norm/sparse=0.25, active_terms/passage=9.0, active_terms/query=4.0" in shown
    assert "7/100" in shown and "loss=2.000, 9 tokens/s, padding 25%, MFU 7%, dense=1.000, colbert=5.000" in shown
