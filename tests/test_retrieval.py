"""Tests of m3jax.retrieval: every score and every search beside a second implementation in plain loops."""

import tracemalloc

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from m3jax import pairs
from m3jax.embeddings import Embeddings
from m3jax.retrieval import FUNCTIONS, score, search

PARTS = ("dense", "terms", "colbert")


def random_embeddings(n: int, seed: int, vocabulary: int = 40, width: int = 6, longest: int = 9) -> Embeddings:
    rng = np.random.default_rng(seed)
    weights = rng.random((n, vocabulary)) * (rng.random((n, vocabulary)) < 0.06)
    colbert = [rng.standard_normal((rng.integers(1, longest + 1), 4)) for _ in range(n)]
    return Embeddings(
        rng.standard_normal((n, width)).astype(np.float32),
        csr_matrix(weights, dtype=np.float32),
        [(vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32) for vectors in colbert],
    )


def only(embeddings: Embeddings, *parts: str) -> Embeddings:
    return Embeddings(**{part: getattr(embeddings, part) for part in parts})


def naive_scores(queries: Embeddings, passages: Embeddings) -> dict[str, np.ndarray]:
    scores = {name: np.zeros((len(queries), len(passages))) for name in ("dense", "sparse", "colbert")}
    for q in range(len(queries)):
        for p in range(len(passages)):
            scores["dense"][q, p] = sum(float(a * b) for a, b in zip(queries.dense[q], passages.dense[p], strict=True))
            weights = passages.lexical_weights[p]
            scores["sparse"][q, p] = sum(w * weights.get(term, 0) for term, w in queries.lexical_weights[q].items())
            best = [max(float(i @ j) for j in passages.colbert[p]) for i in queries.colbert[q]]
            scores["colbert"][q, p] = sum(best) / len(best)
    return scores


def ranked(scores: dict[int, float], k: int) -> list[int]:
    return sorted(scores, key=lambda p: (-scores[p], p))[:k]


def naive_search(queries, passages, by, k, candidates, rerank, weights=None):
    """The five functions of the paper, one query at a time: lists of (row, score)."""
    every, results = naive_scores(queries, passages), []
    for q in range(len(queries)):
        dense, sparse, colbert = ({p: every[name][q, p] for p in range(len(passages))} for name in every)
        sparse_hits = {p: s for p, s in sparse.items() if s > 0}
        if by == "dense":
            final = dense
        elif by == "sparse":
            final = sparse_hits
        elif by == "dense+sparse":
            a, b, _ = weights or (1, 0.3, 0)
            best, others = ranked(dense, candidates), ranked(sparse_hits, candidates)
            final = {
                p: a * (dense[p] if p in best else 0) + b * (sparse[p] if p in others else 0) for p in {*best, *others}
            }
        elif by == "colbert":
            final = {p: colbert[p] for p in ranked(dense, rerank)}
        else:
            a, b, c = weights or (1, 0.3, 1)
            final = {p: a * dense[p] + b * sparse[p] + c * colbert[p] for p in ranked(dense, rerank)}
        results.append([(p, final[p]) for p in ranked(final, k)])
    return results


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that everything takes several, of queries, passages, tokens and pairs, with a ragged last one."""
    for name, size in {"QUERY_BLOCK": 4, "PASSAGE_BLOCK": 8, "QUERY_TOKENS": 12, "PASSAGE_TOKENS": 3}.items():
        monkeypatch.setattr(pairs, name, size)
    monkeypatch.setattr(pairs, "PAIR_BLOCK", 7)
    monkeypatch.setattr(pairs, "ITEMS_AT_ONCE", 2)


@pytest.mark.parametrize("blocks", ["small_blocks", None])
def test_score_of_all_pairs_and_pairwise_equal_the_loops(blocks, request):
    if blocks:
        request.getfixturevalue(blocks)
    queries, passages = random_embeddings(11, 0), random_embeddings(21, 1)
    expected = naive_scores(queries, passages)
    scores = score(queries, passages, weights=(0.5, 2, 3))
    pairs = score(queries, passages[:11], weights=(0.5, 2, 3), pairwise=True)
    expected["hybrid"] = 0.5 * expected["dense"] + 2 * expected["sparse"] + 3 * expected["colbert"]
    for name, values in expected.items():
        got, got_pairs = getattr(scores, name), getattr(pairs, name)
        assert got.dtype == got_pairs.dtype == np.float32
        np.testing.assert_allclose(got, values, rtol=1e-5, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(got_pairs, np.diagonal(values), rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_colbert_score_below_zero_stays_below_zero():
    # The peer's padded vectors are zeros, which floor the maximum at 0.
    queries = Embeddings(colbert=[np.array([[1, 0]], np.float32), np.array([[1, 0], [0, 1]], np.float32)])
    passages = Embeddings(colbert=[np.array([[-1, 0]], np.float32), np.array([[-1, 0], [0, -1], [-1, 0]], np.float32)])
    assert score(queries, passages).colbert.tolist() == [[-1, 0], [-0.5, 0]]


def test_pairwise_does_not_build_all_pairs():
    n = 4000
    dense = np.ones((n, 2), np.float32)
    one = Embeddings(dense, csr_matrix(dense), [vector[None] for vector in dense])
    tracemalloc.start()
    scores = score(one, one, pairwise=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert scores.hybrid.tolist() == [pytest.approx(2 + 0.3 * 2 + 2)] * n
    assert peak < n * n * 4 / 4


def test_colbert_never_holds_all_pairs_of_tokens():
    vectors = [np.ones((2500, 2), np.float32)]
    tracemalloc.start()
    scores = score(Embeddings(colbert=vectors * 28), Embeddings(colbert=vectors * 2))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (scores.colbert == 2).all()
    # All pairs are 1.4 GB, all pairs of one passage 700 MB, all queries with one block of a passage 143 MB.
    assert peak < 100e6


def test_score_without_a_part():
    queries, passages = random_embeddings(3, 0), random_embeddings(4, 1)
    both = score(only(queries, "dense", "terms"), only(passages, "dense", "terms"))
    assert both.colbert is None and both.hybrid is None and both.dense.shape == both.sparse.shape == (3, 4)
    weighted = score(only(queries, "dense", "terms"), passages, weights=(1, 0.5, 0))
    assert weighted.colbert is None
    np.testing.assert_allclose(weighted.hybrid, both.dense + 0.5 * both.sparse, rtol=1e-6)
    with pytest.raises(ValueError, match=r"colbert has weight 1.0 but the queries lack it.*colbert=True"):
        score(only(queries, "dense", "terms"), passages)
    with pytest.raises(ValueError, match="the passages lack it"):
        score(queries, only(passages, "dense"), weights=(1, 0, 1))


def test_single_texts_score_and_search_as_one_row():
    queries, passages = random_embeddings(3, 0), random_embeddings(4, 1)
    assert score(queries[1], passages[2]).hybrid.shape == (1, 1)
    assert score(queries[1], passages[2]).hybrid == pytest.approx(score(queries, passages).hybrid[1, 2], abs=1e-6)
    assert search(queries[1], passages, by="all").indices.shape == (1, 4)


def test_score_refuses():
    queries, passages = random_embeddings(3, 0), random_embeddings(4, 1)
    with pytest.raises(ValueError, match="got 3 and 4"):
        score(queries, passages, pairwise=True)
    for weights in ((0, 0, 0), (1, 1), (1, float("nan"), 1), 1, (1, None, 1), {"dense": 1, "sparse": 1, "colbert": 1}):
        with pytest.raises(ValueError, match="weights must be three finite numbers"):
            score(queries, passages, weights=weights)
    with pytest.raises(ValueError, match="dense of queries and passages must have the same width, got 6 and 7"):
        score(queries, random_embeddings(4, 1, width=7))
    with pytest.raises(ValueError, match=r"sparse .* the same width, got 40 and 41"):
        search(queries, random_embeddings(4, 1, vocabulary=41), by="sparse")


@pytest.mark.parametrize("by", FUNCTIONS)
@pytest.mark.parametrize("blocks", ["small_blocks", None])
@pytest.mark.parametrize("k", [1, 6, 100])
def test_search_equals_the_loops(by, blocks, k, request):
    if blocks:
        request.getfixturevalue(blocks)
    queries, passages = random_embeddings(11, 2), random_embeddings(37, 3)
    # candidates and rerank are far below the number of passages where k allows, so that what is not retrieved matters.
    limits = {"candidates": max(9, min(k, 37)), "rerank": max(9, min(k, 37))}
    other_weights = {"dense+sparse": (0.2, 3.0, 0.0), "all": (0.15, 3.0, 0.35)}.get(by)
    for weights in {None, other_weights}:
        results = search(queries, passages, by=by, k=k, weights=weights, **limits)
        expected = naive_search(queries, passages, by, k, **limits, weights=weights)
        assert results.indices.shape == results.scores.shape == (11, min(k, 37))
        assert results.indices.dtype == np.int64 and results.scores.dtype == np.float32
        for q, hits in enumerate(expected):
            assert results.indices[q].tolist() == [p for p, _ in hits] + [-1] * (min(k, 37) - len(hits))
            np.testing.assert_allclose(results.scores[q, : len(hits)], [s for _, s in hits], rtol=1e-5, atol=1e-6)
            assert (results.scores[q, len(hits) :] == -np.inf).all()


def test_sparse_and_the_union_really_leave_places_empty():
    queries, passages = random_embeddings(11, 2), random_embeddings(37, 3)
    assert (search(queries, passages, by="sparse", k=37).indices == -1).any()
    # At most 5 + 5 of 37 were retrieved, but k = 5 of them are always there.
    assert (search(queries, passages, by="dense+sparse", k=5, candidates=5).indices >= 0).all()


@pytest.mark.parametrize("by", FUNCTIONS)
def test_of_equal_scores_the_lower_row_comes_first(by, small_blocks):
    # Rows repeat with period 3 and the products are exact, so each score has many equals in several blocks.
    period = np.array([[1, 0], [2, 0], [3, 0]], np.float32)
    dense = np.tile(period, (9, 1))
    passages = Embeddings(dense, csr_matrix(dense), [vector[None] for vector in dense])
    queries = Embeddings(dense[:1], csr_matrix(dense[:1]), [dense[:1]])
    best = [2, 5, 8, 11, 14, 17, 20, 23, 26, 1, 4]
    for k in (1, 5, 11):
        results = search(queries, passages, by=by, k=k, rerank=11, candidates=11)
        assert results.indices[0].tolist() == best[:k]


def test_a_dense_score_counts_nothing_where_dense_did_not_retrieve():
    queries = Embeddings(np.array([[1, 0]], np.float32), csr_matrix(np.array([[1, 0]], np.float32)))
    passages = Embeddings(
        np.array([[0.9, 0], [0.8, 0], [0.7, 0]], np.float32), csr_matrix(np.array([[0, 1], [0, 1], [1, 0]], np.float32))
    )
    results = search(queries, passages, by="dense+sparse", k=1, candidates=1, weights=(1, 1, 0))
    assert (results.indices.item(), results.scores.item()) == (2, 1.0)  # 1 of sparse alone, not 1.7


def test_a_weight_of_zero_keeps_the_union(recwarn):
    queries, passages = random_embeddings(5, 2), random_embeddings(37, 3)
    results = search(queries, passages, by="dense+sparse", k=9, candidates=9, weights=(1, 0, 0))
    expected = naive_search(queries, passages, "dense+sparse", 9, 9, 9, weights=(1, 0, 0))
    assert results.indices.tolist() == [[p for p, _ in hits] for hits in expected]
    assert not recwarn.list  # 0 x -inf of an empty place is no number, and NumPy says so


def test_all_needs_no_part_of_weight_zero_but_dense():
    queries, passages = random_embeddings(5, 2), random_embeddings(9, 3)
    results = search(only(queries, "dense", "terms"), passages, by="all", weights=(1, 0.3, 0))
    assert (results.indices == np.argsort(-score(queries, passages, weights=(1, 0.3, 0)).hybrid, kind="stable")).all()
    with pytest.raises(ValueError, match="needs dense, which the queries lack"):
        search(only(queries, "terms", "colbert"), passages, by="all", weights=(0, 1, 1))


def test_no_queries_and_no_passages():
    queries, passages = random_embeddings(3, 0), random_embeddings(4, 1)
    for by in FUNCTIONS:
        assert search(queries[:0], passages, by=by, k=2).indices.shape == (0, 2)
        assert search(queries, passages[:0], by=by, k=2).scores.shape == (3, 0)
    assert score(queries[:0], passages).hybrid.shape == (0, 4)
    assert score(queries, passages[:0]).hybrid.shape == (3, 0)
    assert score(queries[:0], passages[:0], pairwise=True).hybrid.shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"by": "lexical"}, "'dense', 'sparse', 'colbert', 'dense\\+sparse', 'all', got 'lexical'"),
        ({"by": "sparse"}, "needs sparse, which the queries and the passages lack; encode with sparse=True"),
        ({"by": "colbert"}, "encode with colbert=True"),
        ({"k": 0}, "k must be at least 1"),
        ({"k": 2.0}, "k must be a whole number, got 2.0"),
        ({"candidates": "2"}, "candidates must be a whole number, got '2'"),
        ({"by": "all", "rerank": 0}, "rerank must be at least 1"),
        ({"by": "colbert", "k": 6, "rerank": 5}, "rerank=5 passages, and cannot give the best k=6"),
        ({"by": "dense+sparse", "k": 6, "candidates": 5}, "pass candidates=6 or more"),
        ({"by": "dense", "weights": (1, 1, 1)}, "leave them out"),
        ({"by": "dense+sparse", "weights": (1, 1, 1)}, "third weight must be 0"),
    ],
)
def test_search_refuses(arguments, message):
    some = only(random_embeddings(8, 0), "dense")
    with pytest.raises(ValueError, match=message):
        search(some, some, **arguments)


def test_k_past_the_passages_is_no_error_even_past_rerank():
    some = random_embeddings(4, 0)
    assert search(some, some, by="all", k=50, rerank=5).indices.shape == (4, 4)
