import functools
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr

import m3jax.scores
from m3jax.config import M3Config
from m3jax.losses import m3_loss
from m3jax.model import apply, shapes
from m3jax.representations import Representations
from m3jax.scores import all_scores, colbert_scores, dense_scores, hybrid_scores, sparse_scores, term_weights
from tests.naive_scores import (
    NAMES,
    both,
    differentiable,
    full_array_scores,
    naive_scores,
    place,
    representations,
)

pytestmark = pytest.mark.usefixtures("compiled_quickly")


@functools.partial(jax.jit, static_argnums=(0, 1))
def compiled(scores, elements, queries, passages, direction):
    """Values and gradients of Σ direction · score; `elements` stands for the block size, which jit does not see."""

    def total(q, p):
        values = scores(place(queries, q), place(passages, p))
        return sum((values[name] * direction[name]).sum() for name in NAMES), values

    grads, values = jax.grad(total, argnums=(0, 1), has_aux=True)(differentiable(queries), differentiable(passages))
    return values, grads


def gradients(scores, queries, passages, direction=None):
    """The four matrices, and the gradients of a random weighted sum of them for both sides."""
    if direction is None:
        rng = np.random.default_rng(0)
        shape = (len(queries.dense), len(passages.dense))
        direction = {name: rng.normal(size=shape).astype(np.float32) for name in NAMES}
    given = compiled(scores, m3jax.scores._BLOCK_ELEMENTS, queries, passages, direction)
    return jax.tree.map(np.asarray, given)


def assert_close(got, expected, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol), got, expected)


def test_values_of_the_naive_loops():
    queries, passages = both(0)
    got, _ = gradients(all_scores, queries, passages)
    expected = naive_scores(queries, passages)
    for name in NAMES:
        assert got[name].dtype == np.float32
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-5, atol=1e-6)
    assert (expected["sparse"] > 0).mean() > 0.5  # else this shows nothing


@pytest.mark.parametrize("elements", [1, 1 << 24])
def test_of_equally_near_tokens_the_first_has_the_gradient(elements, monkeypatch):
    monkeypatch.setattr(m3jax.scores, "_BLOCK_ELEMENTS", elements)
    queries, passages = jnp.ones((1, 1, 2)), jnp.ones((1, 3, 2)).at[0, 0].set(0)
    given = jax.grad(lambda p: colbert_scores(queries, jnp.ones((1, 1), bool), p, jnp.ones((1, 3), bool)).sum())(
        passages
    )
    assert given[0].tolist() == [[0, 0], [1, 1], [0, 0]]


@pytest.mark.parametrize("elements", [1, 4 * 7 * 2, 4 * 7 * 9 * 2, 1 << 24])
def test_gradients_of_the_full_arrays_at_any_block_size(elements, monkeypatch):
    monkeypatch.setattr(m3jax.scores, "_BLOCK_ELEMENTS", elements)
    queries, passages = both(2)
    assert_close(gradients(all_scores, queries, passages), gradients(full_array_scores, queries, passages))


def test_gradients_by_finite_differences():
    queries, passages = both(4)
    rng = np.random.default_rng(0)
    direction = {name: np.zeros((4, 5), np.float32) for name in NAMES} | {"hybrid": np.float32(rng.normal(size=(4, 5)))}
    _, grads = gradients(all_scores, queries, passages, direction)
    parts = (differentiable(queries), differentiable(passages))
    step = 1e-4
    for side, name in [(side, name) for side in (0, 1) for name in parts[0]]:
        # Only where the weight is not 0: there the max with 0 has a kink.
        for index in rng.permutation(np.argwhere(parts[side][name] != 0))[:12]:
            ends = []
            for sign in (1, -1):
                moved = [{n: np.float64(x) for n, x in part.items()} for part in parts]
                moved[side][name][tuple(index)] += sign * step
                score = naive_scores(place(queries, moved[0]), place(passages, moved[1]))["hybrid"]
                ends.append((score * direction["hybrid"]).sum())
            np.testing.assert_allclose(grads[side][name][tuple(index)], (ends[0] - ends[1]) / (2 * step), atol=1e-5)


def test_padding_changes_nothing():
    queries, passages = both(6)

    def padded(text, extra, garbage):
        rows = len(text.dense)
        vectors = np.full((rows, extra, text.colbert.shape[2]), garbage, np.float32)
        return Representations(
            dense=text.dense,
            token_ids=np.concatenate([text.token_ids, np.ones((rows, extra), np.int32)], axis=1),
            token_weights=np.concatenate([text.token_weights, np.zeros((rows, extra), np.float32)], axis=1),
            colbert=np.concatenate([text.colbert, vectors], axis=1),
            colbert_mask=np.concatenate([text.colbert_mask, np.zeros((rows, extra), bool)], axis=1),
        )

    values, (query_grads, passage_grads) = gradients(all_scores, queries, passages)
    long_values, long_grads = gradients(all_scores, padded(queries, 3, 0.7), padded(passages, 5, -0.7))
    assert_close(long_values, values)
    for long, short in zip(long_grads, (query_grads, passage_grads), strict=True):
        np.testing.assert_allclose(long["dense"], short["dense"], atol=1e-6)
        for name in ("token_weights", "colbert"):
            kept, rest = np.split(long[name], [short[name].shape[1]], axis=1)
            np.testing.assert_allclose(kept, short[name], atol=1e-6)
            assert not rest.any()


@pytest.mark.parametrize("garbage", [1e30, np.inf, np.nan])
def test_masked_colbert_tokens_may_hold_anything(garbage):
    queries, passages = both(8)
    expected = gradients(all_scores, queries, passages)

    def spoiled(text):
        vectors = np.where(text.colbert_mask[..., None], text.colbert, garbage).astype(np.float32)
        return place(text, differentiable(text) | {"colbert": vectors})

    values, grads = gradients(all_scores, spoiled(queries), spoiled(passages))
    assert_close((values, grads), expected)
    for text, grad in zip((queries, passages), grads, strict=True):
        assert not grad["colbert"][~text.colbert_mask].any()


def test_the_max_of_colbert_may_be_negative():
    one = np.float32([[[1.0, 0.0]]])
    other = np.float32([[[-1.0, 0.0], [0.0, 0.0]]])
    score = jax.jit(colbert_scores)(one, np.ones((1, 1), bool), other, np.array([[True, False]]))
    assert float(score[0, 0]) == -1.0  # the peer's padding of zeros gives 0 (PEER §2.5)


def test_a_text_without_tokens_scores_0_and_gives_no_nan():
    queries, passages = both(10)
    queries.colbert_mask[1] = False
    passages.colbert_mask[2] = False
    queries.token_weights[1] = 0
    values, grads = gradients(all_scores, queries, passages)
    for name in ("colbert", "sparse"):
        assert not values[name][1].any()
    assert not values["colbert"][:, 2].any() and values["colbert"][0, :2].all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
    assert_close(values, naive_scores(queries, passages))


def test_permuting_rows_permutes_scores():
    queries, passages = both(12)
    rows, columns = np.array([2, 0, 3, 1]), np.array([4, 1, 0, 3, 2])
    direction = {name: np.random.default_rng(1).normal(size=(4, 5)).astype(np.float32) for name in NAMES}
    values, (query_grads, passage_grads) = gradients(all_scores, queries, passages, direction)
    turned, (turned_query_grads, turned_passage_grads) = gradients(
        all_scores,
        jax.tree.map(lambda x: x[rows], queries),
        jax.tree.map(lambda x: x[columns], passages),
        jax.tree.map(lambda x: x[rows][:, columns], direction),
    )
    assert_close(turned, jax.tree.map(lambda x: x[rows][:, columns], values))
    assert_close(turned_query_grads, jax.tree.map(lambda x: x[rows], query_grads))
    assert_close(turned_passage_grads, jax.tree.map(lambda x: x[columns], passage_grads))


def test_permuting_tokens_changes_nothing():
    queries, passages = both(14)
    order = np.array([5, 3, 0, 1, 4, 2, 6])
    turned = Representations(
        dense=queries.dense,
        token_ids=queries.token_ids[:, order],
        token_weights=queries.token_weights[:, order],
        colbert=queries.colbert[:, order],
        colbert_mask=queries.colbert_mask[:, order],
    )
    assert_close(gradients(all_scores, turned, passages)[0], gradients(all_scores, queries, passages)[0])


def test_a_repeated_term_counts_once():
    query, passage = (
        (np.array([[5, 9, 5, 5]]), np.float32([[0.25, 1.0, 0.5, 0.125]])),
        (np.array([[9, 5, 9]]), np.float32([[4, 2, 3]])),
    )
    assert jax.jit(sparse_scores)(*query, *passage).tolist() == [[0.5 * 2 + 1 * 4]]


def test_terms_that_no_query_has():
    query = jnp.array([[5, 9]]), jnp.array([[2.0, 1.0]])
    passage = jnp.array([[4, 9, 7, 11]]), jnp.array([[8.0, 4.0, 2.0, 1.0]])
    score, gradient = jax.value_and_grad(lambda weights: sparse_scores(*query, passage[0], weights)[0, 0])(passage[1])
    assert score == 4.0 and gradient.tolist() == [[0.0, 1.0, 0.0, 0.0]]


def test_memory_of_sparse_scores_is_that_of_the_tokens():
    """192 queries of 512 tokens and passages of 8192: all pairs of tokens of one passage would be 3.2 GB."""
    queries, passages = (192, 512), (32, 8192)
    given = [jax.ShapeDtypeStruct(shape, x) for shape in (queries, passages) for x in (jnp.int32, jnp.float32)]
    made = live_shapes(jax.grad(lambda *x: sparse_scores(*x).sum(), (1, 3)), *given)
    assert max(map(math.prod, made)) <= max(m3jax.scores._BLOCK_ELEMENTS, math.prod(queries), math.prod(passages))


def test_term_weights_are_the_max_of_each_id():
    text = representations(6, 9, 16)
    ids, weights = map(np.asarray, jax.jit(term_weights)(text.token_ids, text.token_weights))
    for row in range(6):
        assert (np.diff(ids[row]) >= 0).all()
        got = {int(i): float(w) for i, w in zip(ids[row], weights[row], strict=True) if w > 0}
        expected = {}
        for i, w in zip(text.token_ids[row].tolist(), text.token_weights[row].tolist(), strict=True):
            if w > 0:
                expected[i] = max(w, expected.get(i, 0.0))
        assert got == expected
        assert np.count_nonzero(weights[row]) == len(expected)  # one slot a term


def test_equal_maxima_share_the_gradient():
    ids = jnp.array([[5, 5, 5, 9]])
    grad = jax.jit(jax.grad(lambda w: (term_weights(ids, w)[1] * np.float32([8.0, 2.0, 2.0, 1.0])).sum()))
    assert grad(np.float32([[0.5, 0.25, 0.5, 0.1]])).tolist() == [[4.0, 0.0, 4.0, 1.0]]


def test_hybrid_weights():
    dense, sparse, colbert = (jnp.float32([x]) for x in (1.0, 10.0, 100.0))
    assert hybrid_scores(dense, sparse, colbert).tolist() == [104.0]
    assert hybrid_scores(dense, sparse, colbert, (0.25, 0.5, 2.0)).tolist() == [205.25]
    queries, passages = both(17)
    got = jax.jit(all_scores, static_argnums=2)(queries, passages, (0.15, 0.5, 0.35))["hybrid"]
    np.testing.assert_allclose(got, naive_scores(queries, passages, (0.15, 0.5, 0.35))["hybrid"], rtol=1e-5)


def test_products_of_half_precision_add_up_in_float32():
    rng = np.random.default_rng(19)
    q, p = (jnp.asarray(rng.normal(size=(3, 512)), jnp.bfloat16) for _ in range(2))
    mask = jnp.ones((3, 1), bool)
    expected = np.asarray(q, np.float64) @ np.asarray(p, np.float64).T
    for got in (dense_scores(q, p), colbert_scores(q[:, None], mask, p[:, None], mask)):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_colbert_gradients_in_halves_are_the_exact_ones_rounded_once():
    queries, passages = both(20)
    halves = jnp.asarray(queries.colbert, jnp.bfloat16), jnp.asarray(passages.colbert, jnp.bfloat16)

    def total(q, p):
        found = colbert_scores(q, jnp.asarray(queries.colbert_mask), p, jnp.asarray(passages.colbert_mask))
        return (found * jnp.cos(jnp.arange(20.0).reshape(4, 5))).sum()

    step = jax.jit(jax.value_and_grad(total, (0, 1)))
    value, got = step(*halves)
    exact, expected = step(*(x.astype(jnp.float32) for x in halves))
    np.testing.assert_allclose(value, exact, rtol=1e-5)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == jnp.bfloat16 and b.any()
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("elements", [1 << 22, 1500, 100], ids=["one block", "blocks", "parts of a passage"])
def test_tpus_write_the_gradient_over_the_vectors(elements, monkeypatch):
    queries, passages = jax.tree.map(jnp.asarray, both(20))
    monkeypatch.setattr(m3jax.scores, "_BLOCK_ELEMENTS", elements)

    def gradients():
        def total(q, p):
            return (colbert_scores(q, queries.colbert_mask, p, passages.colbert_mask) ** 2).sum()

        step = jax.jit(jax.grad(total, (0, 1)))
        return step(queries.colbert, passages.colbert), str(jax.make_jaxpr(step)(queries.colbert, passages.colbert))

    elsewhere, jaxpr = gradients()
    monkeypatch.setattr(m3jax.scores, "platform", lambda: "tpu")
    in_place, other = gradients()
    assert "scatter" in other and "scatter" not in jaxpr
    for a, b in zip(in_place, elsewhere, strict=True):
        assert b.any() and (a == b).all()


def array_shapes(jaxpr):
    """Shapes of all arrays that a jaxpr makes, those of inner jaxprs included."""
    own = {v.aval.shape for eqn in jaxpr.eqns for v in eqn.outvars}
    return own.union(*(array_shapes(inner) for eqn in jaxpr.eqns for inner in jaxprs_in_params(eqn.params)))


def live_shapes(function, *args):
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    return array_shapes(dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])


def test_no_array_holds_all_tokens_of_all_pairs():
    # PEER §3: 48 queries × 8 passages of 512 tokens, where the peer holds 48 · 512 · 384 · 512 scores for the backward pass.
    def text(rows, length=512, width=1024):
        shape = jax.ShapeDtypeStruct
        return Representations(
            dense=shape((rows, width), jnp.float32),
            token_ids=shape((rows, length), jnp.int32),
            token_weights=shape((rows, length), jnp.float32),
            colbert=shape((rows, length, width), jnp.float32),
            colbert_mask=shape((rows, length), bool),
        )

    def loss(q, p, queries, passages):
        scores = all_scores(place(queries, q), place(passages, p))
        return m3_loss(scores, jnp.arange(48) * 8, distill=1.0)[0]

    queries, passages = text(48), text(384)
    made = live_shapes(
        jax.value_and_grad(loss, argnums=(0, 1)), differentiable(queries), differentiable(passages), queries, passages
    )
    assert max(map(math.prod, made)) == 384 * 512 * 1024  # the gradient of the passages' vectors
    nearest = (384, 1, 48, 512)
    assert nearest in made  # which token of each passage
    blocks = [math.prod(shape) for shape in made - {nearest} if {48, 512} <= set(shape) and 1024 not in shape]
    assert max(blocks) <= m3jax.scores._BLOCK_ELEMENTS + 48 * 512  # parts of a passage's tokens, to the next token


EIGHT = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding
from m3jax import scores
from m3jax.sharding import BATCH, make_mesh

scores._BLOCK_ELEMENTS = int(sys.argv[1])
Q, P, I, J, C = 16, 512, 8, 32, 64
shapes = ((Q, I, C), (P, J, C))

def loss(queries, passages):
    masks = (jnp.ones(x.shape[:2], bool) for x in (queries, passages))
    found = scores.colbert_scores(queries, next(masks), passages, next(masks))
    return (jax.nn.softmax(found * 10, axis=1) ** 2).sum()

mesh = make_mesh()
assert mesh.size == 8
place = NamedSharding(mesh, BATCH)
with jax.set_mesh(mesh):
    given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    step = jax.jit(jax.value_and_grad(loss, (0, 1)), in_shardings=(place, place), out_shardings=(None, (place, place)))
    used = step.lower(*given).compile().memory_analysis().temp_size_in_bytes
    random = np.random.default_rng(0)
    rows = [random.normal(size=shape).astype(np.float32) / C**0.5 for shape in shapes]
    got = step(*rows)
passages = P * J * C * 4  # bytes of all passages' vectors
assert used < passages, (used, passages)  # a device's eighth and its gradient's, blocks, and which token was nearest
expected = jax.value_and_grad(loss, (0, 1))(*rows)
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max()), got, expected)
print(used / passages)
"""


@pytest.mark.parametrize("elements", [1 << 16, 1 << 10], ids=["sixteen passages at once", "a quarter of one"])
def test_a_device_never_holds_the_token_vectors_of_all(elements):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", EIGHT, str(elements)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("elements", [1 << 10, 1 << 24])
def test_training_holds_no_vocabulary_axis_but_the_tables(elements, monkeypatch):
    monkeypatch.setattr(m3jax.scores, "_BLOCK_ELEMENTS", elements)
    config = M3Config(num_hidden_layers=1)
    assert config.vocab_size == 250002

    def loss(params, ids, passage_ids):
        queries, passages = (apply(config, params, x, x != 1) for x in (ids, passage_ids))
        return m3_loss(all_scores(queries, passages), jnp.arange(4) * 2, distill=1.0)[0]

    ids, passage_ids = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((4, 32), (8, 64)))
    made = live_shapes(jax.value_and_grad(loss), shapes(config), ids, passage_ids)
    assert {shape for shape in made if config.vocab_size in shape} == {(config.vocab_size, config.hidden_size)}
    assert ((8, 64, 4, 32) in made) == (elements > 4 * 32 * 8 * 64)  # all tokens of all pairs only where they are few
