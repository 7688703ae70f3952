"""Dense, sparse, colbert and hybrid scores of all pairs of queries and passages, differentiable, on Representations.

Not here: losses (losses.py), and scores of encoded corpora (retrieval.py). No array has a vocabulary axis or both token
axes of all pairs: passages go through in blocks, which the backward pass computes again.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from m3jax.representations import Representations

# Elements of the largest array of one passage block, [q, i, block, j]: 64 MiB in float32.
_BLOCK_ELEMENTS = 1 << 24

# PAPER §1, eq. 1 (v4): weights of dense, sparse, colbert in training and on MIRACL and MKQA.
HYBRID_WEIGHTS = (1.0, 0.3, 1.0)


def dense_scores(queries: Float[Array, "q d"], passages: Float[Array, "p d"]) -> Float[Array, "q p"]:
    """⟨e_q, e_p⟩ of all pairs.

    >>> dense_scores(jnp.array([[1.0, 0.0]]), jnp.array([[0.6, 0.8], [0.0, 1.0]]))
    Array([[0.6, 0. ]], dtype=float32)
    """
    return jnp.einsum("qd,pd->qp", queries, passages, preferred_element_type=jnp.float32)


def term_weights(
    ids: Int[Array, "b l"], weights: Float[Array, "b l"]
) -> tuple[Int[Array, "b l"], Float[Array, "b l"]]:
    """One weight a term: the max over its tokens, at one slot of the term; every other slot weighs 0.

    Slots come back sorted by id. The gradient goes to the token that has the max (in equal parts to equal ones).

    >>> term_weights(jnp.array([[9, 5, 9]]), jnp.array([[0.1, 0.2, 0.3]]))
    (Array([[5, 9, 9]], dtype=int32), Array([[0.2, 0.3, 0. ]], dtype=float32))
    """
    order = jnp.argsort(ids, axis=1)
    ids = jnp.take_along_axis(ids, order, axis=1)
    weights = jnp.take_along_axis(weights, order, axis=1)
    first = jnp.concatenate([jnp.ones_like(ids[:, :1], bool), ids[:, 1:] != ids[:, :-1]], axis=1)
    run = jnp.cumsum(first, axis=1) - 1  # which run of equal ids a slot belongs to
    maxima = jax.vmap(lambda w, r: jax.ops.segment_max(w, r, num_segments=w.shape[0], indices_are_sorted=True))(
        weights, run
    )
    return ids, jnp.where(first, jnp.take_along_axis(maxima, run, axis=1), 0.0)


def sparse_scores(
    query_ids: Int[Array, "q i"],
    query_weights: Float[Array, "q i"],
    passage_ids: Int[Array, "p j"],
    passage_weights: Float[Array, "p j"],
) -> Float[Array, "q p"]:
    """Σ over shared terms of w_qt · w_pt for all pairs; a repeated term counts once, with its max.

    >>> sparse_scores(jnp.array([[5, 9]]), jnp.array([[2.0, 1.0]]), jnp.array([[9, 9]]), jnp.array([[0.5, 0.25]]))
    Array([[0.5]], dtype=float32)
    """
    query_ids, query_weights = term_weights(query_ids, query_weights)

    def block(ids, weights):
        same = query_ids[:, :, None, None] == ids
        return jnp.einsum("qi,qipj,pj->qp", query_weights, same.astype(weights.dtype), weights)

    return _by_passage_blocks(block, query_ids.size, term_weights(passage_ids, passage_weights))


def colbert_scores(
    queries: Float[Array, "q i c"],
    query_mask: Bool[Array, "q i"],
    passages: Float[Array, "p j c"],
    passage_mask: Bool[Array, "p j"],
) -> Float[Array, "q p"]:
    """Mean over query tokens of the max over passage tokens of ⟨E_q[i], E_p[j]⟩, for all pairs.

    Masked tokens take no part at all (the peer leaves zeros in their place, which floors the max at 0). A text without
    a single token scores 0 against everything.
    """
    tokens = jnp.maximum(query_mask.sum(axis=1), 1)

    def block(vectors, mask):
        similar = jnp.einsum("qic,pjc->qipj", queries, vectors, preferred_element_type=jnp.float32)
        best = jnp.where(mask, similar, -jnp.inf).max(axis=3)
        counts = query_mask[:, :, None] & mask.any(axis=1)
        return jnp.where(counts, best, 0.0).sum(axis=1) / tokens[:, None]

    return _by_passage_blocks(block, query_mask.size, (passages, passage_mask))


def hybrid_scores(
    dense: Float[Array, "*n"],
    sparse: Float[Array, "*n"],
    colbert: Float[Array, "*n"],
    weights: tuple[float, float, float] = HYBRID_WEIGHTS,
) -> Float[Array, "*n"]:
    """w1·dense + w2·sparse + w3·colbert, the weighted sum of PAPER §1.

    >>> hybrid_scores(jnp.array([0.5]), jnp.array([1.0]), jnp.array([0.25]))
    Array([1.05], dtype=float32)
    """
    return weights[0] * dense + weights[1] * sparse + weights[2] * colbert


def all_scores(
    queries: Representations, passages: Representations, weights: tuple[float, float, float] = HYBRID_WEIGHTS
) -> dict[str, Float[Array, "q p"]]:
    """The four score matrices of all pairs: dense, sparse, colbert, hybrid; float32."""
    dense = dense_scores(queries.dense, passages.dense)
    sparse = sparse_scores(queries.token_ids, queries.token_weights, passages.token_ids, passages.token_weights)
    colbert = colbert_scores(queries.colbert, queries.colbert_mask, passages.colbert, passages.colbert_mask)
    return {
        "dense": dense,
        "sparse": sparse,
        "colbert": colbert,
        "hybrid": hybrid_scores(dense, sparse, colbert, weights),
    }


def _by_passage_blocks(
    block: Callable[..., Array], query_tokens: int, passages: tuple[Array, Array]
) -> Float[Array, "q p"]:
    """block(passages of one block) → [q, block], over all passages, joined to [q, p]; memory is that of one block."""
    count, length = passages[0].shape[:2]
    size = max(1, min(count, _BLOCK_ELEMENTS // max(1, query_tokens * length)))
    # checkpoint inside the map: the backward pass keeps a block's inputs only.
    each = jax.checkpoint(lambda one: block(*(x[None] for x in one))[:, 0])
    if size == count:
        return jax.checkpoint(block)(*passages)
    return jax.lax.map(each, passages, batch_size=size).T
