import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from m3jax import model
from m3jax.config import M3Config
from m3jax.model import M3, apply, cast, check_tree, flatten, init, shapes, unflatten

CONFIG = M3Config.tiny(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=12,
    colbert_dim=6,
)


@pytest.fixture(scope="module")
def params():
    """Random everywhere, biases and LayerNorm too, and far from the small initial values, which attend to all alike."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), jnp.float32), shapes(CONFIG))


TEXTS = ([0, 7, 8, 9, 2], [0, 30, 31, 7, 7, 3, 2], [0, 2], [])


def batch(length, texts=TEXTS):
    """ids and mask, one text a row; the last of `TEXTS` is a row of nothing but padding."""
    ids = np.full((len(texts), length), 1, np.int32)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text
    return ids, ids != 1


@jax.jit
def values_and_gradients(params, ids, mask, seeds):
    """Representations, and the gradient of a random sum of what they define (nothing of the padding)."""

    def total(params):
        got = apply(CONFIG, params, ids, mask)
        vectors = jnp.where(got.colbert_mask[..., None], got.colbert * seeds[1], 0.0)
        return (got.dense * seeds[0]).sum() + vectors.sum() + (got.token_weights * seeds[2]).sum(), got

    grads, got = jax.grad(total, has_aux=True)(params)
    return got, grads


forward = jax.jit(lambda params, ids, mask: apply(CONFIG, params, ids, mask))


def assert_same(got, expected, rtol=1e-4, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, expected)


def test_padding_changes_nothing(params):
    ids, mask = batch(7)
    got, long = forward(params, ids, mask), forward(params, *batch(10))
    assert not got.token_weights[~mask].any()
    np.testing.assert_array_equal(got.colbert_mask, mask & (np.arange(7) > 0))
    assert_same(long.dense[:3], got.dense[:3])
    assert_same(long.token_weights[:, :7], got.token_weights)
    assert_same(long.colbert[:, :7][got.colbert_mask], got.colbert[got.colbert_mask])
    assert not long.token_weights[:, 7:].any() and not long.colbert_mask[:, 7:].any()


def test_a_row_of_padding_changes_nothing(params):
    rng = np.random.default_rng(1)
    seeds = [rng.normal(size=shape).astype(np.float32) for shape in ((4, 16), (4, 7, 6), (4, 7))]
    for seed in seeds:
        seed[3] = 0
    got, grads = values_and_gradients(params, *batch(7), seeds)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((got, grads)))
    other, other_grads = values_and_gradients(params, *batch(7, [*TEXTS[:3], [0, 40, 41, 2]]), seeds)
    assert_same(other_grads, grads)
    assert_same(jax.tree.map(lambda x: x[:3], other), jax.tree.map(lambda x: x[:3], got))


def test_under_jit_and_vmap(params):
    ids, mask = batch(7)
    direct = forward(params, ids, mask)
    many = jax.jit(jax.vmap(lambda i, m: apply(CONFIG, params, i, m)))(ids[:, None], mask[:, None])
    assert_same(jax.tree.map(lambda x: x[:, 0], many), direct)
    assert direct.dense.shape == (4, 16) and direct.colbert.shape == (4, 7, 6)
    np.testing.assert_allclose(np.linalg.norm(direct.dense, axis=1), 1, rtol=1e-5)


def test_numpy_ids_and_mask(params):
    ids, mask = batch(7)  # what batching.pad gives, and what every function of jax.numpy takes
    assert jax.eval_shape(lambda params: apply(CONFIG, params, ids, mask), params).colbert_mask.shape == (4, 7)


def test_positions_follow_ids_and_attention_the_mask(params):
    ids, mask = batch(7, [[0, 7, 1, 8, 2], *TEXTS[:3]])
    mask[0, 2] = True  # a literal <pad> in a text: it is read, takes position 1 and is no term
    got, unread = forward(params, ids, mask), forward(params, ids, ids != 1)
    assert got.token_weights[0, 2] == 0 and got.colbert_mask[0, 2]
    assert np.abs(got.dense[0] - unread.dense[0]).max() > 1e-3
    assert_same(got.dense[1:], unread.dense[1:])


def test_dropout_needs_a_key(params):
    ids, mask = batch(7)
    with pytest.raises(ValueError, match=r"needs a PRNG key, got dropout=0\.1 and key=None"):
        apply(CONFIG, params, ids, mask, dropout=0.1)
    run = jax.jit(lambda key, i, m: apply(CONFIG, params, i, m, dropout=0.3, key=key, remat="all").dense)
    # Not the default implementation, which takes seconds to compile.
    one, two = (run(jax.random.key(seed, impl="unsafe_rbg"), ids, mask) for seed in (0, 1))
    assert np.abs(one - two).max() > 0.01


def test_a_row_beyond_the_position_table(params):
    assert CONFIG.max_length == 10
    with pytest.raises(ValueError, match="at most 10 tokens, got 11"):
        apply(CONFIG, params, *batch(11))
    longest = [0, 4, 5, 6, 7, 8, 9, 10, 11, 2]
    run = jax.jit(lambda params: apply(CONFIG, params, *map(jnp.asarray, batch(10, [longest]))).dense)
    # The last token reads the last row of the table: nothing is clamped before it.
    moved = jax.tree.map(np.array, params)
    moved["encoder"]["embeddings"]["position_embeddings"]["embedding"][11, 0] += 1.0
    assert np.abs(run(moved) - run(params)).max() > 1e-3


@pytest.mark.parametrize("id", [50, 1000, -51])
def test_an_id_past_the_vocabulary_gives_nan_and_no_other_tokens_row(params, id):
    ids, mask = batch(4, [[0, id, 2], [0, 7, 2]])
    got = forward(params, ids, mask)
    assert np.isnan(got.dense[0]).all()
    assert np.isfinite(got.dense[1]).all()


def test_bfloat16_matrices_and_a_float32_residual(params):
    ids, mask = batch(7)
    half = cast(params, jnp.bfloat16)
    assert {x.dtype.name for x in jax.tree.leaves(half) if x.ndim > 1} == {"bfloat16"}
    assert {x.dtype.name for x in jax.tree.leaves(half) if x.ndim == 1} == {"float32"}
    full, low = forward(params, ids, mask), forward(half, ids, mask)
    assert (low.dense.dtype, low.token_weights.dtype, low.colbert.dtype) == (jnp.float32,) * 3
    assert (full.dense * low.dense).sum(axis=1)[:3].min() > 0.999
    assert (full.colbert * low.colbert).sum(axis=2)[full.colbert_mask].min() > 0.998
    np.testing.assert_allclose(low.token_weights, full.token_weights, atol=0.05)

    def equations(jaxpr):
        yield from jaxpr.eqns
        for eqn in jaxpr.eqns:
            for inner in jaxprs_in_params(eqn.params):
                yield from equations(inner)

    eqns = list(equations(jax.make_jaxpr(forward)(half, ids, mask).jaxpr))
    products = [eqn for eqn in eqns if eqn.primitive.name == "dot_general"]
    assert {v.aval.dtype.name for eqn in products for v in eqn.invars} == {"bfloat16"}
    assert {v.aval.dtype.name for eqn in products for v in eqn.outvars} == {"float32"}
    sums = [eqn.outvars[0].aval for eqn in eqns if eqn.primitive.name in ("add", "div", "exp", "erf")]
    assert {aval.dtype.name for aval in sums if jnp.issubdtype(aval.dtype, jnp.floating)} == {"float32"}


def test_the_sizes_of_bge_m3():
    config = M3Config.bge_m3()
    tree = shapes(config)
    flat = flatten(tree)
    encoder = sum(x.size for path, x in flat.items() if path.startswith("encoder/"))
    assert encoder == 567_754_752  # PAPER §1, the pooler included
    assert {path: x.shape for path, x in flat.items() if path.startswith("heads/")} == {
        "heads/colbert_linear/bias": (1024,),
        "heads/colbert_linear/kernel": (1024, 1024),
        "heads/sparse_linear/bias": (1,),
        "heads/sparse_linear/kernel": (1024, 1),
    }
    assert {x.dtype.name for x in flat.values()} == {"float32"}
    ids, mask = (jax.ShapeDtypeStruct((2, 8192), dtype) for dtype in (jnp.int32, bool))
    one = dataclasses.replace(config, num_hidden_layers=1)  # more change no shape
    got = jax.eval_shape(lambda p, i, m: apply(one, p, i, m), shapes(one), ids, mask)
    assert {name: x.shape for name, x in vars(got).items()} == {
        "dense": (2, 1024),
        "token_ids": (2, 8192),
        "token_weights": (2, 8192),
        "colbert": (2, 8192, 1024),
        "colbert_mask": (2, 8192),
    }


def test_the_pooler_is_a_matter_of_the_config():
    with_pooler, without = (flatten(shapes(M3Config.tiny(num_hidden_layers=1, pooler=p))) for p in (True, False))
    assert with_pooler.keys() - without.keys() == {"encoder/pooler/kernel", "encoder/pooler/bias"}


def test_init():
    config = M3Config.tiny(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    draw = jax.jit(lambda key: init(config, key))
    params, other = (jax.tree.map(np.asarray, draw(jax.random.key(seed))) for seed in (0, 1))
    flat = flatten(params)
    for path, x in flat.items():
        kind = path.rpartition("/")[2]
        if kind == "bias":
            assert not x.any(), path
        elif kind == "scale":
            assert (x == 1).all(), path
        elif x.size > 500:
            std = config.initializer_range if kind == "embedding" else x.shape[0] ** -0.5
            assert abs(x.std() / std - 1) < 0.15, path
        if kind in ("kernel", "embedding"):
            assert (x != flatten(other)[path]).any(), path
    for table in ("word_embeddings", "position_embeddings"):
        rows = flat[f"encoder/embeddings/{table}/embedding"]
        assert not rows[1].any() and rows[0].any() and rows[2].any()
    kernels = [x for path, x in flat.items() if path.endswith("/kernel") and x.shape == (32, 32)]
    assert len({x.tobytes() for x in kernels}) == len(kernels)  # no two layers alike


def test_flatten_and_back(params):
    flat = flatten(params)
    assert "encoder/layers/0/attention_norm/scale" in flat and "heads/sparse_linear/bias" in flat
    back = unflatten(flat)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True))


def test_check_tree_lists_everything():
    expected = {"a/kernel": (2, 3), "b/bias": (3,), "c/bias": (4,)}
    check_tree({"a/kernel": (2, 3), "b/bias": (3,), "c/bias": (4,)}, expected, source="here")
    with pytest.raises(ValueError) as caught:
        check_tree(
            {"a/kernel": (3, 2), "c/bias": (4,), "d": (1,)}, expected, source="here", extra=["e"], name=str.upper
        )
    message = str(caught.value)
    for part in (
        "here: ",
        "4 are not",
        "missing: B/BIAS",
        "left over: D",
        "left over: e",
        "A/KERNEL is (3, 2), expected (2, 3)",
    ):
        assert part in message
    assert "C/BIAS" not in message


@pytest.fixture(scope="module")
def m3(tiny_tokenizer):
    config = M3Config.tiny(vocab_size=tiny_tokenizer.vocab_size)
    return M3(config, {"one": np.zeros((3, 4), np.float32)}, tiny_tokenizer)


def test_repr(m3):
    assert repr(m3) == "M3(2 layers × 64, 12 parameters, 126 tokens)"


def test_a_tokenizer_that_does_not_fit(m3, tiny_tokenizer):
    size = tiny_tokenizer.vocab_size
    with pytest.raises(ValueError, match=rf"ids up to {size - 1}, the table {size - 1} rows"):
        M3(M3Config.tiny(vocab_size=size - 1), m3.params, tiny_tokenizer)
    M3(M3Config.tiny(vocab_size=size + 1), m3.params, tiny_tokenizer)  # rows to spare are allowed
    with pytest.raises(ValueError, match=r"'eos': 3.*'unk': 2.*'eos': 2.*'unk': 3"):
        M3(M3Config.tiny(vocab_size=size, eos_token_id=3, unk_token_id=2), m3.params, tiny_tokenizer)


def test_tokens(m3, tiny_tokenizer):
    vocabulary = {piece: id for id in range(tiny_tokenizer.vocab_size) for piece in tiny_tokenizer.pieces([id])}
    starts, inside = vocabulary["▁a"], vocabulary["a"]
    weights = {str(inside): 0.25, str(starts): 0.5, str(tiny_tokenizer.mask_id): 0.125}
    readable = m3.tokens(weights)
    assert readable == {"▁a": 0.5, "a": 0.25, "<mask>": 0.125}
    assert list(readable) == ["▁a", "a", "<mask>"]  # heaviest first
    assert m3.tokens([weights, {}]) == [readable, {}]
    with pytest.raises(ValueError, match="has no piece"):
        m3.tokens({"100000": 1.0})


@pytest.mark.parametrize("layers", [1, 3])
def test_the_network_of_copied_layers_is_the_network(layers):
    """Its graph and shapes are traced with one layer and copied; the same as tracing all."""
    config = M3Config.tiny(num_hidden_layers=layers)
    graph, state = nnx.split(nnx.eval_shape(lambda: model.Network(config, nnx.Rngs(0))))
    assert model.abstract(model.Network, config)[0] == graph
    assert shapes(config) == nnx.to_pure_dict(state)
