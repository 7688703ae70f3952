"""A run asked to stop while it measures goes on as one never stopped; what a run drops and refuses before its first step."""

import gc
import json
import os
import shlex
import signal
import weakref
from types import SimpleNamespace

import jax
import pytest

pytest.importorskip("tensorflow_datasets", reason="training needs the train extra")
pytest.importorskip("optax", reason="training needs the train extra")

import train.contrastive
import train.evaluate
import train.evaluation
import train.loop
import train.start
from configs import dense
from tests.small_run import small_config
from train.preemption import Stopped


def scores(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k == "step" or k.startswith("dev/")}
        for line in lines
        if "dev/all/ndcg_at_10" in line
    ]


def steps(run):
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize("at", [2, 4])
def test_asked_to_stop_while_it_measures_it_saves_and_measures_later(small_data, tmp_path, monkeypatch, at):
    changes = {"evaluate_untrained": False, "data.test": "", "save_every": 4, "keep_checkpoints": 1}
    whole, stopped = (small_config(small_data, tmp_path / name, **changes) for name in ("whole", "stopped"))
    train.contrastive.train(whole)
    measured, evaluate = [], train.contrastive.evaluate

    def interrupted(*given, **settings):
        measured.append(0)
        if 2 * len(measured) == at:
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("still measuring")
        return evaluate(*given, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(train.contrastive, "evaluate", interrupted)
        with pytest.raises(Stopped, match=f"after step {at}, which is saved"):
            train.contrastive.train(stopped)
    assert at in steps(tmp_path / "stopped")
    train.contrastive.train(stopped)
    assert scores(tmp_path / "stopped") == scores(tmp_path / "whole") and len(scores(tmp_path / "whole")) == 2
    assert steps(tmp_path / "stopped") == steps(tmp_path / "whole")


def test_dense_alone_is_measured_alone(small_data, tmp_path):
    """Heads that nothing trained have no scores, no terms to mark, and no say in which checkpoint is the best."""
    config = small_config(small_data, tmp_path, evaluate_untrained=False)
    stage = {
        key: value for key, value in dense.get_config().items() if key in ("functions", "group_size", "distill_start")
    }
    config.update(stage | {"keep_best": "dev/dense/recall_at_100"})
    results = train.contrastive.train(config)
    assert [{*evaluation["scores"]} for evaluation in results["evaluations"]] == [{"bm25", "dense"}] * 2
    assert results["example"]["tops"].keys() == {"bm25", "dense"}
    assert not any(top["matched"] for tops in results["example"]["tops"].values() for top in tops)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    measures = {key for line in lines for key in line if key.startswith("dev/")}
    assert measures == {"dev/dense/ndcg_at_10", "dev/dense/recall_at_100"}
    assert "lexical" not in results["commands"][0]


@pytest.mark.parametrize(("objective", "weights"), [("v4", (1.0, 0.3, 1.0)), ("v1", (1.0, 1.0, 1.0))])
def test_dev_scores_of_the_weighted_sum_are_the_teacher_s(small_data, tmp_path, monkeypatch, objective, weights):
    taken = {}
    monkeypatch.setattr(
        train.contrastive, "evaluate", lambda *_, **settings: taken.update(settings) or SimpleNamespace(scores={})
    )
    train.contrastive._dev_scores(small_config(small_data, tmp_path, objective=objective), None, None, None)
    assert taken["weights"] == {"all": weights, "dense+sparse": (*weights[:2], 0.0)} and not taken["baseline"]


def test_colbert_as_the_only_teacher_leaves_dense_and_sparse_their_own_weights(small_data, tmp_path, capsys):
    config = small_config(small_data, tmp_path, hybrid_weights=(0.0, 0.0, 1.0), evaluate_untrained=False)
    train.contrastive.train(config)
    assert len(scores(tmp_path)) == 2
    shown = capsys.readouterr().out
    assert f"step 2: dev/dense/ndcg_at_10 {scores(tmp_path)[0]['dev/dense/ndcg_at_10']:.3f}, " in shown


def test_without_dense_colbert_ranks_all(small_data, tmp_path, monkeypatch):
    """The dense head, which nothing trains, has no say in what colbert finds, nor has it in the command that is printed."""
    ranked, rank = [], train.evaluation.rank

    def ranking(task, *given, by, rerank, **more):
        ranked.append((by, rerank == len(task.corpus)))
        return rank(task, *given, by=by, rerank=rerank, **more)

    monkeypatch.setattr(train.evaluation, "rank", ranking)
    changes = {"functions": ("sparse", "colbert"), "distill_start": -1, "keep_best": "", "evaluate_untrained": False}
    results = train.contrastive.train(small_config(small_data, tmp_path, **changes))
    assert {*ranked} == {("sparse", True), ("colbert", True)}
    (command,) = (line for line in results["commands"] if "train.evaluate" in line)
    assert command.endswith(" --max_length 16 --query_max_length 8 --functions sparse colbert")
    ranked.clear()
    train.evaluate.main([*shlex.split(command)[3:], "--output", str(tmp_path / "again")])
    assert {*ranked} == {("sparse", True), ("colbert", True)}
    again = json.loads((tmp_path / "again" / "results.json").read_text())["scores"]
    assert again == results["evaluations"][-1]["scores"]


class Enough(Exception):
    pass


def test_the_first_parameters_are_dropped_for_the_state_s(small_data, tmp_path, monkeypatch):
    """Random ones lie whole on one device, beside its part of those that the mesh splits."""
    first, start = [], train.contrastive.start_model

    def started(config):
        m3 = start(config)
        first.extend(map(weakref.ref, jax.tree.leaves(m3.params)))
        return m3

    def stop(*_):
        gc.collect()
        left = sum(array() is not None for array in first)
        raise Enough(f"{left} of {len(first)}")

    monkeypatch.setattr(train.contrastive, "start_model", started)
    monkeypatch.setattr(train.loop, "matrix_rate", stop)
    with pytest.raises(Enough, match=r"^0 of [1-9]"):
        train.contrastive.train(small_config(small_data, tmp_path, evaluate_untrained=False))


def test_batches_are_refused_before_rows_are_tokenised(small_data, tmp_path, monkeypatch):
    monkeypatch.setattr(train.start, "read_rows", lambda *_: pytest.fail("tokenised"))
    with pytest.raises(ValueError, match="length_groups holds pairs"):
        train.contrastive.train(small_config(small_data, tmp_path, length_groups=((16, 0),)))
