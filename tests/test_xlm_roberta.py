import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

import m3jax.attention
import m3jax.xlm_roberta
from m3jax.config import M3Config
from m3jax.xlm_roberta import Encoder
from tests.arrays import from_numpy

positions_from_ids = from_numpy(m3jax.xlm_roberta.positions_from_ids)

# One layer does all that gradients are taken of here: they compile for seconds. Three are compared to the naive encoder.
SIZES = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
ONE, THREE = (
    M3Config.tiny(num_hidden_layers=layers, max_position_embeddings=40, pooler=False, **SIZES) for layers in (1, 3)
)


@functools.cache
def split(config):
    graph, state = nnx.split(nnx.eval_shape(lambda: Encoder(config, nnx.Rngs(0))))
    return graph, nnx.to_pure_dict(state)


def random_params(config):
    """Random everywhere, biases and LayerNorm too, and far from the small initial values, which attend to all alike."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), jnp.float32), split(config)[1])


@pytest.fixture(scope="module")
def params():
    return random_params(ONE)


def encode(params, ids, positions, segments, config=ONE, **options):
    return from_numpy(nnx.merge(split(config)[0], params))(ids, positions, segments, **options)


@jax.jit
def values_and_gradients(params, ids, positions, segments, direction):
    """Hidden states, and the gradient of Σ direction · hidden for every parameter."""

    def total(params):
        hidden = encode(params, ids, positions, segments)
        return (hidden * direction).sum(), hidden

    grads, hidden = jax.grad(total, has_aux=True)(params)
    return hidden, grads


def assert_same(got, expected, rtol=1e-4, atol=1e-4):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, expected)


def naive_encoder(params, ids):
    """XLM-RoBERTa of one text in float64, token by token and head by head, as its paper and PAPER §1 describe it."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    erf = np.vectorize(math.erf)

    def norm(x, layer):
        centred = x - x.mean()
        return centred / np.sqrt((centred**2).mean() + 1e-5) * layer["scale"] + layer["bias"]

    def linear(x, layer):
        return x @ layer["kernel"] + layer["bias"]

    tables = p["embeddings"]
    hidden, position = [], 1
    for token in ids:
        position += token != 1
        row = tables["position_embeddings"]["embedding"][position if token != 1 else 1]
        token_type = tables["token_type_embeddings"]["embedding"][0]
        hidden.append(norm(tables["word_embeddings"]["embedding"][token] + row + token_type, tables["layer_norm"]))
    for number in range(THREE.num_hidden_layers):
        layer = p["layers"][number]
        q, k, v = (np.stack([linear(x, layer[name]) for x in hidden]) for name in "qkv")
        after = []
        for i, x in enumerate(hidden):
            heads = []
            for h in range(THREE.num_attention_heads):
                own = slice(h * THREE.head_dim, (h + 1) * THREE.head_dim)
                scores = np.array([q[i, own] @ k[j, own] for j in range(len(ids))]) / math.sqrt(THREE.head_dim)
                weights = np.exp(scores - scores.max())
                heads.append(sum(w * v[j, own] for j, w in enumerate(weights / weights.sum())))
            x = norm(x + linear(np.concatenate(heads), layer["attention_out"]), layer["attention_norm"])
            up = linear(x, layer["up"])
            x = norm(x + linear(up * 0.5 * (1 + erf(up / math.sqrt(2))), layer["down"]), layer["output_norm"])
            after.append(x)
        hidden = after
    return np.stack(hidden)


TEXTS = ([0, 7, 8, 9, 2], [0, 30, 1, 31, 7, 7, 2], [0, 2], [0, 5, 6, 2])  # the second has a literal <pad>


def rows(texts, length, fill=1):
    """ids, positions and segments, one text a row."""
    ids = np.full((len(texts), length), fill, np.int32)
    segments = np.zeros((len(texts), length), np.int32)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text
        segments[row, : len(text)] = 1
    return ids, np.asarray(positions_from_ids(ids, 1)), segments


def test_positions():
    ids = np.random.default_rng(0).integers(0, 4, (5, 12))
    got = np.asarray(positions_from_ids(ids, 1))
    for row in range(5):
        for i in range(12):
            before = sum(1 for id in ids[row, : i + 1] if id != 1)
            assert got[row, i] == (1 if ids[row, i] == 1 else 1 + before)
    assert positions_from_ids(jnp.array([[0, 9, 7, 9, 2, 7]]), 7).tolist() == [[8, 9, 7, 10, 11, 7]]


def test_naive_encoder():
    ids, positions, segments = rows(TEXTS, 9)
    params = random_params(THREE)
    hidden = jax.jit(functools.partial(encode, config=THREE))(params, ids, positions, segments)
    assert hidden.dtype == jnp.float32
    for row, text in enumerate(TEXTS):
        np.testing.assert_allclose(hidden[row, : len(text)], naive_encoder(params, text), rtol=1e-4, atol=1e-5)


def test_padding_changes_nothing(params):
    ids, positions, segments = rows(TEXTS, 9)
    direction = np.random.default_rng(1).normal(size=(4, 9, 16)).astype(np.float32) * segments[..., None]
    hidden, grads = values_and_gradients(params, ids, positions, segments, direction)
    got, got_grads = values_and_gradients(params, *rows(TEXTS, 13), np.pad(direction, ((0, 0), (0, 4), (0, 0))))
    assert_same(got[:, :9][segments > 0], hidden[segments > 0])
    assert_same(got_grads, grads)
    # What stands in the padding does not matter either.
    got, got_grads = values_and_gradients(params, *rows(TEXTS, 9, fill=40), direction)
    assert_same(got[segments > 0], hidden[segments > 0])
    assert_same(got_grads, grads)


def test_packed_rows_are_separate_rows(params):
    ids, positions, segments = rows(TEXTS, 9)
    direction = np.random.default_rng(2).normal(size=(4, 9, 16)).astype(np.float32) * segments[..., None]
    hidden, grads = values_and_gradients(params, ids, positions, segments, direction)
    places = [(1, 0), (1, 5), (3, 0), (3, 2)]  # row and column of each text; the two other rows are all padding
    packed = [np.ones((4, 13), np.int32), np.ones((4, 13), np.int32), np.zeros((4, 13), np.int32)]
    packed_direction = np.zeros((4, 13, 16), np.float32)
    for text, (row, start) in enumerate(places):
        size = len(TEXTS[text])
        place = np.s_[row, start : start + size]
        for whole, part in zip(packed, (ids, positions, segments * (1 + text)), strict=True):
            whole[place] = part[text, :size]
        packed_direction[place] = direction[text, :size]
    got, got_grads = values_and_gradients(params, *packed, packed_direction)
    for text, (row, start) in enumerate(places):
        size = len(TEXTS[text])
        assert_same(got[row, start : start + size], hidden[text, :size])
    assert_same(got_grads, grads)


def test_remat_changes_nothing(params):
    ids, positions, segments = rows(TEXTS, 9)
    direction = np.random.default_rng(3).normal(size=(4, 9, 16)).astype(np.float32) * segments[..., None]

    def total(params, remat):
        return (encode(params, ids, positions, segments, remat=remat) * direction).sum()

    _, grads = values_and_gradients(params, ids, positions, segments, direction)
    kept = []
    for remat in ("elements", "all_but_products", "all"):
        assert_same(jax.jit(jax.grad(total), static_argnums=1)(params, remat), grads)
        residuals = jax.eval_shape(lambda params, remat=remat: jax.vjp(lambda p: total(p, remat), params)[1], params)
        kept.append(sum(x.size for x in jax.tree.leaves(residuals)))
    assert kept[0] == kept[1] > kept[2], kept  # the first two differ where attention is a kernel


def test_layers_one_after_the_other_are_the_loop(monkeypatch):
    """On GPU they are no loop; dropout tells whether each has its own keys."""
    params, keys = random_params(THREE), jax.random.split(jax.random.key(0), len(TEXTS))
    ids, positions, segments = rows(TEXTS, 9)
    direction = np.random.default_rng(3).normal(size=(4, 9, 16)).astype(np.float32) * segments[..., None]

    def total(params, remat):
        hidden = encode(params, ids, positions, segments, THREE, remat=remat, dropout=0.2, keys=keys)
        return (hidden * direction).sum()

    expected = jax.jit(jax.value_and_grad(total), static_argnums=1)(params, "elements")
    monkeypatch.setattr(m3jax.xlm_roberta, "platform", lambda: "gpu")
    for remat in ("elements", "all"):
        assert "scan" not in str(jax.make_jaxpr(total, static_argnums=1)(params, remat))
        assert_same(jax.jit(jax.value_and_grad(total), static_argnums=1)(params, remat), expected)


def test_remat_of_elements_keeps_what_the_kernel_of_attention_gave(monkeypatch):
    monkeypatch.setattr(m3jax.attention, "_gpu_has_kernels", lambda: True)
    config = M3Config.tiny(num_hidden_layers=1, max_position_embeddings=66, **SIZES | {"hidden_size": 32})
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params(config))
    ids = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    device = jax.sharding.AbstractDevice("some", None, "gpu")
    kernels = []
    for remat in ("elements", "all_but_products"):
        gradient = jax.grad(lambda p, *given, remat=remat: encode(p, *given, config, remat=remat).sum())
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)):
            kernels.append(str(jax.make_jaxpr(gradient)(half, ids, ids, ids)).count("pallas_call["))
    assert kernels[1] == kernels[0] + 1, kernels


def test_remat_of_elements_keeps_what_attention_gave_for_long_rows_on_cpu():
    config = M3Config.tiny(num_hidden_layers=1, max_position_embeddings=602, **SIZES)
    params, ids = random_params(config), jax.ShapeDtypeStruct((1, 600), jnp.int32)
    loops = []
    for remat in ("elements", "all_but_products"):
        gradient = jax.grad(lambda p, *given, remat=remat: encode(p, *given, config, remat=remat).sum())
        loops.append(str(jax.make_jaxpr(gradient)(params, ids, ids, ids)).count("scan["))
    assert loops[1] > loops[0], loops


def products_with_weights(jaxpr):
    """The matrix products of a jaxpr and of those inside it that have no batch dimensions, as attention's have."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general" and not eqn.params["dimension_numbers"][1][0]:
            yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from products_with_weights(inner)


@pytest.mark.parametrize(("platform", "result"), [("gpu", jnp.bfloat16), ("tpu", jnp.bfloat16), ("cpu", jnp.float32)])
def test_all_products_with_halves_are_of_halves(params, platform, result):
    """Backward too: a float32 gradient times halves is a product of float32, for which GPUs and TPUs have no matrix units."""
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    ids = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    device = jax.sharding.AbstractDevice("some", None, platform)
    gradient = jax.grad(lambda p, *given: encode(p, *given).sum())
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)):
        found = list(products_with_weights(jax.make_jaxpr(gradient)(half, ids, ids, ids).jaxpr))
    assert len(found) == 3 * 6  # of six kernels, forward and for both factors
    assert {v.aval.dtype for eqn in found for v in eqn.invars} == {jnp.dtype(jnp.bfloat16)}
    assert {eqn.outvars[0].aval.dtype for eqn in found} == {jnp.dtype(result)}


def test_dropout(params):
    ids, positions, segments = rows(TEXTS, 9)
    plain, _ = values_and_gradients(params, ids, positions, segments, np.ones((4, 9, 16), np.float32))

    run = jax.jit(
        lambda keys, rate: encode(params, ids, positions, segments, dropout=rate, keys=keys), static_argnums=1
    )
    one, two = (jax.random.split(jax.random.key(seed), len(ids)) for seed in (0, 1))
    assert_same(run(one, 0.0), plain, atol=1e-5)
    dropped = run(one, 0.3)
    np.testing.assert_array_equal(run(one, 0.3), dropped)
    assert np.abs(run(two, 0.3) - dropped).max() > 0.1
    assert np.abs(dropped - plain).max() > 0.1
    # What is dropped of a row is its key's doing: the rows beside it do not matter.
    np.testing.assert_allclose(run(one[::-1], 0.3)[0], run(jnp.stack([one[3], *two[1:]]), 0.3)[0], rtol=1e-5, atol=1e-5)


def test_dropout_keeps_the_mean():
    x = jnp.full((4, 50, 500), 3.0)
    dropped = np.asarray(m3jax.xlm_roberta.drop(x, 0.25, jax.random.split(jax.random.key(0), 4)))
    assert all((dropped[row] != dropped[0]).any() for row in (1, 2, 3))
    assert set(np.unique(dropped)) == {0.0, 4.0}
    assert abs(dropped.mean() - 3.0) < 5 * math.sqrt(3.0 / dropped.size)  # 5 standard errors: variance 4² · ¾ · ¼


def test_every_dropout_has_a_key_of_its_own(monkeypatch):
    used = []
    monkeypatch.setattr(m3jax.xlm_roberta, "drop", lambda x, rate, keys: used.append(jax.random.key_data(keys)) or x)

    monkeypatch.setattr(
        jax, "checkpoint", lambda run, **_: run
    )  # which would trace a layer, whose keys have no values then
    inputs, params = rows([[0, 2], [0, 2]], 2), random_params(THREE)
    with jax.disable_jit():  # a layer is traced once for all
        encode(params, *inputs, config=THREE, dropout=0.1, keys=jax.random.split(jax.random.key(0), 2))
    used = np.concatenate(used)
    assert len(np.unique(used, axis=0)) == len(used) == 2 * (1 + 2 * THREE.num_hidden_layers)
