import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from m3jax.config import M3Config
from m3jax.heads import Heads, normalize
from tests.arrays import from_numpy

CONFIG = M3Config.tiny(hidden_size=16, colbert_dim=6, cls_token_id=0, pad_token_id=1, eos_token_id=2, unk_token_id=3)


@pytest.fixture(scope="module")
def heads():
    """Heads with random parameters, the biases too, as (parameters, function)."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Heads(CONFIG, nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), nnx.to_pure_dict(state))
    return params, from_numpy(lambda params, *args: nnx.merge(graph, params)(*args))


def test_formulas(heads):
    rng = np.random.default_rng(1)
    hidden = rng.normal(size=(3, 7, 16)).astype(np.float32)
    ids = np.array([[0, 9, 5, 9, 3, 2, 1], [0, 7, 0, 1, 2, 2, 1], [0, 2, 1, 1, 1, 1, 1]])
    mask = np.array([[1] * 6 + [0], [1] * 6 + [0], [1, 1] + [0] * 5], bool)
    params, run = heads
    got = jax.tree.map(np.asarray, jax.jit(run)(params, hidden, ids, mask))
    sparse, colbert = params["sparse_linear"], params["colbert_linear"]
    for b in range(3):
        np.testing.assert_allclose(got.dense[b], hidden[b, 0] / np.linalg.norm(hidden[b, 0]), rtol=1e-5)
        for i in range(7):
            weight = max(0.0, (hidden[b, i] @ sparse["kernel"] + sparse["bias"]).item())
            if not mask[b, i] or ids[b, i] in (0, 1, 2, 3):
                weight = 0.0
            np.testing.assert_allclose(got.token_weights[b, i], weight, rtol=1e-4, atol=1e-6)
            vector = hidden[b, i] @ colbert["kernel"] + colbert["bias"]
            np.testing.assert_allclose(got.colbert[b, i], vector / np.linalg.norm(vector), rtol=1e-4, atol=1e-6)
            assert got.colbert_mask[b, i] == (
                mask[b, i] and i > 0
            )  # by place: a literal <s> in a text keeps its vector
    assert (got.token_weights > 0).any()
    np.testing.assert_array_equal(got.token_ids, ids)
    assert got.colbert.shape == (3, 7, 6)


def test_padding_has_no_gradient(heads):
    params, run = heads
    params = params | {"sparse_linear": params["sparse_linear"] | {"bias": np.float32([9.0])}}  # no relu shut
    hidden = np.random.default_rng(2).normal(size=(2, 5, 16)).astype(np.float32)
    ids = np.array([[0, 9, 5, 2, 1], [0, 2, 1, 1, 1]])

    @jax.jit
    @jax.value_and_grad
    def total(both):
        got = run(*both, ids, jnp.asarray(ids != 1))
        return (
            got.dense.sum() + got.token_weights.sum() + jnp.where(got.colbert_mask[..., None], got.colbert**3, 0).sum()
        )

    value, (to_params, to_hidden) = total((params, hidden))
    assert not to_hidden[ids == 1].any() and to_hidden[ids != 1].any(axis=1).all()
    assert all(np.isfinite(x).all() and x.any() for x in jax.tree.leaves(to_params))
    hidden[ids == 1] = 0  # normalising a zero vector is no NaN either
    same, grads = total((params, hidden))
    assert same == value
    jax.tree.map(np.testing.assert_array_equal, grads, (to_params, to_hidden))


def test_special_ids_come_from_the_config(heads):
    config = M3Config.tiny(hidden_size=16, cls_token_id=10, pad_token_id=4, eos_token_id=11, unk_token_id=12)
    graph = nnx.split(nnx.eval_shape(lambda: Heads(config, nnx.Rngs(0))))[0]
    params, _ = heads
    params = params | {"sparse_linear": params["sparse_linear"] | {"bias": np.float32([5.0])}}
    ids = np.array([[10, 0, 1, 2, 3, 4, 12, 11]])
    run = jax.jit(lambda *args: nnx.merge(graph, params)(*args).token_weights)
    weights = run(np.zeros((1, 8, 16), np.float32), ids, np.ones((1, 8), bool))
    assert weights.tolist() == [[0, 5, 5, 5, 5, 0, 0, 0]]


def test_normalize_a_zero_vector():
    x = jnp.zeros((2, 3)).at[0].set(jnp.array([0.0, 3.0, 4.0]))
    value, pull = jax.vjp(jax.jit(normalize), x)
    np.testing.assert_allclose(value, [[0, 0.6, 0.8], [0, 0, 0]], rtol=1e-6)
    (grad,) = pull(jnp.tile(jnp.array([1.0, 2.0, 3.0]), (2, 1)))
    # d⟨g, x/‖x‖⟩ = (g − ⟨g, u⟩u) / ‖x‖
    u, g = np.array([0, 0.6, 0.8]), np.array([1.0, 2.0, 3.0])
    np.testing.assert_allclose(grad[0], (g - (g @ u) * u) / 5, rtol=1e-5, atol=1e-7)
    assert np.isfinite(grad).all()


def test_parts_that_are_not_used_cost_nothing(heads):
    params, run = heads
    x = jax.ShapeDtypeStruct((2, 64, 16), jnp.float32)
    ids, mask = jax.ShapeDtypeStruct((2, 64), jnp.int32), jax.ShapeDtypeStruct((2, 64), bool)

    def flops(part):
        one = jax.jit(lambda *args: getattr(run(*args), part))
        return one.lower(params, x, ids, mask).compile().cost_analysis()["flops"]

    assert flops("colbert") > 2 * 2 * 64 * 16 * 6
    assert flops("dense") < 1000
