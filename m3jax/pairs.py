"""Scores of one part of two Embeddings, dense, sparse or colbert: of all pairs block by block, or of chosen pairs.

Not here: what is made of them, sums and the best k (retrieval.py).
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int
from scipy.sparse import csr_matrix
from threadpoolctl import threadpool_limits

# A block of scores is at most QUERY_BLOCK x PASSAGE_BLOCK float32 = 32 MB.
QUERY_BLOCK = 1024
PASSAGE_BLOCK = 8192
# A block of token products is at most PASSAGE_TOKENS x QUERY_TOKENS float32 = 64 MB a thread. Of 8k to 64k query tokens,
# 32k are the fewest that are as quick as any (8k: +20%).
QUERY_TOKENS = 32768
PASSAGE_TOKENS = 512
# Passages that a thread takes at a time, so that handing them over costs little.
ITEMS_AT_ONCE = 32
# Pairs whose rows are gathered at once: 32 MB of dense vectors of 1024, 100 MB of passages with 2,000 terms.
PAIR_BLOCK = 4096

# Scores of some queries with some passages, and the row and column where they begin. The blocks that go to a device have
# powers of two as shape, so that few are compiled; what lies past the last query or passage means nothing.
Block = tuple[int, int, Array | np.ndarray]


def _padded(rows: np.ndarray) -> np.ndarray:
    return np.pad(rows, [(0, _bucket(len(rows)) - len(rows)), (0, 0)])


def _bucket(length: int) -> int:
    return 1 << (length - 1).bit_length()


def _dense_blocks(queries: Float32[np.ndarray, "q d"], passages: Float32[np.ndarray, "p d"]) -> Iterator[Block]:
    rows = _starts(queries, QUERY_BLOCK)
    query_blocks = [jnp.asarray(_padded(queries[row : row + QUERY_BLOCK])) for row in rows]
    for column in _starts(passages, PASSAGE_BLOCK):
        passage_block = jnp.asarray(_padded(passages[column : column + PASSAGE_BLOCK]))
        for row, query_block in zip(rows, query_blocks, strict=True):
            yield row, column, _inner_products(query_block, passage_block)


@jax.jit
def _inner_products(queries: Float32[Array, "q d"], passages: Float32[Array, "p d"]) -> Float32[Array, "q p"]:
    # HIGHEST, because by default a TPU multiplies float32 as bf16 and a GPU as TF32.
    return jnp.einsum("qd,pd->qp", queries, passages, precision=jax.lax.Precision.HIGHEST)


def _sparse_blocks(queries: csr_matrix, passages: csr_matrix) -> Iterator[Block]:
    for column in _starts(passages, PASSAGE_BLOCK):
        passage_block = passages[column : column + PASSAGE_BLOCK].T.tocsr()
        for row in _starts(queries, QUERY_BLOCK):
            products = (queries[row : row + QUERY_BLOCK] @ passage_block).toarray()
            block = np.zeros((_bucket(products.shape[0]), _bucket(products.shape[1])), np.float32)
            block[: products.shape[0], : products.shape[1]] = products
            yield row, column, block


def _colbert_blocks(
    queries: Sequence[Float32[np.ndarray, "i c"]], passages: Sequence[Float32[np.ndarray, "j c"]]
) -> Iterator[Block]:
    for row, lengths, tokens in _query_tokens(queries):
        for column in _starts(passages, PASSAGE_BLOCK):
            block = _in_threads(partial(_max_sim, tokens, lengths), passages[column : column + PASSAGE_BLOCK])
            yield row, column, np.stack(block, axis=1)


BLOCKS = {"dense": _dense_blocks, "sparse": _sparse_blocks, "colbert": _colbert_blocks}


def _starts(rows: Any, block: int) -> range:
    # A sparse matrix has a shape and no length, a list a length and no shape.
    return range(0, len(rows) if isinstance(rows, Sequence) else rows.shape[0], block)


def _query_tokens(
    queries: Sequence[Float32[np.ndarray, "i c"]],
) -> Iterator[tuple[int, Int[np.ndarray, " q"], Float32[np.ndarray, "t c"]]]:
    """Runs of queries with at most QUERY_TOKENS vectors together (or one query): first row, lengths, all vectors."""
    lengths = np.array([len(vectors) for vectors in queries], np.int64)
    start = 0
    while start < len(lengths):
        stop = start + max(1, int(np.searchsorted(np.cumsum(lengths[start:]), QUERY_TOKENS, side="right")))
        yield start, lengths[start:stop], np.concatenate(queries[start:stop])
        start = stop


def _max_sim(
    tokens: Float32[np.ndarray, "t c"], lengths: Int[np.ndarray, " q"], passage: Float32[np.ndarray, "j c"]
) -> Float32[np.ndarray, " q"]:
    """The colbert scores of one passage with the queries whose vectors, `lengths` each, stand in `tokens`."""
    best = (passage[:PASSAGE_TOKENS] @ tokens.T).max(axis=0)
    for start in range(PASSAGE_TOKENS, len(passage), PASSAGE_TOKENS):
        np.maximum(best, (passage[start : start + PASSAGE_TOKENS] @ tokens.T).max(axis=0), out=best)
    return np.add.reduceat(best, np.cumsum(lengths) - lengths) / lengths.astype(np.float32)


def _dense_pairs(
    queries: Float32[np.ndarray, "q d"], passages: Float32[np.ndarray, "p d"], rows: np.ndarray, columns: np.ndarray
) -> Float32[np.ndarray, " n"]:
    scores = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), PAIR_BLOCK):
        some = slice(start, start + PAIR_BLOCK)
        scores[some] = np.einsum("nd,nd->n", queries[rows[some]], passages[columns[some]])
    return scores


def _sparse_pairs(
    queries: csr_matrix, passages: csr_matrix, rows: np.ndarray, columns: np.ndarray
) -> Float32[np.ndarray, " n"]:
    scores = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), PAIR_BLOCK):
        some = slice(start, start + PAIR_BLOCK)
        scores[some] = np.ravel(queries[rows[some]].multiply(passages[columns[some]]).sum(axis=1))
    return scores


def _colbert_pairs(
    queries: Sequence[Float32[np.ndarray, "i c"]],
    passages: Sequence[Float32[np.ndarray, "j c"]],
    rows: np.ndarray,
    columns: np.ndarray,
) -> Float32[np.ndarray, " n"]:
    scores = np.empty(len(rows), np.float32)
    for first, lengths, tokens in _query_tokens(queries):
        block = slice(*np.searchsorted(rows, [first, first + len(lengths)]))
        scores[block] = _token_pairs(tokens, lengths, passages, rows[block] - first, columns[block])
    return scores


def _token_pairs(
    tokens: Float32[np.ndarray, "t c"],
    lengths: Int[np.ndarray, " q"],
    passages: Sequence[Float32[np.ndarray, "j c"]],
    rows: np.ndarray,
    columns: np.ndarray,
) -> Float32[np.ndarray, " n"]:
    # The queries of each passage are gathered, not the passages of each query, because a query has fewer vectors. Measured
    # on 2,000 queries x 200 passages of 40 vectors of 256, two cores: 3.2 s, the other way 7.4 s, the other way in padded
    # blocks under jit 17 s; in processor time this takes 3 to 4 s, and the same under jit 6 to 8 s.
    scores = np.empty(len(rows), np.float32)
    starts = np.cumsum(lengths) - lengths
    by_passage = np.argsort(columns, kind="stable")

    def fill(pairs: np.ndarray) -> None:
        some = rows[pairs]
        ends = np.cumsum(lengths[some])
        where = np.arange(ends[-1]) + np.repeat(starts[some] - ends + lengths[some], lengths[some])
        scores[pairs] = _max_sim(tokens[where], lengths[some], passages[int(columns[pairs[0]])])

    groups = np.split(by_passage, np.flatnonzero(np.diff(columns[by_passage])) + 1)
    _in_threads(fill, groups if len(rows) else [])
    return scores


def _in_threads(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """[function(item) for item in items], with one thread a core."""
    # BLAS is kept to one thread in each, because its own threads wait for one another at every small product, which took
    # 23 to 34 s of processor time instead of 3 s where other programs ran beside.
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = [items[start : start + ITEMS_AT_ONCE] for start in range(0, len(items), ITEMS_AT_ONCE)]
        return list(chain.from_iterable(pool.map(lambda run: [function(item) for item in run], runs)))


# Scores of the pairs (rows[n], columns[n]) of queries and passages, rows ascending.
PAIRS = {"dense": _dense_pairs, "sparse": _sparse_pairs, "colbert": _colbert_pairs}
