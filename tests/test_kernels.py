"""The kernels of TPU and GPU as plain JAX (Pallas interprets them) beside the chunked form; what compiles is in tests/tpu/."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import m3jax.kernels
from m3jax.attention import _chunked
from m3jax.kernels import cudnn, flash, splash
from tests.arrays import from_numpy

pytestmark = pytest.mark.usefixtures("compiled_quickly")


def inputs(length, width=16, dtype=np.float32):
    """q, k, v and segments: a row of one text, one of three packed texts and padding, one of padding only."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(3, length, 2, width)), dtype) for _ in range(3))
    segments = np.ones((3, length), np.int32)
    segments[1] = np.searchsorted([length // 3, length // 2, length - 40], np.arange(length), side="right") + 1
    segments[1, -40:] = segments[2] = 0
    return 2 * q, k, v, jnp.asarray(segments)


def values_and_gradients(attend, q, k, v, segments):
    """The result and the gradients of a sum over the real tokens, which padding must leave alone."""
    seed = np.random.default_rng(1).normal(size=q.shape) * (np.asarray(segments) > 0)[..., None, None]

    def total(q, k, v):
        out = attend(q, k, v, segments)
        return jnp.sum(out * seed), out

    gradients, out = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return [np.asarray(x, np.float32) for x in (out, *gradients)]


def interpreted(kernel):
    return lambda *arrays: kernel(*arrays, interpret=True)


# splash: two whole blocks; three that fill up 300 to 384; one of the row's own length. flash: blocks of 64 and of 128.
@pytest.mark.parametrize(
    ("kernel", "length", "block"),
    [(splash, 256, 128), (splash, 300, 128), (splash, 256, 1024), (flash, 192, None), (flash, 256, None)],
)
@pytest.mark.parametrize(("dtype", "close"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.02)])
def test_a_kernel_equals_the_chunked_form(kernel, length, block, dtype, close, monkeypatch):
    if block:
        monkeypatch.setattr(m3jax.kernels, "_SPLASH_BLOCK", block)
    given = inputs(length, dtype=dtype)
    with jax.default_matmul_precision("highest"):
        found = values_and_gradients(interpreted(kernel), *given)
        expected = values_and_gradients(_chunked, *given)
    real = np.asarray(given[3]) > 0
    for got, want in zip(found, expected, strict=True):
        assert np.isfinite(got).all()
        # Relative to the largest number: a gradient sums up to `length` of them.
        np.testing.assert_allclose(got[real], want[real], atol=close * np.abs(want[real]).max(), rtol=0)
    for gradient in found[1:]:
        assert not gradient[~real].any()


def xla_for_cudnn(attend):
    """`jax.nn.dot_product_attention` by XLA in place of cuDNN, which leaves what is past the lengths open."""

    @jax.custom_vjp
    def open_gradient(x, there):
        return x

    open_gradient.defvjp(
        lambda x, there: (x, there), lambda there, gradient: (jnp.where(there, gradient, jnp.nan), None)
    )

    def call(q, k, v, *, query_seq_lengths, key_value_seq_lengths, implementation):
        assert implementation == "cudnn"
        there = jnp.arange(q.shape[1])[:, None, None] < query_seq_lengths[:, None, None, None]
        q, k, v = (open_gradient(x, there) for x in (q, k, v))
        out = attend(q, k, v, query_seq_lengths=query_seq_lengths, key_value_seq_lengths=key_value_seq_lengths)
        return jnp.where(there, out, jnp.nan)

    return call


def test_cudnn_sees_the_lengths_of_texts_and_leaves_no_nan(monkeypatch):
    q, k, v, segments = inputs(32)
    segments = segments.at[1].set(jnp.arange(32) < 20)
    monkeypatch.setattr(jax.nn, "dot_product_attention", xla_for_cudnn(jax.nn.dot_product_attention))
    found = values_and_gradients(cudnn, q, k, v, segments)
    expected = values_and_gradients(_chunked, q, k, v, segments)
    real = np.asarray(segments) > 0
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(got[real], want[real], atol=2e-6 * np.abs(want[real]).max(), rtol=0)
        assert np.isfinite(got).all()


def test_products_of_bfloat16_are_not_taken_six_times():
    """Under "highest", splash's own product of float32 weights and values would be; in the backward pass too."""
    q, k, v, segments = inputs(128, dtype=jnp.bfloat16)

    def gradients(dtype):
        some = (x.astype(dtype) for x in (q, k, v))
        attend = from_numpy(lambda *arrays: splash(*arrays).astype(jnp.float32).sum())
        with jax.default_matmul_precision("highest"):
            return str(jax.make_jaxpr(jax.grad(attend, argnums=(0, 1, 2)))(*some, segments))

    # The sum of out · gradient that the backward pass begins with is plain JAX and of float32.
    assert gradients(jnp.bfloat16).count("HIGHEST") <= 1
    assert gradients(jnp.float32).count("HIGHEST") > 10


@pytest.mark.parametrize("rows", [4, 3])
def test_on_a_mesh_each_device_has_its_rows_and_heads(rows):
    """Traced only: which array each device gets; 3 rows are whole on all, as no axis divides them."""
    axes = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.sharding.AbstractMesh((2, 2, 2), ("data", "fsdp", "tensor"), axes)
    x, segments = jax.ShapeDtypeStruct((rows, 128, 4, 16), jnp.float32), jax.ShapeDtypeStruct((rows, 128), jnp.int32)
    with jax.sharding.use_abstract_mesh(mesh):
        jaxpr = jax.make_jaxpr(splash)(x, x, x, segments).jaxpr
    (mapped,) = (eqn for eqn in jaxpr.eqns if eqn.primitive.name == "shard_map")
    assert [v.aval.shape for v in mapped.params["jaxpr"].invars[-4:]] == [  # before them: splash's tables of the mask
        *[(1 if rows == 4 else 3, 128, 2, 16)] * 3,
        (1 if rows == 4 else 3, 128),
    ]
