"""Exact softmax attention by segment ids: the fastest form of each backend, in memory that grows linearly with length.

Not here: the kernels of GPU and TPU (kernels.py), projections (xlm_roberta.py), and any dropout on attention weights, which
fused kernels do not have.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from m3jax.kernels import cudnn, flash, splash

# Rows up to this long are computed at once, longer ones head by head in blocks of queries. Two CPU cores, 12 heads of 64, one
# row of 4096, microseconds a token in float32 and bfloat16, blocks of 64, 128, 256, 512: 169, 116, 121, 146 and 145, 106, 83,
# 81; all heads at once in blocks of 128: 177 and 138.
_WHOLE = 512
_BLOCK = 256
# Added to the scores of tokens that are not to be seen. Finite: a row of padding gets a mean instead of NaN.
_UNSEEN = -1e30


def attention(
    q: Float[Array, "b l h k"],
    k: Float[Array, "b l h k"],
    v: Float[Array, "b l h k"],
    segments: Int[Array, "b l"],
    *,
    packed: bool = True,
) -> Float[Array, "b l h k"]:
    """softmax(q kᵀ / √k) v, each token over the tokens of its own segment; segment 0 is padding, whose rows are undefined but
    finite.

    Scores and softmax are float32 whatever the inputs are; the result has q's dtype. packed: rows may hold several texts; False
    promises one text a row, from column 0 on, for which GPUs have a faster kernel. TPU: splash, for lengths that 128 divides.
    GPU: cuDNN, or for packed rows that 64 divides Pallas, both for halves. All else: blocks of queries, in JAX.
    """
    backend = platform()
    if backend == "tpu" and q.shape[1] % 128 == 0:
        return splash(q, k, v, segments)
    if backend == "gpu" and q.dtype.itemsize == 2 and q.shape[3] in (16, 32, 64, 128) and _gpu_has_kernels():
        if not packed:
            return cudnn(q, k, v, segments)
        if q.shape[1] % 64 == 0:
            return flash(q, k, v, segments)
    return _chunked(q, k, v, segments)


def platform() -> str:
    """What the program in hand is for: the platform of the mesh in context, whose devices this host need not have (a program
    can be compiled for another machine), else that of the default device."""
    config: Any = jax.config  # its attributes have no types
    device = jax.sharding.get_abstract_mesh().abstract_device or config.jax_default_device
    return getattr(device, "platform", device) or jax.default_backend()


@functools.cache
def _gpu_has_kernels() -> bool:
    """cuDNN's attention and Triton's products of halves need an NVIDIA GPU from Ampere (8.0) on, and cuDNN one in this host."""
    try:
        device = jax.local_devices(backend="gpu")[0]
    except RuntimeError:
        return False
    major = str(getattr(device, "compute_capability", "")).split(".")[0]
    return major.isdecimal() and int(major) >= 8  # AMD's are named gfx90a and the like


def _chunked(q: Array, k: Array, v: Array, segments: Array) -> Array:
    length = q.shape[1]
    if length <= _WHOLE:
        return _attend(q, k, v, segments, segments)
    blocks = -(-length // _BLOCK)
    fill = blocks * _BLOCK - length

    def in_blocks(x: Array) -> Array:  # [b, l, …] → [blocks, b, _BLOCK, …], filled up with segment 0
        x = jnp.pad(x, ((0, 0), (0, fill), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(-1, blocks, _BLOCK, *x.shape[2:]).swapaxes(0, 1)

    query_segments = in_blocks(segments)

    def one_head(qkv: tuple[Array, Array, Array]) -> Array:
        q1, k1, v1 = (x[:, :, None] for x in qkv)  # [b, l, 1, k]

        # Checkpointed: the backward pass computes a block's weights again instead of keeping l × l of them.
        @jax.checkpoint
        def one_block(block: tuple[Array, Array]) -> Array:
            return _attend(block[0], k1, v1, block[1], segments)[:, :, 0]

        return jax.lax.map(one_block, (in_blocks(q1), query_segments))  # [blocks, b, _BLOCK, k]

    out = jax.lax.map(one_head, tuple(jnp.moveaxis(x, 2, 0) for x in (q, k, v)))  # [h, blocks, b, _BLOCK, k]
    heads, _, batch, _, width = out.shape
    return out.transpose(2, 1, 3, 0, 4).reshape(batch, blocks * _BLOCK, heads, width)[:, :length]


def _attend(q: Array, k: Array, v: Array, query_segments: Array, key_segments: Array) -> Array:
    """One block of queries against all keys."""
    return attend(q, k, v, (query_segments[:, :, None] == key_segments[:, None, :]) & (key_segments[:, None, :] > 0))


def attend(
    q: Float[Array, "b l h k"], k: Float[Array, "b m h k"], v: Float[Array, "b m h k"], seen: Bool[Array, "b l m"]
) -> Float[Array, "b l h k"]:
    """softmax(q kᵀ / √k) v over what each query sees, all of it at once; finite where a query sees nothing."""
    scores = jnp.einsum("blhk,bmhk->bhlm", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    scores += jnp.where(seen, 0.0, _UNSEEN)[:, None]
    # The sum divides the result instead of the weights, which are l times as many: on CPU three to six times faster than
    # jax.nn.softmax before the product.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    mixed = jnp.einsum("bhlm,bmhk->bhlk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (mixed / weights.sum(axis=-1, keepdims=True)).swapaxes(1, 2).astype(q.dtype)
