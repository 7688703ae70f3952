"""Fused attention kernels of TPU and GPU, placed on the mesh in context.

Which of them a backend takes, and the form without a kernel, are attention.py's.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from m3jax.sharding import BATCH

# Scores of one block of a splash kernel, float32 [block, block] a few times over, must fit into 16 MiB of vector memory: past
# 1024 the backward kernels do not compile.
_SPLASH_BLOCK = 1024
# Rows of TPU vectors: splash takes multiples of it.
_LANES = 128


def splash(
    q: Float[Array, "b l h k"],
    k: Float[Array, "b l h k"],
    v: Float[Array, "b l h k"],
    segments: Int[Array, "b l"],
    *,
    interpret: bool = False,
) -> Float[Array, "b l h k"]:
    """`attention` by Pallas splash attention on TPU; scores and softmax are float32.

    interpret: run it as plain JAX, on any backend.
    """
    return _on_mesh(functools.partial(_splash, interpret=interpret), q, k, v, segments)


def flash(
    q: Float[Array, "b l h k"],
    k: Float[Array, "b l h k"],
    v: Float[Array, "b l h k"],
    segments: Int[Array, "b l"],
    *,
    interpret: bool = False,
) -> Float[Array, "b l h k"]:
    """`attention` by Pallas's Triton kernel on GPU, for l that 64 divides; scores and softmax are float32.

    interpret: run it as plain JAX, on any backend.
    """
    return _on_mesh(functools.partial(_flash, interpret=interpret), q, k, v, segments)


def cudnn(
    q: Float[Array, "b l h k"], k: Float[Array, "b l h k"], v: Float[Array, "b l h k"], segments: Int[Array, "b l"]
) -> Float[Array, "b l h k"]:
    """`attention` by cuDNN on GPU, for bfloat16 and float16 and rows of one text each, which begins in column 0."""
    return _on_mesh(_cudnn, q, k, v, segments)


def _on_mesh(kernel: Callable[..., Array], q: Array, k: Array, v: Array, segments: Array) -> Array:
    """The kernel over the rows and heads of each device: the compiler cannot split a kernel by itself.

    An axis of the mesh that does not divide them computes the same as its neighbours, as XLA's own products would.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = [axis for axis in mesh.axis_names if axis not in mesh.manual_axes]
    if not free:
        return kernel(q, k, v, segments)

    def split(size: int, wanted: Any) -> tuple[str, ...]:
        taken: list[str] = []
        for axis in wanted:
            if axis in free and size % mesh.shape[axis] == 0:
                taken.append(axis)
                size //= mesh.shape[axis]
        return tuple(taken)

    rows, heads = split(q.shape[0], BATCH[0]), split(q.shape[2], ("tensor",))
    states = PartitionSpec(rows, None, heads, None)
    return jax.shard_map(
        kernel,
        in_specs=(states, states, states, PartitionSpec(rows, None)),
        out_specs=states,
        axis_names=set(free),
        check_vma=False,  # a Pallas call does not say over which axes its results vary
    )(q, k, v, segments)


def _splash(q: Array, k: Array, v: Array, segments: Array, *, interpret: bool) -> Array:
    # Imported where they are used: Pallas takes as long to import as jax itself.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, heads, width = q.shape[1:]
    # Few large blocks: a block of 128 has too little work to hide the step to the next. A row is filled up to whole ones.
    blocks = -(-length // _SPLASH_BLOCK)
    block = -(-length // (blocks * _LANES)) * _LANES
    filled = blocks * block
    sizes = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    mask = masks.MultiHeadMask([masks.FullMask((filled, filled))] * heads)

    def attend(q: Array, k: Array, v: Array, segments: Array) -> Array:
        kernel: Any = kernels.make_splash_mha_single_device(mask, block_sizes=sizes, interpret=interpret)
        # splash does not scale; q · 1/√64 loses nothing in bfloat16.
        return jax.vmap(kernel)(q * width**-0.5, k, v, kernels.SegmentIds(segments, segments))

    def by_head(x: Array) -> Array:  # [b, l, h, k] → [b, h, filled, k]
        return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, filled - length), (0, 0)))

    # Segment 0 is a segment like the others here: padding sees padding, and no softmax is over nothing.
    segments = jnp.pad(segments, ((0, 0), (0, filled - length)))
    run = attend if q.dtype == jnp.float32 else _rounded(attend)
    return run(by_head(q), by_head(k), by_head(v), segments)[:, :, :length].swapaxes(1, 2)


def _rounded(kernel: Callable[..., Array]) -> Callable[..., Array]:
    """The kernel with factors of products rounded to bfloat16, in its backward pass too, whatever the caller's precision.

    Callers set "highest" for the sake of what is float32. Mosaic does not compile products of bfloat16 under it ("Bad lhs
    type"), and splash's product of float32 weights with values turned into float32 would take six passes in place of one.
    """

    def at_default(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with jax.default_matmul_precision("default"):
                return function(*args)

        return call

    run = jax.custom_vjp(at_default(kernel))
    run.defvjp(at_default(functools.partial(jax.vjp, kernel)), at_default(lambda pull, gradient: pull(gradient)))
    return run


def _flash(q: Array, k: Array, v: Array, segments: Array, *, interpret: bool) -> Array:
    from jax.experimental.pallas.ops.gpu.attention import BlockSizes, mha

    # H100, 32 × 512 tokens, 16 heads of 64, ms: blocks of 64 × 128 by 4 warps 0.153, 64 × 64 0.155, 128 × 128 0.178.
    block = 128 if q.shape[1] % 128 == 0 else 64
    sizes = BlockSizes(64, block, block_q_dkv=32, block_kv_dkv=32, block_q_dq=32, block_kv_dq=32)  # backward: JAX's own
    scale = q.shape[-1] ** -0.5
    return mha(q, k, v, segments, sm_scale=scale, block_sizes=sizes, num_warps=4, interpret=interpret)


def _cudnn(q: Array, k: Array, v: Array, segments: Array) -> Array:
    real = (segments > 0)[:, :, None, None]
    # What cuDNN leaves at padding is not documented. Without padding on the way in and out, no NaN of it can reach a result or,
    # as the rule of `where` is symmetric, a gradient. A row of padding only counts as one token: no softmax is over nothing.
    q, k, v = (jnp.where(real, x, 0) for x in (q, k, v))
    lengths = jnp.maximum(real.sum(axis=(1, 2, 3), dtype=jnp.int32), 1)
    out = jax.nn.dot_product_attention(
        q, k, v, query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return jnp.where(real, out, 0)
