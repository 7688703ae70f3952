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
from m3jax.sharding import platform

# Rows up to this long are computed at once, longer ones head by head in blocks of queries and keys. Two CPU cores, 12 heads of
# 64, float32, one row of 4096 and of 7936 tokens, microseconds a token in blocks of 2048 × 512, 1024 × 256, 512 × 512, 256 ×
# all, in turns (tests/benchmarks/layers.py): 84, 92, 92, 87 and 166, 173, 179, 172; with the gradient 410, 411, 453, 430 and
# 701, 767, 758, 783. Blocks with a gradient keep [queries, l], so these are smaller.
_WHOLE = 512
_BLOCKS = (2048, 512)
_GRADIENT_BLOCKS = (1024, 256)
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
    GPU: cuDNN, or for packed rows that 64 divides Pallas, both for halves. All else: blocks of queries and keys, in JAX.
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
    if q.shape[1] <= _WHOLE:
        return attend(q, k, v, _seen(segments, segments))
    return _blockwise(q, k, v, segments)


@jax.custom_vjp
def _blockwise(q: Array, k: Array, v: Array, segments: Array) -> Array:
    """For long rows. Its own gradient, because smaller blocks keep less, and because a layer that is computed again need
    not attend again: `KEPT` of xlm_roberta.py knows a result by custom_vjp."""
    return _head_by_head(q, k, v, segments, _BLOCKS)


def _blockwise_forward(*given: Array) -> tuple[Array, tuple[Array, ...]]:
    return _blockwise(*given), given


def _blockwise_backward(given: tuple[Array, ...], gradient: Array) -> tuple[Any, ...]:
    q, k, v, segments = given
    pull = jax.vjp(lambda q, k, v: _head_by_head(q, k, v, segments, _GRADIENT_BLOCKS), q, k, v)[1]
    return *pull(gradient), None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


def _head_by_head(q: Array, k: Array, v: Array, segments: Array, sizes: tuple[int, int]) -> Array:
    """Attention in equal blocks of at most so many queries and keys."""
    length = q.shape[1]
    of_queries, of_keys = (-(-length // -(-length // size)) for size in sizes)
    own, others = _in_blocks(segments, of_queries), _in_blocks(segments, of_keys)

    def one_head(qkv: tuple[Array, Array, Array]) -> Array:
        q, k, v = qkv  # [b, l, k]
        keys = (_in_blocks(k, of_keys), _in_blocks(v, of_keys), others)

        # Checkpointed: the backward pass computes a block's weights again instead of keeping l × l of them.
        @jax.checkpoint
        def one_block(block: tuple[Array, Array]) -> Array:
            return _one_block(block[0], block[1], keys)

        return jax.lax.map(one_block, (_in_blocks(q, of_queries), own))  # [blocks, b, queries, k]

    by_head = jnp.moveaxis(q, 2, 0), jnp.moveaxis(k, 2, 0), jnp.moveaxis(v, 2, 0)
    out = jax.lax.map(one_head, by_head)  # [h, blocks, b, queries, k]
    return out.transpose(2, 1, 3, 0, 4).reshape(len(q), -1, *q.shape[2:])[:, :length]


def _one_block(q: Array, own: Array, keys: tuple[Array, Array, Array]) -> Array:
    """One head's block of queries against all keys, block by block, with a running maximum and sum, which are scaled again
    where a higher score comes (Rabe & Staats 2021, arXiv:2112.05682)."""

    def add(
        sums: tuple[Array, Array, Array], block: tuple[Array, Array, Array]
    ) -> tuple[tuple[Array, Array, Array], None]:
        (highest, total, mixed), (k, v, others) = sums, block
        scores = jnp.einsum("blk,bmk->blm", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        scores += jnp.where(_seen(own, others), 0.0, _UNSEEN)
        higher = jax.lax.stop_gradient(jnp.maximum(highest, scores.max(axis=-1)))
        weights, before = jnp.exp(scores - higher[..., None]), jnp.exp(highest - higher)
        more = jnp.einsum("blm,bmk->blk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (higher, before * total + weights.sum(axis=-1), before[..., None] * mixed + more), None

    nothing = (jnp.full(own.shape, -jnp.inf), jnp.zeros(own.shape), jnp.zeros(q.shape))
    (_, total, mixed), _ = jax.lax.scan(add, nothing, keys)
    return (mixed / total[..., None]).astype(q.dtype)


def _in_blocks(x: Array, size: int) -> Array:
    """[b, l, …] → [blocks, b, size, …], filled up with zeros, segments with padding."""
    blocks = -(-x.shape[1] // size)
    x = jnp.pad(x, ((0, 0), (0, blocks * size - x.shape[1]), *((0, 0),) * (x.ndim - 2)))
    return x.reshape(-1, blocks, size, *x.shape[2:]).swapaxes(0, 1)


def _seen(own: Int[Array, "b l"], others: Int[Array, "b m"]) -> Bool[Array, "b l m"]:
    """Which of the keys each query sees, by their segments."""
    return (own[:, :, None] == others[:, None, :]) & (others[:, None, :] > 0)


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
