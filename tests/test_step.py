"""The training step: its loss beside a second, naive one, and what a step does to the state.

Not here: the mathematics of the losses (test_losses.py) and parity with the reference (parity/test_training_parity.py).
"""

import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr

pytest.importorskip("optax", reason="training needs the train extra")

import m3jax.scores
import train.step
from configs import base
from m3jax.config import M3Config
from m3jax.model import apply, flatten, init
from m3jax.sharding import make_mesh
from train.data.pipeline import Batch
from train.optimizer import make_optimizer
from train.step import TrainState, loss_and_parts, make_state, make_step
from train.sub_batch import ONE_PASS, SubBatches

pytestmark = pytest.mark.usefixtures("compiled_quickly")
MODEL = M3Config.tiny(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=10,
)
ROWS, GROUP, LENGTH = 4, 2, 8
PARTS = ("dense", "sparse", "colbert")


def config(**changes):
    """base.py with weights of which no two are equal, so that none can stand for another."""
    settings = base.get_config()
    settings.update(steps=10, learning_rate=1e-2, warmup=0.0, weight_decay=0.1, temperature=0.1, remat="elements")
    settings.update(hybrid_weights=(0.7, 0.4, 1.1), loss_weights=(0.9, 0.2, 1.3), **changes)
    return settings


def texts(count, seed):
    """`count` padded rows of 4 to 8 tokens below 30, some of them repeated, and their mask."""
    random = np.random.default_rng(seed)
    mask = np.arange(LENGTH) < random.integers(4, LENGTH + 1, (count, 1))
    ids = np.where(mask, random.integers(4, 30, (count, LENGTH)), MODEL.pad_token_id).astype(np.int32)
    ids[:, 0] = MODEL.cls_token_id
    return ids, mask


def batch(known=None):
    """Four rows of two passages; row i knows its own positive, and those that `known` names by their columns."""
    identity = np.random.default_rng(2).integers(2**32, size=(ROWS * GROUP, 2), dtype=np.uint32)
    columns = np.repeat(np.arange(ROWS)[:, None] * GROUP, ROWS * GROUP, axis=1)
    for row, others in (known or {}).items():
        columns[row, : len(others)] = others
    present, own_group = np.ones(ROWS * GROUP, bool), np.zeros(ROWS, bool)
    no_scores = np.full((ROWS, GROUP), -np.inf, np.float32)
    return Batch(*texts(ROWS, 0), *texts(ROWS * GROUP, 1), identity, identity[columns], present, own_group, no_scores)


@pytest.fixture(scope="module")
def params():
    return init(MODEL, jax.random.key(0))


@pytest.fixture(scope="module")
def value_and_gradient():
    """jax.value_and_grad of the loss in params; the settings are float32's."""
    settings = config()

    def loss(params, rows, distill):
        return loss_and_parts(MODEL, settings, params, rows, distill, jax.random.key(1))

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def naive_scores(params, rows, width=None):
    """The score matrices, one pair after another; and the terms with a weight of each text. width: of dense and colbert."""
    ids, mask = (np.concatenate(pair) for pair in ((rows[0], rows[2]), (rows[1], rows[3])))
    given = jax.tree.map(np.asarray, jax.jit(lambda *given: apply(MODEL, *given))(params, ids, mask))
    terms = [{} for _ in ids]
    for text, found in enumerate(terms):
        for term, weight in zip(given.token_ids[text], given.token_weights[text], strict=True):
            found[term] = max(found.get(term, 0.0), weight)
    every, vectors = (
        x[..., :width] / np.linalg.norm(x[..., :width], axis=-1, keepdims=True) for x in (given.dense, given.colbert)
    )
    tokens = [own[real] for own, real in zip(vectors, given.colbert_mask, strict=True)]
    scores = {name: np.zeros((ROWS, ROWS * GROUP)) for name in (*PARTS, "hybrid")}
    for i, j in np.ndindex(scores["dense"].shape):
        dense = every[i] @ every[ROWS + j]
        sparse = sum(weight * terms[ROWS + j].get(term, 0.0) for term, weight in terms[i].items())
        colbert = np.mean([max(token @ other for other in tokens[ROWS + j]) for token in tokens[i]])
        for name, value in zip(
            scores, (dense, sparse, colbert, 0.7 * dense + 0.4 * sparse + 1.1 * colbert), strict=True
        ):
            scores[name][i, j] = value
    active = [sum(weight > 0 for weight in text.values()) for text in terms]
    return scores, np.mean(active[:ROWS]), np.mean(active[ROWS:])


def naive_parts(scores, rows):
    """Unweighted parts: each row's softmax ranges over its positive and the passages that it does not know, which are there
    and, where the row has no in-batch negatives, of its group."""
    taught = [name for name in scores if name != "hybrid"]
    parts = dict.fromkeys((*scores, *(f"distill/{name}" for name in taught)), 0.0)
    for i in range(ROWS):
        own = i * GROUP
        known = set(map(tuple, rows.known_identity[i]))
        columns = [own] + [
            j
            for j, key in enumerate(map(tuple, rows.passage_identity))
            if key not in known and rows.passage_present[j] and (j // GROUP == i or not rows.own_group[i])
        ]
        logs = {}
        for name, matrix in scores.items():
            logits = matrix[i, columns] / 0.1
            logs[name] = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
            parts[name] -= logs[name][0] / ROWS
        for name in taught:
            parts[f"distill/{name}"] -= np.exp(logs["hybrid"]) @ logs[name] / ROWS
    return parts


def total(parts, distill):
    """The loss of PAPER §2 from its parts."""
    contrastive = (0.9 * parts["dense"] + 0.2 * parts["sparse"] + 1.3 * parts["colbert"] + parts["hybrid"]) / 4
    distilled = sum(w * parts[f"distill/{name}"] for w, name in zip((0.9, 0.2, 1.3), PARTS, strict=True)) / 3
    return (contrastive + distilled) / 2 if distill else contrastive


@pytest.mark.parametrize("distill", [False, True])
def test_loss_is_the_composition_by_hand(params, value_and_gradient, distill):
    rows = batch(known={0: [2, 5], 3: [0]})
    (loss, measures), _ = value_and_gradient(params, rows, distill)
    scores, per_query, per_passage = naive_scores(params, rows)
    parts = naive_parts(scores, rows)
    assert abs(parts["dense"] - naive_parts(scores, batch())["dense"]) > 1e-2  # what is known counts
    assert loss == pytest.approx(total(parts, distill), rel=1e-5)
    expected = {name if "/" in name else f"loss/{name}": value for name, value in parts.items()}
    expected |= {"loss": float(loss), "active_terms/query": per_query, "active_terms/passage": per_passage}
    assert {name: float(value) for name, value in measures.items()} == pytest.approx(expected, rel=1e-5)


def test_known_positives_are_no_negatives(params, value_and_gradient):
    everything = list(range(ROWS * GROUP))
    apart, alike = batch(known={0: [0, 4], 1: [2, 4], 2: everything, 3: [6, 4]}), batch()
    for rows in (apart, alike):
        rows.query_ids[2, 1], rows.passage_ids[4, 1], rows.passage_ids[0, 1] = 37, 38, 39
    touched = []
    for rows in (apart, alike):
        _, gradient = value_and_gradient(params, rows, True)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
        embeddings = gradient["encoder"]["embeddings"]["word_embeddings"]["embedding"]
        touched.append([bool(np.any(embeddings[token])) for token in (37, 38, 39)])
    # Row 2 knows all passages and the others know its positive: neither its query nor its positive can learn anything.
    assert touched == [[False, False, True], [True, True, True]]


def test_peer_2_2_own_groups_and_places_without_a_passage(params, value_and_gradient):
    """PEER §2.2: without in-batch negatives the ensemble's candidates are the group's, as those of every head."""
    rows = batch()
    rows = rows._replace(own_group=np.array([True, True, False, False]), passage_present=np.arange(ROWS * GROUP) != 3)
    (loss, measures), gradient = value_and_gradient(params, rows, True)
    scores, _, per_passage = naive_scores(params, rows)
    parts = naive_parts(scores, rows)
    assert min(abs(parts[name] - value) for name, value in naive_parts(scores, batch()).items()) > 1e-2
    assert loss == pytest.approx(total(parts, True), rel=1e-5)
    assert all(float(measures[n if "/" in n else f"loss/{n}"]) == pytest.approx(x, rel=1e-5) for n, x in parts.items())
    assert float(measures["active_terms/passage"]) == pytest.approx(per_passage * 8 / 7)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))


def test_objective_and_teacher_reach_the_loss(params):
    settings = config()
    settings.update(objective="v1", hybrid_weights=(), loss_weights=(), teacher="group", teacher_temperature=0.5)
    given = np.array([[1, 0], [-np.inf, -np.inf], [0, 2], [1, 1]], np.float32)
    rows = batch()._replace(teacher_scores=given)
    loss, measures = jax.jit(
        lambda params, rows: loss_and_parts(MODEL, settings, params, rows, True, jax.random.key(1))
    )(params, rows)
    scores, _, _ = naive_scores(params, rows)
    scores["hybrid"] = scores["dense"] + scores["sparse"] + scores["colbert"]
    parts = naive_parts(scores, rows)
    for name, matrix in scores.items():
        parts[f"teacher/{name}"] = 0.0
        for i in (0, 2, 3):
            own = matrix[i, i * GROUP : i * GROUP + GROUP] / 0.1
            target = np.exp(given[i] / 0.5 - np.logaddexp(*(given[i] / 0.5)))
            parts[f"teacher/{name}"] -= target @ (own - np.logaddexp(*own)) / ROWS
    expected = sum(parts[name] + parts[f"teacher/{name}"] for name in scores) / 4
    expected += sum(parts[f"distill/{name}"] for name in PARTS) / 3
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    for name, value in parts.items():
        assert float(measures[name if "/" in name else f"loss/{name}"]) == pytest.approx(value, rel=1e-5), name


def test_two_functions_in_several_widths(params):
    settings = config(functions=("dense", "colbert"))
    settings.matryoshka.update(dense=(8, 4), colbert=(8,))
    loss, measures = jax.jit(
        lambda params, rows: loss_and_parts(MODEL, settings, params, rows, True, jax.random.key(1))
    )(params, batch())
    full, eight, four = (naive_scores(params, batch(), width)[0] for width in (None, 8, 4))
    scores = {name: full[name] for name in ("dense", "colbert")} | {
        "hybrid": 0.7 * full["dense"] + 1.1 * full["colbert"]
    }
    parts = naive_parts(
        scores | {"dense@8": eight["dense"], "dense@4": four["dense"], "colbert@8": eight["colbert"]}, batch()
    )
    means = []
    for kind in ("", "distill/"):
        dense = np.mean([parts[f"{kind}{name}"] for name in ("dense", "dense@8", "dense@4")])
        means.append(0.9 * dense + 1.3 * np.mean([parts[f"{kind}{name}"] for name in ("colbert", "colbert@8")]))
    expected = {name if "/" in name else f"loss/{name}": value for name, value in parts.items()}
    expected["loss"] = ((means[0] + parts["hybrid"]) / 3 + means[1] / 2) / 2
    # No terms: of a sparse head that is not trained nobody is to be warned.
    assert {name: float(value) for name, value in measures.items()} == pytest.approx(expected, rel=1e-5)
    assert loss == measures["loss"]


def test_bfloat16_is_close(params, value_and_gradient):
    settings = config(dtype="bfloat16")

    def loss(params, rows):
        return loss_and_parts(MODEL, settings, params, rows, True, jax.random.key(1))

    (_, exact), _ = value_and_gradient(params, batch(), True)
    _, rounded = jax.jit(loss)(params, batch())
    assert float(rounded["loss"]) != float(exact["loss"])
    for name in exact:
        assert float(rounded[name]) == pytest.approx(float(exact[name]), rel=0.05), name
    gradient, _ = jax.eval_shape(jax.grad(loss, has_aux=True), params, batch())
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(("dtype", "precise"), [("float32", "HIGHEST"), ("bfloat16", "HIGH")])
def test_how_precise_a_step_is(params, dtype, precise):
    """Of the products; and the tables of embeddings, whose gradients are long sums, are float32 in any run."""
    settings, mesh = config(dtype=dtype), make_mesh()
    optimizer = make_optimizer(settings)
    with jax.set_mesh(mesh):
        state = make_state(params, optimizer, mesh)
        program = str(jax.make_jaxpr(make_step(MODEL, settings, optimizer, mesh, state))(state, batch()))
    assert set(re.findall(r"Precision\.(\w+)", program)) == {precise}
    assert f"f32[{MODEL.vocab_size},{MODEL.hidden_size}]" in program
    assert f"bf16[{MODEL.vocab_size},{MODEL.hidden_size}]" not in program


def test_of_all_passages_token_vectors_are_there_in_halves_alone(params, monkeypatch):
    """And never as a masked copy: at 8192 tokens they are what limits the batch."""
    monkeypatch.setattr(m3jax.scores, "_BLOCK_ELEMENTS", 1)
    settings = config(dtype="bfloat16")

    def loss(params, rows):
        return loss_and_parts(MODEL, settings, params, rows, True, jax.random.key(1), SubBatches(ROWS, ROWS * GROUP))[0]

    def equations(jaxpr):
        for equation in jaxpr.eqns:
            yield equation
            for inner in jaxprs_in_params(equation.params):
                yield from equations(inner)

    size = ROWS * GROUP * LENGTH * MODEL.colbert_dim
    made = {
        (equation.primitive.name, str(out.aval.dtype))
        for equation in equations(jax.make_jaxpr(jax.grad(loss))(params, batch()).jaxpr)
        for out in equation.outvars
        if out.aval.size == size
    }
    assert ("reshape", "bfloat16") in made
    assert not {(name, dtype) for name, dtype in made if dtype == "float32" or name == "select_n"}, made


@pytest.fixture(scope="module")
def ran(params):
    """Four steps on one batch, with dropout, and self-distillation from step 2; then one step twice at a step of choice."""
    settings = config(dropout=0.3, distill_start=2)
    traces = []

    def counted(*arguments):
        traces.append(arguments)
        return loss_and_parts(*arguments)

    mesh, optimizer, measures = make_mesh(), make_optimizer(settings), []
    with jax.set_mesh(mesh), pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.step, "loss_and_parts", counted)
        fresh = make_state(jax.tree.map(np.array, params), optimizer, mesh)  # which it takes over
        before = jax.tree.map(np.array, fresh)
        step = make_step(MODEL, settings, optimizer, mesh, fresh)
        state = fresh
        for _ in range(4):
            state, measured = step(state, batch())
            measures.append({name: float(value) for name, value in measured.items()})

        def first_loss(number):
            state = make_state(before.params, optimizer, mesh)
            state = TrainState(state.params, state.optimizer, jax.device_put(jnp.int32(number), state.step.sharding))
            return float(step(state, batch())[1]["loss/dense"])

        by_step = {number: [first_loss(number) for _ in range(2)] for number in (0, 1)}
    return SimpleNamespace(fresh=fresh, before=before, state=state, measures=measures, traces=traces, by_step=by_step)


def test_distillation_starts_at_its_step_without_compiling_again(ran):
    assert len(ran.traces) == 1
    for number, measures in enumerate(ran.measures):
        parts = {name.removeprefix("loss/"): value for name, value in measures.items()}
        assert measures["loss"] == pytest.approx(total(parts, distill=number >= 2), rel=1e-5)
        assert abs(total(parts, True) - total(parts, False)) > 1e-3


def test_steps_are_counted(ran):
    assert int(ran.before.step) == 0 and int(ran.state.step) == 4 and ran.state.step.dtype == jnp.int32


def test_the_state_is_taken_over(ran):
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(ran.fresh))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(ran.state))


def test_only_the_pooler_stays(ran, value_and_gradient):
    before, after = flatten(ran.before.params), flatten(ran.state.params)
    same = {path for path, leaf in before.items() if np.array_equal(leaf, after[path])}
    assert same == {"encoder/pooler/kernel", "encoder/pooler/bias"}
    first, last = (value_and_gradient(state.params, batch(), False)[0][0] for state in (ran.before, ran.state))
    assert last < first


def test_dropout_is_another_at_each_step(ran):
    assert ran.by_step[0][0] == ran.by_step[0][1] == ran.measures[0]["loss/dense"]
    assert ran.by_step[1][0] == ran.by_step[1][1] != ran.by_step[0][0]


@pytest.mark.parametrize(("start", "expected"), [(-1, [0, 0, 0]), (0, [1, 1, 1]), (2, [0, 0, 1])])
def test_when_distillation_is_on(monkeypatch, start, expected):
    def loss(model, settings, params, rows, distill, key, sub_batches):
        return params["sparse_linear"]["kernel"].sum() * rows.query_ids.sum(), {"distill": distill}

    monkeypatch.setattr(train.step, "loss_and_parts", loss)
    settings = config(distill_start=start)
    mesh, optimizer = make_mesh(), make_optimizer(settings)
    with jax.set_mesh(mesh):
        state = make_state({"sparse_linear": {"kernel": np.ones((2, 1), np.float32)}}, optimizer, mesh)
        step = make_step(MODEL, settings, optimizer, mesh, state)
        seen = []
        for _ in expected:
            state, measures = step(state, batch())
            seen.append(int(measures["distill"]))
    assert seen == expected
    # The norm before clipping: what tells that training is about to break.
    assert float(measures["gradient_norm"]) == pytest.approx(np.sqrt(2) * abs(batch().query_ids.sum()))


@pytest.mark.parametrize("sub_batches", [ONE_PASS, SubBatches(2, 4)])
def test_what_is_frozen_has_no_gradient_and_batches_accumulate(params, sub_batches):
    settings = config(frozen=("encoder",), accumulate=2, distill_start=-1)
    mesh, optimizer = make_mesh(), make_optimizer(settings)
    with jax.set_mesh(mesh):
        state = make_state(jax.tree.map(np.array, params), optimizer, mesh)
        step, moved = make_step(MODEL, settings, optimizer, mesh, state, sub_batches), []
        for _ in range(2):
            state, measures = step(state, batch())
            now = zip(flatten(state.params).items(), flatten(params).values(), strict=True)
            moved.append({path.split("/")[0] for (path, x), before in now if np.any(x != before)})
    assert moved == [set(), {"heads"}]
    # The whole norm too, or what is frozen would be shown to be trained.
    norms = {name: float(value) for name, value in measures.items() if name.startswith("gradient_norm")}
    assert norms["gradient_norm/encoder"] == 0.0 < min(norms["gradient_norm/sparse"], norms["gradient_norm/colbert"])
    assert norms["gradient_norm"] == pytest.approx(math.hypot(*norms.values()) / 2**0.5)


def test_in_sub_batches_nothing_is_computed_for_a_head_that_is_not_trained(params):
    settings = config(functions=("dense",), distill_start=-1)

    def loss(params):
        given = (params, jax.tree.map(jnp.asarray, batch()), False, jax.random.key(1), SubBatches(2, 4))
        return loss_and_parts(MODEL, settings, *given)[0]

    traced = jax.make_jaxpr(jax.grad(loss))(params)
    _, used = dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
    assert {path for path, reads in zip(flatten(params), used, strict=True) if "linear" in path and reads} == set()


@pytest.mark.parametrize("remat", ["elements", "all"])
def test_the_layers_are_told_what_to_compute_again(params, monkeypatch, remat):
    told = []

    def recorded(*given, **settings):
        told.append((settings["remat"], settings["dropout"]))
        return apply(*given, **settings)

    monkeypatch.setattr(train.step, "apply", recorded)
    settings = config(dropout=0.3)
    settings.remat = remat
    jax.eval_shape(lambda *given: loss_and_parts(MODEL, settings, *given, True, jax.random.key(1)), params, batch())
    assert told == [(remat, 0.3)] * 2
