"""Score and search Embeddings by the paper's functions (arXiv:2402.03216 §2.2, §4.1), exactly and block by block.

Not here: the scores of one part (pairs.py), those inside a loss, with gradients (scores.py), making Embeddings (embedder.py).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int

from m3jax.arguments import whole_number
from m3jax.embeddings import Embeddings
from m3jax.pairs import BLOCKS, PAIRS, Block

Function = Literal["dense", "sparse", "colbert", "dense+sparse", "all"]
FUNCTIONS: tuple[Function, ...] = get_args(Function)


@dataclass(frozen=True, eq=False)
class Scores:
    """What `score` returns: float32 arrays [n_queries, n_passages], or [n] with pairwise; None where a side lacks it."""

    dense: np.ndarray | None
    sparse: np.ndarray | None
    colbert: np.ndarray | None
    hybrid: np.ndarray | None


@dataclass(frozen=True, eq=False)
class SearchResults:
    """What `search` returns: the best passages of each query, best first.

    Attributes:
      indices: [n_queries, k] int64 rows of the passages; -1 where a query has fewer than k hits.
      scores: [n_queries, k] float32; -inf where a query has fewer than k hits.
    """

    indices: np.ndarray
    scores: np.ndarray


def score(
    queries: Embeddings,
    passages: Embeddings,
    *,
    weights: tuple[float, float, float] = (1.0, 0.3, 1.0),
    pairwise: bool = False,
) -> Scores:
    """Scores of all pairs of queries and passages, or with pairwise of query i and passage i, by every function.

    dense is the inner product, sparse the sum over shared terms of the products of their weights, colbert the mean over
    the query's vectors of the maximum over the passage's of the inner product, and hybrid the weighted SUM of the three
    (paper, equation 1). FlagEmbedding's compute_score divides that sum by the sum of the weights; this does not.

    Args:
      queries, passages: what `encode` returned; a single text counts as one row.
      weights: of dense, sparse and colbert in hybrid.
      pairwise: score query i with passage i only, without an n x n array.

    Returns:
      Scores, each [n_queries, n_passages] (pairwise: [n]). A part that a side lacks is None, and so is hybrid if that
      part has a weight other than 0.

    Raises:
      ValueError: where one side only has a part whose weight is not 0, widths or vocabularies differ, all weights are 0,
        or with pairwise the numbers of texts differ.

    >>> queries = Embeddings(dense=np.array([[1, 0]], np.float32))
    >>> passages = Embeddings(dense=np.array([[0.6, 0.8], [1, 0]], np.float32))
    >>> score(queries, passages, weights=(1, 0, 0)).dense
    array([[0.6, 1. ]], dtype=float32)
    """
    _check_weights("score", weights)
    if pairwise and len(queries) != len(passages):
        raise ValueError(
            f"score: pairwise needs as many queries as passages, got {len(queries)} and {len(passages)}; leave pairwise"
            " out to score all pairs."
        )
    parts: dict[str, np.ndarray | None] = {}
    hybrid = None
    for name, weight in zip(_FIELDS, weights, strict=True):
        sides, lacking = _sides("score", name, queries, passages)
        if len(lacking) == 1 and weight != 0:
            raise ValueError(
                f"score: {name} has weight {weight} but the {lacking[0]} lack it; encode them with {name}=True too, or"
                f" give {name} weight 0."
            )
        if lacking:
            parts[name] = None
        elif pairwise:
            rows = np.arange(len(queries))
            parts[name] = PAIRS[name](*sides, rows, rows)
        else:
            parts[name] = _all_pairs(BLOCKS[name](*sides), len(queries), len(passages))
    weighted = [(parts[name], np.float32(weight)) for name, weight in zip(_FIELDS, weights, strict=True) if weight != 0]
    if not any(part is None for part, _ in weighted):
        hybrid = np.sum([weight * part for part, weight in weighted if part is not None], axis=0)
    return Scores(dense=parts["dense"], sparse=parts["sparse"], colbert=parts["colbert"], hybrid=hybrid)


def search(
    queries: Embeddings,
    passages: Embeddings,
    *,
    by: Function = "dense",
    k: int = 10,
    weights: tuple[float, float, float] | None = None,
    candidates: int = 1000,
    rerank: int = 200,
) -> SearchResults:
    """The k best passages of each query by one of the paper's five functions (§4.1), exact, block by block.

    dense and sparse rank all passages; sparse retrieves only passages with a score above 0. dense+sparse ranks the union
    of the best `candidates` passages of each by their weighted sum, to which one that did not retrieve a passage gives 0.
    colbert and all rank dense's best `rerank` passages, by the colbert score and by the weighted sum of all three. Of
    equal scores, the lower row of the passages comes first.

    Args:
      queries, passages: what `encode` returned, with the parts that the function needs; a single text is one row.
      by: the function.
      k: hits per query; no more come back than there are passages.
      weights: of dense, sparse and colbert; only for dense+sparse (default 1, 0.3, 0; the third must be 0) and for all
        (default 1, 0.3, 1), which does not need a part of weight 0, but for dense, because dense retrieves.
      candidates: how many passages each of dense and sparse retrieves for dense+sparse.
      rerank: how many of dense's passages colbert and all rank again.

    Returns:
      SearchResults of shape [n_queries, min(k, n_passages)].

    Raises:
      ValueError: where `by` is unknown, a part that it needs is missing, widths or vocabularies differ, a count is below
        1, or min(k, n_passages) is more than what is ranked: `candidates` (dense+sparse) or `rerank` (colbert, all).

    >>> queries = Embeddings(dense=np.array([[1, 0]], np.float32))
    >>> passages = Embeddings(dense=np.array([[0.6, 0.8], [1, 0]], np.float32))
    >>> search(queries, passages, by="dense", k=2).indices
    array([[1, 0]])
    """
    if by not in FUNCTIONS:
        raise ValueError(f"search: by must be one of {', '.join(map(repr, FUNCTIONS))}, got {by!r}.")
    for name, count in {"k": k, "candidates": candidates, "rerank": rerank}.items():
        if whole_number(f"search: {name}", count) < 1:
            raise ValueError(f"search: {name} must be at least 1, got {count}.")
    weights = _search_weights(by, weights)
    k = min(k, len(passages))
    needed, limit_name, limit = {
        "dense": (["dense"], "k", k),
        "sparse": (["sparse"], "k", k),
        "dense+sparse": (["dense", "sparse"], "candidates", candidates),
        "colbert": (["dense", "colbert"], "rerank", rerank),
        "all": (["dense", "sparse", "colbert"], "rerank", rerank),
    }[by]
    if k > limit:
        raise ValueError(
            f"search: by={by!r} ranks only what it retrieved, {limit_name}={limit} passages, and cannot give the best"
            f" k={k}; pass {limit_name}={k} or more, or a smaller k."
        )
    if by == "all":  # dense retrieves, whatever its weight
        needed = [name for name, weight in zip(_FIELDS, weights, strict=True) if name == "dense" or weight != 0]
    parts = {name: _needed(by, name, queries, passages) for name in needed}

    def retrieve(name: str) -> "Hits":
        return _top_k(BLOCKS[name](*parts[name]), len(queries), len(passages), min(limit, len(passages)), _FLOOR[name])

    if by in ("dense", "sparse"):
        return SearchResults(*retrieve(by))
    if by == "dense+sparse":
        return SearchResults(*_best(*_union(retrieve("dense"), retrieve("sparse"), weights), k))
    indices, dense_scores = retrieve("dense")
    pairs = np.repeat(np.arange(len(queries)), indices.shape[1]), indices.ravel()
    if by == "colbert":
        weights = (0.0, 0.0, 1.0)
    scores = np.float32(weights[0]) * dense_scores
    for name, weight in zip(_FIELDS, weights, strict=True):
        if name != "dense" and weight != 0:
            scores += np.float32(weight) * PAIRS[name](*parts[name], *pairs).reshape(scores.shape)
    return SearchResults(*_best(indices, scores, k))


# What encode is asked for -> the field of Embeddings that holds it, in the order of the weights.
_FIELDS = {"dense": "dense", "sparse": "terms", "colbert": "colbert"}
# A passage is retrieved by a score above this: a passage that shares no term with the query is no lexical hit.
_FLOOR = {"dense": -np.inf, "sparse": 0.0}


def _check_weights(caller: str, weights: tuple[float, float, float]) -> None:
    try:
        sound = len(weights) == 3 and all(map(math.isfinite, weights)) and any(weights)
    except TypeError:
        sound = False
    if not sound:
        raise ValueError(
            f"{caller}: weights must be three finite numbers (dense, sparse, colbert), not all 0, got {weights}."
        )


def _search_weights(by: Function, weights: tuple[float, float, float] | None) -> tuple[float, float, float]:
    if weights is None:
        return (1.0, 0.3, 0.0) if by == "dense+sparse" else (1.0, 0.3, 1.0)
    if by not in ("dense+sparse", "all"):
        raise ValueError(
            f"search: weights are for by='dense+sparse' and by='all', got {weights} with by={by!r}; leave them out."
        )
    _check_weights("search", weights)
    if by == "dense+sparse" and weights[2] != 0:
        raise ValueError(
            f"search: by='dense+sparse' has no colbert part, so the third weight must be 0, got {weights}; use by='all'"
            " for all three."
        )
    return weights


def _sides(caller: str, name: str, queries: Embeddings, passages: Embeddings) -> tuple[tuple[Any, Any], list[str]]:
    """The part of both, and the names of those that lack it; ValueError if their widths differ."""
    sides = {"queries": getattr(queries, _FIELDS[name]), "passages": getattr(passages, _FIELDS[name])}
    lacking = [side for side, part in sides.items() if part is None]
    if not lacking and len(queries) and len(passages):
        widths = [part[0].shape[-1] for part in sides.values()]
        if widths[0] != widths[1]:
            raise ValueError(
                f"{caller}: {name} of queries and passages must have the same width, got {widths[0]} and {widths[1]};"
                " encode both with one model."
            )
    return (sides["queries"], sides["passages"]), lacking


def _needed(by: Function, name: str, queries: Embeddings, passages: Embeddings) -> tuple[Any, Any]:
    sides, lacking = _sides("search", name, queries, passages)
    if lacking:
        raise ValueError(
            f"search: by={by!r} needs {name}, which the {' and the '.join(lacking)} lack; encode with {name}=True."
        )
    return sides


# Passages [queries, k] int64, -1 where there is none, and their scores [queries, k] float32, -inf there.
Hits = tuple[np.ndarray, np.ndarray]


def _all_pairs(blocks: Iterator[Block], n_queries: int, n_passages: int) -> Float32[np.ndarray, "q p"]:
    scores = np.empty((n_queries, n_passages), np.float32)
    for row, column, block in blocks:
        into = scores[row : row + block.shape[0], column : column + block.shape[1]]
        into[:] = np.asarray(block)[: into.shape[0], : into.shape[1]]
    return scores


def _top_k(blocks: Iterator[Block], n_queries: int, n_passages: int, k: int, floor: float) -> Hits:
    """The k best passages of each query among those with a score above floor, the lower index first among equals."""
    best = {}
    for row, column, block in blocks:
        if row not in best:
            best[row] = (
                jnp.full((block.shape[0], k), -1, jnp.int32),
                jnp.full((block.shape[0], k), -jnp.inf, jnp.float32),
            )
        best[row] = _merge(*best[row], block, column, n_passages, floor)
    indices, scores = np.empty((n_queries, k), np.int64), np.empty((n_queries, k), np.float32)
    for row, (block_indices, block_scores) in best.items():
        n = min(len(block_indices), n_queries - row)
        indices[row : row + n], scores[row : row + n] = block_indices[:n], block_scores[:n]
    return indices, scores


@jax.jit
def _merge(
    indices: Int[Array, "q k"],
    scores: Float32[Array, "q k"],
    block: Float32[Array, "q p"],
    column: Int[Array, ""],
    n_passages: Int[Array, ""],
    floor: Float32[Array, ""],
) -> tuple[Int[Array, "q k"], Float32[Array, "q k"]]:
    columns = column + jnp.arange(block.shape[1], dtype=jnp.int32)
    block = jnp.where((columns < n_passages) & (block > floor), block, -jnp.inf)
    # The hits so far have lower indices and stand first, and of equal scores top_k takes the first.
    scores, chosen = jax.lax.top_k(jnp.concatenate([scores, block], axis=1), scores.shape[1])
    indices = jnp.concatenate([indices, jnp.broadcast_to(columns, block.shape)], axis=1)
    return jnp.where(scores > -jnp.inf, jnp.take_along_axis(indices, chosen, axis=1), -1), scores


def _union(dense: Hits, sparse: Hits, weights: tuple[float, float, float]) -> Hits:
    """All hits of both, unordered, with the weighted sum of their scores, a missing score counting 0."""
    indices = np.concatenate([dense[0], sparse[0]], axis=1)
    scores = np.concatenate(
        [
            np.float32(weight) * np.where(found < 0, np.float32(0), hits)
            for weight, (found, hits) in zip(weights, (dense, sparse), strict=False)
        ],
        axis=1,
    )
    order = np.argsort(indices, axis=1, kind="stable")
    indices, scores = np.take_along_axis(indices, order, axis=1), np.take_along_axis(scores, order, axis=1)
    # A passage that both retrieved now stands in two neighbouring places: the first takes the sum, the second is freed.
    twice = (indices[:, 1:] == indices[:, :-1]) & (indices[:, 1:] >= 0)
    scores[:, :-1] += np.where(twice, scores[:, 1:], 0)
    indices[:, 1:][twice] = -1
    scores[indices < 0] = -np.inf
    return indices, scores


def _best(indices: np.ndarray, scores: np.ndarray, k: int) -> Hits:
    """The k best of each row, the lower index first among equals."""
    order = np.lexsort((indices, -scores), axis=1)[:, :k]
    return np.take_along_axis(indices, order, axis=1), np.take_along_axis(scores, order, axis=1)
