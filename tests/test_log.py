"""The numbers of a run in both places that keep them, and what a run that goes on leaves of those before it."""

import json
import struct

import pytest

pytest.importorskip("tensorboardX", reason="training needs the train extra")

from tensorboardX.proto.event_pb2 import Event

from train.log import Log


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def events(run):
    """{(name, step): value} of all event files, as TensorBoard shows them: what a later file purges is gone."""
    found = {}
    for path in sorted((run / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:  # length, its checksum, the event, its checksum
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.HasField("session_log"):
                found = {key: value for key, value in found.items() if key[1] < event.step}
            for value in event.summary.value:
                found[value.tag, event.step] = value.simple_value
    return found


def test_every_number_is_in_both(tmp_path):
    with Log(tmp_path, after=0) as log:
        log.write(1, {"loss": 2.0, "loss/dense": 0.5})
        log.write(2, {"dev/all/ndcg_at_10": 0.25})
    written = lines(tmp_path)
    assert [row.pop("seconds") >= 0 for row in written] == [True, True]
    assert written == [{"step": 1, "loss": 2.0, "loss/dense": 0.5}, {"step": 2, "dev/all/ndcg_at_10": 0.25}]
    assert events(tmp_path) == {("loss", 1): 2.0, ("loss/dense", 1): 0.5, ("dev/all/ndcg_at_10", 2): 0.25}


def test_lines_after_the_step_that_is_gone_on_from_are_taken_out(tmp_path):
    with Log(tmp_path, after=0) as log:
        for step in (1, 2, 3, 4):
            log.write(step, {"loss": float(step)})
    took = lines(tmp_path)[1]["seconds"]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')  # a kill cut it off
    with Log(tmp_path, after=2) as log:
        log.write(3, {"loss": 7.0})
    assert [(row["step"], row["loss"]) for row in lines(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 7.0)]
    assert lines(tmp_path)[2]["seconds"] >= took
    assert events(tmp_path) == {("loss", 1): 1.0, ("loss", 2): 2.0, ("loss", 3): 7.0}


def test_a_run_from_its_beginning_takes_out_all(tmp_path):
    for value in (1.0, 2.0):
        with Log(tmp_path, after=0) as log:
            log.write(1, {"loss": value})
    assert [row["loss"] for row in lines(tmp_path)] == [2.0] and events(tmp_path) == {("loss", 1): 2.0}
