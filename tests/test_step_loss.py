"""The loss of a training step beside a second, naive one, and what is computed and kept for it.

Not here: the mathematics of the losses (test_losses.py) and parity with the reference (parity/test_training_parity.py).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr

pytest.importorskip("optax", reason="training needs the train extra")

import m3jax.scores
import train.step
from m3jax.model import apply, flatten, init
from tests.small_step import GROUP, LENGTH, MODEL, PARTS, ROWS, batch, config, total
from train.step import loss_and_parts
from train.sub_batch import SubBatches

pytestmark = pytest.mark.usefixtures("compiled_quickly")


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
