"""Whole runs of train.contrastive on rows and evaluation folders of a few lines: what they leave and go on from.

Not here: what a run refuses to start with (test_train_refusals.py), the parts of a run, each of which has its own file, and how
well anything is learnt.
"""

import ast
import json
import re
import shlex
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

pytest.importorskip("tensorflow_datasets", reason="training needs the train extra")

import convert.__main__
import m3jax
import train.contrastive
import train.data.cldr
import train.evaluate
import train.loop
import train.step
from tests.small_run import FUNCTIONS, small_config, write
from train.sub_batch import ONE_PASS

pytestmark = pytest.mark.usefixtures("compiled_quickly")
ROOT = Path(__file__).parents[2]
RATES = ("steps_per_second", "tokens_per_second", "padding", "mfu")
_COMPILED_IN = (
    *("seed", "steps", "warmup", "learning_rate", "distill_start", "temperature", "length_groups", "dropout"),
    *("objective", "teacher"),
)


@pytest.fixture(scope="module")
def configured(small_data):
    """configured(output, key=value, …): base.py at small sizes, on `data`."""

    def make(output, **changes):
        return small_config(small_data, output, **changes)

    return make


class Steps:
    """In place of make_step: settings that compile to the same step share it, and `before` sees each step begin."""

    def __init__(self):
        self._compiled = {}
        self._make = train.contrastive.make_step
        self.before = lambda state: state

    def make(self, model, config, optimizer, mesh, state, sub_batches):
        assert sub_batches == ONE_PASS
        key = (model, *(str(config[name]) for name in _COMPILED_IN))
        if key not in self._compiled:
            self._compiled[key] = self._make(model, config, optimizer, mesh, state, sub_batches)
        return lambda state, batch: self._compiled[key](self.before(state), batch)


@pytest.fixture(scope="module", autouse=True)
def all_steps():
    with pytest.MonkeyPatch.context() as patch:
        steps = Steps()
        patch.setattr(train.contrastive, "make_step", steps.make)
        # What it does is in test_compiled.py; here nothing is compiled ahead of its arguments.
        patch.setattr(train.loop, "CompiledStep", lambda make, **options: make(ONE_PASS))
        yield steps


@pytest.fixture
def steps(all_steps):
    yield all_steps
    all_steps.before = lambda state: state


@pytest.fixture(scope="module")
def ran(configured, tmp_path_factory, all_steps):
    """The directory and the results of a run that nothing disturbs."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    return run, train.contrastive.train(configured(run))


def metrics(run, *, timeless=False):
    """The lines of metrics.jsonl; timeless: without what depends on the clock."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clock = ("seconds", *RATES) if timeless else ()
    return [{name: value for name, value in row.items() if name not in clock} for row in rows]


def files(directory):
    return {path.relative_to(directory): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def without_times(results):
    return {name: value for name, value in results.items() if name not in ("date", "seconds", "config", "commands")}


def test_metrics(ran):
    """PEER §2.11: there only the total loss is logged; here each part, and what the heads do."""
    rows = metrics(ran[0])
    trained = [row for row in rows if "loss" in row]
    assert [row["step"] for row in trained] == [1, 2, 3, 4]
    parts = {f"loss/{name}" for name in ("dense", "sparse", "colbert", "hybrid")}
    measures = {"step", "seconds", "loss", "learning_rate", "active_terms/query", "active_terms/passage"} | parts
    measures |= {"gradient_norm", *(f"gradient_norm/{part}" for part in ("encoder", "sparse", "colbert"))}
    taught = {f"distill/{name}" for name in ("dense", "sparse", "colbert")}
    rates = set(RATES)  # the first step was compiled
    assert [set(row) for row in trained] == [measures, measures | rates, *[measures | rates | taught] * 2]
    assert all(0 < row[name] < 1 for row in trained[1:] for name in ("padding", "mfu"))
    for row in trained:
        norms = [row[f"gradient_norm/{part}"] for part in ("encoder", "sparse", "colbert")]
        assert np.linalg.norm(norms) == pytest.approx(row["gradient_norm"], rel=1e-5)
        # At this learning rate the sparse head does not live long.
        assert [norm > 0 for norm in norms] == [True, row["active_terms/query"] > 0, True]
    assert [row["learning_rate"] for row in trained] == pytest.approx([0.01, 0.0075, 0.005, 0.0025])
    evaluated = [row for row in rows if "dev/all/ndcg_at_10" in row]
    assert [row["step"] for row in evaluated] == [2, 4]
    assert {name.split("/")[1] for name in evaluated[0] if name.startswith("dev/")} == set(FUNCTIONS)
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)


def test_results(ran, small_data):
    run, results = ran
    assert json.loads((run / "results.json").read_text()) == json.loads(json.dumps(results))
    found = [(one["name"], one["model"], tuple(one["scores"])) for one in results["evaluations"]]
    assert found == [
        ("test", "trained", ("bm25", *FUNCTIONS)),
        ("test-unseen", "trained", ("bm25", *FUNCTIONS)),
        ("test", "untrained", FUNCTIONS),
        ("test-unseen", "untrained", FUNCTIONS),
    ]
    example = results["example"]
    assert example["language"] == "Swahili" and set(example["tops"]) == {"bm25", *FUNCTIONS}
    assert all(len(example["tops"][function]) == 3 for function in ("dense", "colbert", "all"))
    assert results["config"]["data"]["train"] == str(small_data / "train.jsonl")
    assert results["parameters"] == sum(x.size for x in jax.tree.leaves(m3jax.load(run / "model").params))
    assert results["seconds"]["total"] == pytest.approx(
        sum(value for name, value in results["seconds"].items() if name != "total"), abs=0.5
    )


def test_files(ran):
    run, _ = ran
    assert {path.name for path in run.iterdir()} == {
        *("checkpoints", "model", "pictures", "tensorboard"),
        *("metrics.jsonl", "report.html", "results.json", "untrained.json"),
    }
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"2", "4"}
    page = (run / "report.html").read_text(encoding="utf-8")
    for part in (
        "tiny",
        "Swahili",
        "nDCG@10",
        "Gradient norm",
        "Tokens a second",
        "Model-FLOPs utilisation",
        "Padding",
    ):
        assert part in page
    assert not [path for path in run.rglob("*") if "partial" in path.name or "tmp" in path.name]


def test_the_released_model_is_the_last_checkpoint(ran):
    run, _ = ran
    released, last, before = (m3jax.load(run / name) for name in ("model", "checkpoints", "checkpoints/2"))
    assert released.config == last.config and released.tokenizer.json == last.tokenizer.json
    for a, b in zip(jax.tree.leaves(released.params), jax.tree.leaves(last.params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(
        *(m.params["encoder"]["embeddings"]["word_embeddings"]["embedding"] for m in (last, before))
    )


def test_the_card_says_what_the_results_say(ran):
    run, results = ran
    text = (run / "model" / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(text.split("---\n")[1])
    told = {
        (one["dataset"]["name"], metric["name"]): metric["value"]
        for one in front["model-index"][0]["results"]
        for metric in one["metrics"]
    }
    titles = {"ndcg_at_10": "nDCG@10", "recall_at_100": "Recall@100"}
    assert told == {
        (one["name"], f"{titles[metric]} ({function})"): value
        for one in results["evaluations"]
        if one["model"] == "trained"
        for function, scores in one["scores"].items()
        if function != "bm25"
        for metric, value in scores.items()
    }
    before = [one["scores"]["all"] for one in results["evaluations"] if one["model"] == "untrained"]
    values = " | ".join(f"{value:.3f}" for scores in before for value in scores.values())
    for line in (f"| all, before training | {values} |", "| data | train.jsonl |", "| rows | 12 |", "| steps | 4 |"):
        assert line in text
    assert str(run) not in text and str(Path(results["config"]["data"]["train"]).parent) not in text
    assert f"{results['parameters']:,} parameters" in text and "base_model" not in front and "language" not in front


def test_what_a_person_sees(ran, configured, capfd):
    run, _ = ran
    train.contrastive.train(configured(run, steps=4))
    shown = capfd.readouterr().out
    for part in ("tiny: M3(1 layers × 16", "12 rows of", "going on after step 4", "BM25", "Query (Swahili)", str(run)):
        assert part in shown


def test_the_commands_work(ran, capsys):
    run, results = ran
    assert len(results["commands"]) == 3
    for command in results["commands"]:
        python, flag, what, *arguments = shlex.split(command)
        assert python == "python"
        if flag == "-c":
            exec(what, {})
            assert isinstance(ast.literal_eval(capsys.readouterr().out), dict)
        else:
            {"train.evaluate": train.evaluate, "convert": convert.__main__}[what].main(arguments)
            assert {"train.evaluate": "| all |", "convert": " tensors, "}[what] in capsys.readouterr().out
    assert m3jax.load(run / "orbax").config == m3jax.load(run / "model").config
    shutil.rmtree(run / "orbax")


def test_a_finished_run_trains_no_more(ran, configured, steps, monkeypatch):
    run, results = ran
    kept = files(run / "model") | files(run / "checkpoints") | {"metrics": (run / "metrics.jsonl").read_bytes()}
    steps.before = lambda state: pytest.fail("a step of a finished run")
    measured = []
    evaluate = train.contrastive.evaluate
    monkeypatch.setattr(
        train.contrastive,
        "evaluate",
        lambda m3, task, **options: (measured.append(task.name), evaluate(m3, task, **options))[1],
    )
    again = train.contrastive.train(configured(run))
    assert files(run / "model") | files(run / "checkpoints") | {"metrics": (run / "metrics.jsonl").read_bytes()} == kept
    assert without_times(again) == without_times(results)
    assert measured == ["test", "test-unseen"]  # the untrained model is not measured a second time


def test_other_test_sets_are_measured_untrained_too(ran, configured, small_data, tmp_path):
    run = shutil.copytree(ran[0], tmp_path / "run")
    results = train.contrastive.train(configured(run, **{"data.test": str(small_data / "test-unseen")}))
    found = [(one["name"], one["model"]) for one in results["evaluations"]]
    assert found == [("test-unseen", "trained"), ("test-unseen", "untrained")]
    assert results["evaluations"] == [one for one in ran[1]["evaluations"] if one["name"] == "test-unseen"]
    # The same folder with other judgements is another test set.
    judged = small_data / "test-unseen" / "test_qrels.jsonl"
    before = judged.read_text()
    judged.write_text(before.replace('"p0"', '"p7"'))
    try:
        again = train.contrastive.train(configured(run, **{"data.test": str(small_data / "test-unseen")}))
    finally:
        judged.write_text(before)
    assert [one["scores"] for one in again["evaluations"]] != [one["scores"] for one in results["evaluations"]]
    assert again["evaluations"][1]["scores"] != results["evaluations"][1]["scores"]  # untrained


@pytest.mark.parametrize("at", [2, 3])
def test_an_interrupted_run_goes_on(ran, configured, steps, tmp_path, at):
    """Interrupted as step at + 1 begins: right after the save of step 2, and a step later."""
    run, results = ran

    def interrupt(state):
        if int(state.step) == at:
            raise KeyboardInterrupt
        return state

    steps.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        train.contrastive.train(configured(tmp_path / "run"))
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert not left & {"model", "results.json", "report.html"}
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"2"}
    steps.before = lambda state: state
    resumed = train.contrastive.train(configured(tmp_path / "run"))
    assert files(tmp_path / "run" / "model") == files(run / "model")
    assert without_times(resumed) == without_times(results)
    in_order = sorted(metrics(run, timeless=True), key=lambda row: (row["step"], "loss" in row))
    assert sorted(metrics(tmp_path / "run", timeless=True), key=lambda row: (row["step"], "loss" in row)) == in_order


def test_datasets_types_and_a_teacher(small_data, configured, tmp_path):
    """Two datasets, one without in-batch negatives and with scores; what the keys say arrives at the batches and the loss."""
    rows = [json.loads(line) for line in (small_data / "train.jsonl").read_text().splitlines()]
    scored = [row | {"type": "only_1neg", "pos_scores": [2.0], "neg_scores": [1.0]} for row in rows[:8]]
    sets = (small_data / "train.jsonl", write(tmp_path / "scored_no_in_batch_neg.jsonl", scored))
    changes = {
        **{"data.train": ",".join(map(str, sets)), "data.weights": (1.0, 3.0), "data.test": "", "data.dev": ""},
        **{"objective": "v1", "teacher": "sequential", "shuffle_segments": 0.5, "steps": 6, "distill_start": 0},
    }
    with pytest.warns(UserWarning, match="12 of 20 rows have no pos_scores"):
        results = train.contrastive.train(configured(tmp_path / "run", **changes))
    assert results["rows"] == 20
    rows = metrics(tmp_path / "run")
    names = ("dense", "sparse", "colbert", "hybrid")
    taught = [row for row in rows if row["teacher/dense"] > 0]
    assert len(rows) == 6 and 3 <= len(taught) < 6  # three steps of the first dataset in nine
    for row in rows:
        assert all((row[f"loss/{name}"] == 0) == (row in taught) for name in names)
        plain = sum(row[f"loss/{name}"] + row[f"teacher/{name}"] for name in names) / 4
        assert row["loss"] == pytest.approx(plain + sum(row[f"distill/{name}"] for name in names[:3]) / 3, rel=1e-5)
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    for setting in ("objective", "teacher", "weights", "same_dataset", "shuffle_segments"):
        assert setting in card
    with pytest.raises(ValueError, match=r"weights was \[1.0, 3.0\], is \[1.0, 2.0\]"):
        train.contrastive.train(configured(tmp_path / "run", **changes | {"data.weights": (1.0, 2.0)}))


# Texts that are cut elsewhere are other data: rows may move to other length groups.
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"steps": 5}, "steps was 4, is 5"),
        ({"learning_rate": 0.02}, "learning_rate was 0.01, is 0.02"),
        ({"query_max_length": 9}, "data was "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_run_does_not_go_on_with_other_settings(ran, configured, changes, message):
    run, _ = ran
    before = files(run)
    with pytest.raises(ValueError, match=message):
        train.contrastive.train(configured(run, **changes))
    assert files(run) == before


# Step 3 is the first on poisoned parameters; once the loop saves after each step, once after every second.
@pytest.mark.parametrize(("save_every", "last"), [(2, "2"), (1, "2")])
def test_a_loss_that_is_not_finite_stops_the_run(configured, steps, tmp_path, save_every, last):
    def poison(state):
        if int(state.step) != 2:
            return state
        params = jax.tree.map(lambda x: x, state.params)
        kernel = params["heads"]["colbert_linear"]["kernel"]
        params["heads"]["colbert_linear"]["kernel"] = jax.device_put(kernel * np.nan, kernel.sharding)
        return train.step.TrainState(params, state.optimizer, state.step)

    steps.before = poison
    # Dev scores of parameters that are not finite would stop the run for another reason.
    config = configured(tmp_path, save_every=save_every, evaluate_untrained=False, **{"data.dev": "", "data.test": ""})
    with pytest.raises(ValueError, match="step 3") as error:
        train.contrastive.train(config)
    for part in (
        "loss",
        "loss/colbert",
        "loss/hybrid",
        "distill/colbert",
        "gradient_norm/colbert",
        "group up to 16 tokens",
    ):
        assert part in str(error.value)
    assert "loss/dense" not in str(error.value)
    assert len(set(re.findall(r"train\.jsonl:\d+", str(error.value)))) == 4  # a batch is four rows
    assert max(path.name for path in (tmp_path / "checkpoints").iterdir()) == last
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(m3jax.load(tmp_path / "checkpoints").params))
    assert not (tmp_path / "model").exists()


def test_the_best_step_is_kept(configured, tmp_path, monkeypatch, capfd):
    """It is saved because it is the best, and it outlives those after it."""
    scores = iter([0.1, 0.9, 0.3, 0.2])
    monkeypatch.setattr(train.contrastive, "_dev_scores", lambda *_: {"dev/all/ndcg_at_10": next(scores)})
    changes = {
        "evaluate_every": 1,
        "save_every": 3,
        "keep_checkpoints": 1,
        "evaluate_untrained": False,
        "data.test": "",
    }
    train.contrastive.train(configured(tmp_path, **changes))
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"2", "4"}
    assert f"best    {tmp_path / 'checkpoints' / '2'}, dev/all/ndcg_at_10 0.900\n" in capfd.readouterr().out


@pytest.mark.parametrize("form", ["released", "converted"])
def test_a_run_starts_from_a_released_model(ran, configured, steps, tmp_path, form):
    """The directory itself, and what `python -m convert from-pytorch` makes of it."""
    run, results = ran
    source = str(run / "model")
    if form == "converted":
        convert.__main__.main(["from-pytorch", source, str(tmp_path / "orbax")])
        source = str(tmp_path / "orbax")
    steps.before = lambda state: pytest.fail("far enough")
    with pytest.raises(pytest.fail.Exception, match="far enough"):
        train.contrastive.train(configured(tmp_path, init_from=source, tokenizer=""))
    untrained = json.loads((tmp_path / "untrained.json").read_text())["evaluations"]
    ends = [{name: end["scores"][name] for name in FUNCTIONS} for end in results["evaluations"][:2]]
    assert [start["scores"] for start in untrained] == ends
