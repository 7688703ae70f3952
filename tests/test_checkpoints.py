"""Checkpoints of a run: resumed is never stopped, bit for bit; what a run must not go on from is refused.

Not here: the model's own items of a step (test_checkpoint.py) and a whole run that is interrupted (e2e/test_train.py).
"""

import dataclasses
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

pytest.importorskip("grain", reason="training needs the train extra")
pytest.importorskip("optax", reason="training needs the train extra")
pytest.importorskip("orbax.checkpoint", reason="training needs the train extra")
pytest.importorskip("tensorflow_datasets", reason="training needs the train extra")

import m3jax
from configs import base
from m3jax.config import M3Config
from m3jax.model import init
from m3jax.sharding import make_mesh
from tests.bucket import bucket
from train.checkpoints import Checkpoints
from train.data.builders import Dataset, Row
from train.data.pipeline import Batches, prefetch
from train.data.streams import LengthGroup
from train.optimizer import make_optimizer
from train.step import TrainState, make_state, make_step

STEPS, STOP = 6, 3
SETTINGS = {"seed": 3, "length_groups": ((8, 4),), "steps": STEPS, "train": "rows.jsonl"}


class Memory:
    """Ten rows with made-up ids: a query, a positive and a negative each."""

    positives = negatives = np.ones(10, np.int32)
    query_lengths = passage_lengths = np.full(10, 6, np.int32)
    kinds = np.zeros(10, np.int32)
    datasets = (Dataset("rows.jsonl", 10, False),)
    query_max_length = 8

    def __len__(self):
        return 10

    def rows(self, indices):
        made = []
        for i in map(int, indices):
            texts = np.random.default_rng(i).integers(4, 100, (3, 6)).astype(np.int32)
            texts[:, 0], texts[:, -1] = 0, 2
            identity, scores = np.array([(i, 1), (i, 2)], np.uint32), np.full(2, -np.inf, np.float32)
            made.append(Row(texts[0], list(texts[1:]), 1, identity, scores))
        return made

    def places(self, indices):
        return [f"rows.jsonl:{i + 1}" for i in indices]


def config():
    settings = base.get_config()
    settings.update(steps=STEPS, warmup=0.2, learning_rate=1e-2, distill_start=4, dropout=0.1, remat="elements")
    return settings


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly():
    """XLA's optimisations would take half of this file's time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def model(tiny_tokenizer):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return M3Config.tiny(vocab_size=tiny_tokenizer.vocab_size, max_position_embeddings=10, **sizes)


@pytest.fixture(scope="module")
def params(model):
    return jax.tree.map(np.asarray, init(model, jax.random.key(0)))


def new_state(params):
    return make_state(params, make_optimizer(config()), make_mesh())


def on_host(tree):
    return jax.tree.map(np.array, tree)


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def ran(model, params, tiny_tokenizer, tmp_path_factory):
    """Six steps that save after the third, in the background, and go on at once; then a restored run of the last three."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    settings, mesh, optimizer = config(), make_mesh(), make_optimizer(config())
    # XLA takes seconds for a step: both runs share it, and nothing else.
    step = make_step(model, settings, optimizer, mesh, new_state(params))

    def go_on(state, first, saved):
        seen = []
        arguments = {"seed": 3, "groups": [LengthGroup(8, 4)], "group_size": 2, "pad_id": tiny_tokenizer.pad_id}
        batches = prefetch(Batches(Memory(), **arguments), first, STEPS)
        for done, batch in enumerate(batches, first + 1):
            state, measures = step(state, batch)
            if done == STOP:
                saved.save(model, tiny_tokenizer, state, done)
            seen.append((batch, on_host(measures), on_host(state)))
        return seen

    with jax.set_mesh(mesh):
        with Checkpoints(folder, keep=2, settings=SETTINGS) as saved:
            assert saved.last is None
            whole = go_on(new_state(params), 0, saved)
        with Checkpoints(folder, keep=2, settings=SETTINGS) as saved:
            assert saved.last == STOP
            restored = saved.restore(new_state(params))
            start = on_host(restored)
            placed = jax.tree.map(lambda x: x.sharding, restored)
            resumed = go_on(restored, saved.last, saved)
    return SimpleNamespace(folder=folder, whole=whole, resumed=resumed, start=start, placed=placed)


def test_restored_is_what_was_saved(ran, params):
    assert_same(ran.start, ran.whole[STOP - 1][2])
    assert int(ran.start.step) == STOP
    assert ran.placed == jax.tree.map(lambda x: x.sharding, new_state(params))


def test_resumed_is_never_stopped(ran):
    assert len(ran.whole) == STEPS and len(ran.resumed) == STEPS - STOP
    for (batch, measures, state), (batch_again, measures_again, state_again) in zip(
        ran.whole[STOP:], ran.resumed, strict=True
    ):
        assert_same(batch, batch_again)
        assert_same(measures, measures_again)
        assert_same(state, state_again)
    assert not np.array_equal(ran.whole[0][0].query_ids, ran.whole[STOP][0].query_ids)


def test_load_reads_a_run(ran, model, tiny_tokenizer):
    m3 = m3jax.load(ran.folder)
    assert m3.config == model and m3.tokenizer.json == tiny_tokenizer.json
    assert_same(m3.params, ran.whole[STOP - 1][2].params)


def test_other_settings_are_refused(ran, model):
    other = {name: value for name, value in SETTINGS.items() if name != "train"} | {"steps": 7, "rows": 10}
    with Checkpoints(ran.folder, keep=2, settings=other) as saved, pytest.raises(ValueError) as error:
        saved.check(model)
    text = str(error.value)
    for part in ("rows was None, is 10", "steps was 6, is 7", "train was 'rows.jsonl', is None"):
        assert part in text
    assert str(ran.folder) in text and "--config.output" in text and "seed" not in text


@pytest.mark.parametrize(
    "change",
    [{"layer_norm_eps": 1e-6}, {"intermediate_size": 48}, {"num_hidden_layers": 2}, {"pooler": False}],
    ids=lambda change: next(iter(change)),
)
def test_another_model_is_refused(ran, model, change):
    other = dataclasses.replace(model, **change)
    with (
        Checkpoints(ran.folder, keep=2, settings=SETTINGS) as saved,
        pytest.raises(ValueError, match=f"another model.*{next(iter(change))}"),
    ):
        saved.check(other)


def test_what_a_kill_leaves_is_not_taken_for_finished(ran, model, params, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(ran.folder, folder)
    # Orbax writes under such a name and renames when all is there: the optimiser is missing from this one.
    partial = folder / "5.orbax-checkpoint-tmp"
    shutil.copytree(folder / str(STOP), partial)
    shutil.rmtree(partial / "optimizer")
    with Checkpoints(folder, keep=2, settings=SETTINGS) as saved:
        assert saved.last == STOP
        assert int(saved.restore(new_state(params)).step) == STOP
    assert_same(m3jax.load(folder).params, ran.start.params)


def test_the_last_ones_are_kept(model, params, tiny_tokenizer, tmp_path):
    state = new_state(params)
    with Checkpoints(tmp_path, keep=2, settings=SETTINGS) as saved:
        for step in (1, 2, 3, 3):  # the second 3 is there already, and left
            saved.save(model, tiny_tokenizer, TrainState(state.params, state.optimizer, state.step), step)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.isdecimal()) == ["2", "3"]


def steps(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def test_the_best_one_is_kept_too(model, params, tiny_tokenizer, tmp_path):
    """Of steps without scores, and with another score only, none is the best; of equal ones the later is."""
    state = new_state(params)

    def save(saved, step, **scores):
        saved.save(model, tiny_tokenizer, state, step, {f"dev/{name}/ndcg": value for name, value in scores.items()})

    arguments = {"keep": 2, "best": "dev/all/ndcg", "settings": SETTINGS}
    with Checkpoints(tmp_path, **arguments) as saved:
        assert (
            saved.best is None and saved.is_best({"dev/all/ndcg": 0.0}) and not saved.is_best({"dev/dense/ndcg": 1.0})
        )
        save(saved, 1)
        save(saved, 2, dense=0.9)
        assert saved.best is None
        save(saved, 3, all=0.5, dense=0.1)
        assert saved.best == (3, 0.5) and not saved.is_best({"dev/all/ndcg": 0.4}) and not saved.is_best({})
        for step in (4, 5, 6):
            save(saved, step, all=0.4)
    assert steps(tmp_path) == [3, 5, 6]
    with Checkpoints(tmp_path, **arguments) as saved:  # a run that goes on knows it
        assert saved.best == (3, 0.5) and saved.last == 6
        save(saved, 7)
        save(saved, 8, all=0.5)
        assert saved.best == (8, 0.5)
        save(saved, 9)
    assert steps(tmp_path) == [8, 9]
    with Checkpoints(tmp_path, keep=1, best="dev/dense/ndcg", settings=SETTINGS) as saved:
        assert saved.best is None  # another score: the steps that are there do not have it
        save(saved, 10)
    with Checkpoints(tmp_path, keep=1, settings=SETTINGS) as saved:
        assert saved.best is None and not saved.is_best({"dev/all/ndcg": 1.0})
        save(saved, 11, all=1.0)
    assert steps(tmp_path) == [11]


def test_the_last_one_is_given_its_scores_later(model, params, tiny_tokenizer, tmp_path):
    """And is not written again meanwhile: a kill would leave none."""
    arguments = {"keep": 1, "best": "dev/all/ndcg", "settings": SETTINGS}
    with Checkpoints(tmp_path, **arguments) as saved:
        saved.save(model, tiny_tokenizer, new_state(params), 3)
    there = {path: path.stat().st_mtime_ns for path in (tmp_path / "3").rglob("*") if path.is_file()}
    with Checkpoints(tmp_path, **arguments) as saved:
        assert not saved.measured
        saved.add_scores({"dev/all/ndcg": 0.5})
        assert saved.measured and saved.best == (3, 0.5)
        saved.save(model, tiny_tokenizer, new_state(params), 4, {"dev/all/ndcg": 0.4})
        saved.save(model, tiny_tokenizer, new_state(params), 5)
    assert steps(tmp_path) == [3, 5]  # the best stays
    assert there.items() <= {path: path.stat().st_mtime_ns for path in (tmp_path / "3").rglob("*")}.items()
    with Checkpoints(tmp_path, **arguments) as saved:
        assert saved.best == (3, 0.5) and not saved.measured


@pytest.fixture
def store(monkeypatch):
    with bucket(monkeypatch) as objects:
        yield objects


def test_in_an_object_store(ran, model, params, tiny_tokenizer, store):
    """Saved, restored, the old ones deleted; a step that a kill left without its last file is not taken for finished."""
    url = "gs://bucket/run/checkpoints"
    state = ran.whole[STOP - 1][2]
    with jax.set_mesh(make_mesh()):
        like = new_state(params)
        placed = jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), state, like)
        with Checkpoints(url, keep=2, best="dev/all/ndcg", settings=SETTINGS) as saved:
            assert saved.last is None
            for step, score in ((1, 0.5), (2, 0.1), (3, 0.2), (4, 0.3)):
                saved.save(model, tiny_tokenizer, placed, step, {"dev/all/ndcg": score})
        assert {name.split("/")[4] for name in store} == {"1", "3", "4"}
        del store["/bucket/run/checkpoints/4/commit_success.txt"]  # it comes last
        with Checkpoints(url, keep=2, best="dev/all/ndcg", settings=SETTINGS) as saved:
            assert (saved.last, saved.best) == (3, (1, 0.5))
            saved.check(model)
            restored = saved.restore(like)
            saved.save(model, tiny_tokenizer, placed, 5)
        with Checkpoints(url, keep=2, best="dev/all/ndcg", settings=SETTINGS) as saved:
            assert not saved.measured
            saved.add_scores({"dev/all/ndcg": 0.7})
        with Checkpoints(url, keep=2, best="dev/all/ndcg", settings=SETTINGS) as saved:
            assert saved.measured and saved.best == (5, 0.7)
    assert_same(on_host((restored.params, restored.optimizer)), (state.params, state.optimizer))
    assert int(restored.step) == 3
