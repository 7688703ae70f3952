"""Exact softmax attention by segment ids, in query blocks so that memory grows linearly with length.

Not here: projections (xlm_roberta.py) and any dropout on attention weights, which fused kernels do not have.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Queries per block: 512 × 8192 float32 scores of one head are 16 MiB, and 512 rows keep the matrix units busy
# (chosen on CPU: 3-4 times faster at length 2048 than the form that holds l × l).
_BLOCK = 512


def attention(
    q: Float[Array, "b l h k"], k: Float[Array, "b l h k"], v: Float[Array, "b l h k"], segments: Int[Array, "b l"]
) -> Float[Array, "b l h k"]:
    """softmax(q kᵀ / √k) v, each token over the tokens of its own segment; segment 0 is padding, whose rows are undefined.

    Scores and softmax are float32 whatever the inputs are; the result has q's dtype.
    """
    length = q.shape[1]
    if length <= _BLOCK:
        return _attend(q, k, v, segments, segments)
    blocks = -(-length // _BLOCK)
    fill = blocks * _BLOCK - length
    # Segment -1 for the queries that only fill the last block: they match nothing, and are cut off below.
    query_segments = jnp.pad(segments, ((0, 0), (0, fill)), constant_values=-1)
    query_segments = query_segments.reshape(-1, blocks, _BLOCK).swapaxes(0, 1)

    def one_head(qkv):
        q1, k1, v1 = qkv  # [b, l, k]
        q1 = jnp.pad(q1, ((0, 0), (0, fill), (0, 0))).reshape(q1.shape[0], blocks, _BLOCK, -1).swapaxes(0, 1)

        # Checkpointed: the backward pass computes a block's weights again instead of keeping l × l of them.
        @jax.checkpoint
        def one_block(block):
            q2, own = block
            return _attend(q2[:, :, None], k1[:, :, None], v1[:, :, None], own, segments)[:, :, 0]

        return jax.lax.map(one_block, (q1, query_segments))  # [blocks, b, _BLOCK, k]

    out = jax.lax.map(one_head, tuple(jnp.moveaxis(x, 2, 0) for x in (q, k, v)))  # [h, blocks, b, _BLOCK, k]
    heads, _, batch, _, width = out.shape
    return out.transpose(2, 1, 3, 0, 4).reshape(batch, blocks * _BLOCK, heads, width)[:, :length]


def _attend(q, k, v, query_segments, key_segments):
    """One block of queries against all keys."""
    scores = jnp.einsum("blhk,bmhk->bhlm", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    allowed = (query_segments[:, :, None] == key_segments[:, None, :]) & (key_segments[:, None, :] > 0)
    # A finite minimum, not -inf: a padding row attends to all alike instead of giving NaN to the gradients.
    scores = jnp.where(allowed[:, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bhlm,bmhk->blhk", weights, v, preferred_element_type=jnp.float32).astype(q.dtype)
