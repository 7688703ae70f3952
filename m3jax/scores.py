"""Dense, sparse, colbert and hybrid scores of all pairs of queries and passages, differentiable, on Representations.

Not here: losses (losses.py), and scores of encoded corpora (retrieval.py). No array has a vocabulary axis or both token
axes of all pairs: passages go through in blocks, which the backward pass computes again.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from m3jax.losses import PARTS
from m3jax.representations import Representations
from m3jax.sharding import BATCH, STACKED, batch_groups, constrain, platform

# Elements of a passage block's largest array (colbert's [block, j, q, i]), 16 MiB in float32; where one passage has more of
# them, colbert goes through its tokens in parts.
# On two CPU cores (256 queries of 16 tokens × 256 passages of 16, width 128, with gradients) 2^18, 2^20, 2^22, 2^24 take
# 0.31, 0.20, 0.18, 0.21 s for colbert and 0.004, 0.002, 0.003, 0.003 s for sparse.
_BLOCK_ELEMENTS = 1 << 22

# PAPER §1, eq. 1 (v4): weights of dense, sparse, colbert in training and on MIRACL and MKQA.
HYBRID_WEIGHTS = (1.0, 0.3, 1.0)


def dense_scores(queries: Float[Array, "q d"], passages: Float[Array, "p d"]) -> Float[Array, "q p"]:
    """⟨e_q, e_p⟩ of all pairs.

    >>> dense_scores(jnp.array([[1.0, 0.0]]), jnp.array([[0.6, 0.8], [0.0, 1.0]]))
    Array([[0.6, 0. ]], dtype=float32)
    """
    return jnp.einsum("qd,pd->qp", queries, passages, preferred_element_type=jnp.float32)


def term_weights(ids: Int[Array, "b l"], weights: Float[Array, "b l"]) -> tuple[Int[Array, "b l"], Float[Array, "b l"]]:
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
    # A term's place is the first of its slots among the sorted ids of all queries; what no query has lies past the end. By
    # place a passage is one row of weights, from which each query takes those of its terms: memory is that of the tokens, and
    # not of all pairs of them, as where ids are compared.
    terms = jnp.sort(_everywhere(query_ids.reshape(-1)))
    query_places = jnp.searchsorted(terms, query_ids)
    passage_ids, passage_weights = term_weights(passage_ids, passage_weights)
    passage_places = jnp.searchsorted(terms, passage_ids)
    passage_places = jnp.where(terms[passage_places] == passage_ids, passage_places, terms.size)

    # checkpoint: the backward pass places the weights again instead of keeping every block's rows.
    @jax.checkpoint
    def block(passages):
        places, weights = map(_everywhere, passages)
        # By passage last, so that a query's term takes a stretch of memory and not single numbers.
        rows = jnp.zeros((terms.size, len(places)), weights.dtype)
        rows = rows.at[places, jnp.arange(len(places))[:, None]].add(weights, mode="drop")
        return jnp.einsum("qi,qip->pq", query_weights, rows[query_places])

    blocks = _Blocks(len(passage_ids), max(terms.size, passage_ids.shape[1]))
    given = blocks.split(passage_places), blocks.split(passage_weights)
    return blocks.join(jax.lax.map(block, given), _BY_QUERY).T


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
    return _colbert(_masked(queries, query_mask), query_mask, passages, passage_mask)


@jax.custom_vjp
def _colbert(queries: Array, query_mask: Array, passages: Array, passage_mask: Array) -> Array:
    return _colbert_forward(queries, query_mask, passages, passage_mask)[0]


def _colbert_forward(queries, query_mask, passages, passage_mask):
    """Scores, and for the backward pass which token of each passage was nearest: [p, q, i] instead of [q, i, p, j]."""
    share = _shares(query_mask)
    blocks = _Blocks(len(passages), query_mask.size * passages.shape[1])

    def part(found, some):
        best, nearest = found
        first, vectors, mask = some
        vectors = _masked(vectors, mask)  # of a part: a copy of all would be as large as what a batch keeps
        # In this order of axes it is one matrix product as the arrays lie, [p·j, c] × [c, q·i]; "pqij" takes twice as long.
        similar = jnp.einsum("pjc,qic->pjqi", vectors, queries, preferred_element_type=jnp.float32)
        similar = jnp.where(mask[:, :, None, None], similar, -jnp.inf)
        here = similar.max(axis=1)
        # Of equals the first, as argmax has it.
        nearest = jnp.where(here > best, first + similar.argmax(axis=1), nearest)
        return (jnp.maximum(best, here), nearest), None

    def block(one):
        vectors, mask = map(_everywhere, one)
        shape = (len(vectors), *query_mask.shape)
        nothing = (constrain(jnp.full(shape, -jnp.inf), STACKED), constrain(jnp.zeros(shape, int), STACKED))
        (best, nearest), _ = jax.lax.scan(part, nothing, blocks.token_parts(vectors, mask))
        # A passage without a token has no nearest one.
        best = jnp.where(mask.any(axis=1)[:, None, None], best, 0.0)
        return jnp.einsum("qi,pqi->pq", share, best), nearest

    scores, nearest = jax.lax.map(block, (blocks.split(passages), blocks.split(passage_mask)))
    return blocks.join(scores, _BY_QUERY).T, (queries, query_mask, passages, passage_mask, nearest)


def _colbert_backward(kept, gradient):
    """The gradient flows through the nearest tokens only. Against autodiff of the forward pass, which does it all again,
    this takes half the time (128 queries of 16 tokens × 128 passages of 48, width 256, two CPU cores)."""
    queries, query_mask, passages, passage_mask, nearest = kept
    share = _shares(query_mask)
    blocks = _Blocks(len(passages), query_mask.size * passages.shape[1])

    def block(to_queries, one):
        vectors, mask, near, given = one
        vectors, mask = map(_everywhere, (vectors, mask))
        given = jnp.where(mask.any(axis=1)[:, None], given, 0.0)[:, :, None] * share

        def part(to_queries, some):
            first, vectors, mask = some
            vectors = _masked(vectors, mask)
            tokens = first + jnp.arange(vectors.shape[1])[:, None, None]
            chosen = jnp.where(near[:, None] == tokens, given[:, None], 0.0)
            to_passages = jnp.einsum("pjqi,qic->pjc", chosen, queries, preferred_element_type=jnp.float32)
            to_queries += jnp.einsum("pjqi,pjc->qic", chosen, vectors, preferred_element_type=jnp.float32)
            return to_queries, constrain(to_passages.astype(vectors.dtype), BATCH)

        to_queries, to_passages = jax.lax.scan(part, to_queries, blocks.token_parts(vectors, mask))
        return to_queries, constrain(blocks.whole(to_passages, mask.shape[1]), BATCH)

    def block_in_place(sums, one):
        to_queries, stacked = sums
        number, *rest = one
        to_queries, to_passages = block(to_queries, (stacked[number], *rest))
        return (to_queries, constrain(stacked.at[number].set(to_passages), STACKED)), None

    nothing = constrain(jnp.zeros(queries.shape, jnp.float32), BATCH)
    stacked = blocks.split(passages)
    given = blocks.split(passage_mask), nearest, blocks.split(gradient.T, _BY_QUERY)
    if platform() == "tpu":
        # A block's gradient takes the place of its vectors, which nothing needs any more. XLA would hold three such arrays: the
        # zeros in which the forward pass stacks, as those of the backward pass too. On CPU it copies all blocks for each block
        # (RESULTS.md, "Training").
        numbers = jnp.arange(len(stacked))
        (to_queries, to_passages), _ = jax.lax.scan(block_in_place, (nothing, stacked), (numbers, *given))
    else:
        to_queries, to_passages = jax.lax.scan(block, nothing, (stacked, *given))
    return to_queries.astype(queries.dtype), None, blocks.join(to_passages), None


_colbert.defvjp(_colbert_forward, _colbert_backward)


def _masked(vectors: Array, mask: Array) -> Array:
    """Whatever stands at masked tokens, NaN included, must not reach a sum as 0 · NaN."""
    return jnp.where(mask[..., None], vectors, jnp.zeros((), vectors.dtype))


def _shares(query_mask: Array) -> Array:
    """[q, i]: what each token's max adds to the mean; 0 for masked tokens, and for all of a text without tokens."""
    return query_mask / jnp.maximum(query_mask.sum(axis=1, keepdims=True), 1)


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
    queries: Representations,
    passages: Representations,
    weights: tuple[float, float, float] = HYBRID_WEIGHTS,
    functions: Sequence[str] = PARTS,
) -> dict[str, Float[Array, "q p"]]:
    """The score matrices of all pairs, float32: dense, sparse, colbert, and hybrid, their weighted sum.

    functions: fewer of the three; the others are not computed, and the sum is over these. Of one alone there is no hybrid.
    """
    every = {
        "dense": lambda q, p: dense_scores(q.dense, p.dense),
        "sparse": lambda q, p: sparse_scores(q.token_ids, q.token_weights, p.token_ids, p.token_weights),
        "colbert": lambda q, p: colbert_scores(q.colbert, q.colbert_mask, p.colbert, p.colbert_mask),
    }
    scores = {name: every[name](queries, passages) for name in PARTS if name in functions}
    if len(scores) == 1:
        return scores
    zero = jnp.zeros(next(iter(scores.values())).shape)
    dense, sparse, colbert = (scores.get(name, zero) for name in PARTS)
    return scores | {"hybrid": hybrid_scores(dense, sparse, colbert, weights)}


class _Blocks:
    """Passages in blocks, one after another: [p, …] ↔ [n, passages of a block, …].

    Every device has as many of a block's passages as any other, and keeps its own, forward and backward, until a block's turn
    comes, when all get it: memory holds a block, not the passages of all devices. elements: what one passage adds to a block;
    where that is more than a block is to have, `token_parts` are of some of its tokens.
    """

    def __init__(self, count: int, elements: int):
        elements = max(1, elements)
        groups = batch_groups()
        self._groups = groups if count % groups == 0 else 1
        self._own = count // self._groups
        self._size = max(1, min(self._own, _BLOCK_ELEMENTS // elements))  # queries are split over devices too
        self._blocks = -(-self._own // self._size)
        self._token_parts = -(-elements // _BLOCK_ELEMENTS) if self._size == 1 else 1

    def split(self, x: Array, placed: PartitionSpec = STACKED) -> Array:
        own = x.reshape(self._groups, self._own, *x.shape[1:])
        filled = jnp.pad(own, [(0, 0), (0, self._blocks * self._size - self._own)] + [(0, 0)] * (x.ndim - 1))
        parts = filled.reshape(self._groups, self._blocks, self._size, *x.shape[1:]).swapaxes(0, 1)
        return constrain(parts.reshape(self._blocks, -1, *x.shape[1:]), placed)

    def join(self, blocks: Array, placed: PartitionSpec = STACKED) -> Array:
        blocks = constrain(blocks, placed)
        parts = blocks.reshape(self._blocks, self._groups, self._size, *blocks.shape[2:]).swapaxes(0, 1)
        own = parts.reshape(self._groups, self._blocks * self._size, *blocks.shape[2:])[:, : self._own]
        return own.reshape(-1, *blocks.shape[2:])

    def token_parts(self, vectors: Array, mask: Array) -> tuple[Array, Array, Array]:
        """Of a block's [p, j, c] and [p, j]: the first token of each part [n], and the parts, [n, p, tokens of a part, …]."""
        tokens = -(-mask.shape[1] // self._token_parts)
        count = -(-mask.shape[1] // tokens)
        fill = [(0, 0), (0, count * tokens - mask.shape[1])]
        vectors, mask = jnp.pad(vectors, [*fill, (0, 0)]), jnp.pad(mask, fill)
        return (
            jnp.arange(count) * tokens,
            vectors.reshape(len(mask), count, tokens, -1).swapaxes(0, 1),
            mask.reshape(len(mask), count, tokens).swapaxes(0, 1),
        )

    def whole(self, parts: Array, length: int) -> Array:
        """The inverse of `token_parts`, of vectors."""
        return parts.swapaxes(0, 1).reshape(parts.shape[1], -1, parts.shape[-1])[:, :length]


_BY_QUERY = PartitionSpec(None, None, *BATCH)  # [n, passages of a block, queries]: each device has its own queries


def _everywhere(x: Array) -> Array:
    return constrain(x, PartitionSpec())
