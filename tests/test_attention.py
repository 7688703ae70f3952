import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr

import m3jax.attention
from tests.arrays import from_numpy

attention = from_numpy(m3jax.attention.attention)


def naive(q, k, v, segments):
    """softmax(q kᵀ / √k) v in float64, one query after another over the keys of its own segment; 0 where padding."""
    out = np.zeros(q.shape)
    for b, h, i in np.ndindex(q.shape[0], q.shape[2], q.shape[1]):
        if segments[b, i]:
            own = segments[b] == segments[b, i]
            scores = k[b, own, h].astype(np.float64) @ q[b, i, h] / np.sqrt(q.shape[3])
            weights = np.exp(scores - scores.max())
            out[b, i, h] = weights / weights.sum() @ v[b, own, h]
    return out


def naive_jax(q, k, v, segments):
    """The same with one full [b, h, l, l] array, for its gradient."""
    allowed = (segments[:, :, None] == segments[:, None, :]) & (segments[:, None, :] > 0)
    scores = jnp.einsum("blhk,bmhk->bhlm", q, k) / np.sqrt(q.shape[3])
    scores = jnp.where(allowed[:, None], scores, -1e9)
    return jnp.einsum("bhlm,bmhk->blhk", jax.nn.softmax(scores, axis=-1), v)


def inputs(length, batch=2, heads=2, width=4, seed=0):
    """q, k, v and segments: row 0 one text, row 1 three packed texts and padding, as far as the length goes."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(batch, length, heads, width)).astype(np.float32) for _ in range(3))
    segments = np.ones((batch, length), np.int32)
    cuts = [length // 4, length // 2, length - length // 8]
    for segment, start in enumerate(cuts, start=2):
        segments[1, start:] = segment % 4
    return 2 * q, k, v, segments


@pytest.mark.parametrize("length", [1, 511, 512, 513, 1030])
def test_naive_softmax(length):
    q, k, v, segments = inputs(length)
    real = segments > 0
    got = np.asarray(jax.jit(attention)(q, k, v, segments))
    np.testing.assert_allclose(got[real], naive(q, k, v, segments)[real], rtol=1e-5, atol=1e-6)
    assert np.isfinite(got).all()


@pytest.fixture(params=["whole", "in blocks"])
def blocks(request, monkeypatch):
    """Short rows computed at once, and as long ones are."""
    if request.param == "in blocks":
        monkeypatch.setattr(m3jax.attention, "_WHOLE", 0)
        monkeypatch.setattr(m3jax.attention, "_BLOCKS", (4, 3))
        monkeypatch.setattr(m3jax.attention, "_GRADIENT_BLOCKS", (3, 5))


@pytest.mark.parametrize("length", [2, 5, 12])
def test_values_and_gradients_are_those_of_the_full_array(length, blocks):
    q, k, v, segments = inputs(length, batch=3, width=3)
    seed = np.random.default_rng(1).normal(size=q.shape) * (segments > 0)[..., None, None]

    def total(attend):
        return lambda q, k, v: jnp.sum(attend(q, k, v, segments) * seed)

    value, grads = jax.jit(jax.value_and_grad(total(attention), argnums=(0, 1, 2)))(q, k, v)
    expected, expected_grads = jax.jit(jax.value_and_grad(total(naive_jax), argnums=(0, 1, 2)))(q, k, v)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for got, want in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_packed_texts_and_padding_see_only_themselves(blocks):
    q, k, v, segments = inputs(10)
    attend = jax.jit(lambda q, k, v: attention(q, k, v, segments))
    before = np.asarray(attend(q, k, v))
    for segment in (0, 1, 2, 3):
        other = (segments != segment)[..., None, None]
        after = np.asarray(attend(*(np.where(other, 1e3, x).astype(np.float32) for x in (q, k, v))))
        if segment:
            own = segments == segment
            np.testing.assert_allclose(after[own], before[own], rtol=1e-6)


def test_padding_has_no_gradient_and_no_nan(blocks):
    q, k, v, segments = inputs(10)
    segments[1] = 0  # a row of padding only
    segments[0, 7:] = 0
    real = (segments > 0)[..., None, None]
    grads = jax.jit(
        jax.grad(lambda q, k, v: jnp.sum(jnp.where(real, attention(q, k, v, segments), 0.0) ** 2), argnums=(0, 1, 2))
    )(q, k, v)
    for grad in map(np.asarray, grads):
        assert np.isfinite(grad).all()
        assert not grad[segments == 0].any()
        assert grad[segments > 0].any()


@pytest.mark.parametrize("length", [16, 600])
def test_half_precision_keeps_float32_scores(length):
    q, k, v, segments = inputs(length)
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (q * 8, k, v))
    got = jax.jit(attention)(q, k, v, segments)
    assert got.dtype == jnp.bfloat16
    expected = naive(*(np.asarray(x, np.float32) for x in (q, k, v)), segments)
    real = segments > 0
    # One rounding of the weights and one of the result; scores in bfloat16 would be 10 times further off.
    assert np.abs(np.asarray(got, np.float32) - expected)[real].max() < 0.02


def array_shapes(jaxpr):
    """Shapes of all arrays that a jaxpr makes, those of inner jaxprs included."""
    shapes = {v.aval.shape for eqn in jaxpr.eqns for v in eqn.outvars}
    return shapes.union(*(array_shapes(inner) for eqn in jaxpr.eqns for inner in jaxprs_in_params(eqn.params)))


def test_memory_is_linear_in_length():
    x = jax.ShapeDtypeStruct((1, 8192, 2, 64), jnp.bfloat16)
    segments = jax.ShapeDtypeStruct((1, 8192), jnp.int32)
    grad = jax.grad(lambda q, k, v, s: attention(q, k, v, s).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    jaxpr = jax.make_jaxpr(grad)(x, x, x, segments).jaxpr
    live, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    # The scores of one head's block of queries, not 8192 × 8192.
    assert max(map(math.prod, array_shapes(live))) == 1024 * 8192


@pytest.mark.parametrize(
    ("platform", "dtype", "length", "packed", "expected"),
    [
        ("tpu", jnp.bfloat16, 256, True, "splash"),
        ("tpu", jnp.float32, 128, False, "splash"),
        ("tpu", jnp.bfloat16, 200, True, "_chunked"),
        ("gpu", jnp.bfloat16, 200, False, "cudnn"),
        ("gpu", jnp.float16, 192, True, "flash"),
        ("gpu", jnp.bfloat16, 200, True, "_chunked"),
        ("gpu", jnp.float32, 256, False, "_chunked"),
        ("cpu", jnp.bfloat16, 256, False, "_chunked"),
        (None, jnp.bfloat16, 256, False, "_chunked"),
    ],
)
def test_the_backend_of_the_mesh_in_context_decides(platform, dtype, length, packed, expected, monkeypatch):
    called = []
    for name in ("splash", "flash", "cudnn", "_chunked"):
        monkeypatch.setattr(m3jax.attention, name, lambda q, *_, name=name: (called.append(name), q)[1])
    monkeypatch.setattr(m3jax.attention, "_gpu_has_kernels", lambda: True)
    x, segments = jax.ShapeDtypeStruct((2, length, 2, 64), dtype), jax.ShapeDtypeStruct((2, length), jnp.int32)
    device = platform and jax.sharding.AbstractDevice("some", None, platform)
    axes = ((), ()) if platform is None else ((2,), ("data",))
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh(*axes, abstract_device=device)):
        jax.eval_shape(lambda q, s: m3jax.attention.attention(q, q, q, s, packed=packed), x, segments)
    assert called == [expected]


@pytest.mark.parametrize(("capability", "expected"), [("9.0", True), ("7.5", False), ("gfx90a", False), (None, False)])
def test_a_gpu_without_the_kernels_gets_the_form_without(capability, expected, monkeypatch):
    """7.5 is older than Ampere, gfx90a AMD's; None: a program for a GPU that this host lacks, which cuDNN does not trace."""

    class Device:
        compute_capability = capability

    def local_devices(backend):
        if capability is None:
            raise RuntimeError("no GPU")
        return [Device()]

    monkeypatch.setattr(jax, "local_devices", local_devices)
    m3jax.attention._gpu_has_kernels.cache_clear()
    assert m3jax.attention._gpu_has_kernels() is expected
    m3jax.attention._gpu_has_kernels.cache_clear()
