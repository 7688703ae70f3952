"""Weights chosen on held-out tasks, beside a plain search of the grid with m3jax.search."""

import numpy as np
import pytest
from scipy.sparse import random as random_matrix

from m3jax.embeddings import Embeddings
from train.evaluation import rank
from train.tasks import Task, measure
from train.tuning import DEFAULT, HYBRIDS, choose_weights, grid


def embeddings(rng, count):
    """Random embeddings whose parts have spreads as unlike as a small model's."""
    dense = rng.normal(size=(count, 8)).astype(np.float32)
    colbert = [rng.normal(size=(int(rng.integers(1, 6)), 8)).astype(np.float32) for _ in range(count)]
    terms = random_matrix(count, 40, density=0.2, format="csr", dtype=np.float32, random_state=rng)
    terms.sort_indices()
    unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in colbert]
    return Embeddings(dense=dense / np.linalg.norm(dense, axis=1, keepdims=True), terms=terms * 0.3, colbert=unit)


def encoded(rng, name, queries, passages):
    corpus = {f"p{i}": "" for i in range(passages)}
    texts = {f"q{i}": "" for i in range(queries)}
    qrels = {query: {f"p{i}": 1 for i in rng.choice(passages, 3, replace=False)} for query in texts}
    return Task(name, corpus, texts, qrels), embeddings(rng, queries), embeddings(rng, passages)


@pytest.mark.parametrize("by", HYBRIDS)
def test_no_weights_of_the_grid_are_better_by_search_itself(by):
    rng = np.random.default_rng(0)
    tasks = [encoded(rng, "small", 5, 30), encoded(rng, "large", 4, 150)]

    def mean(weights):
        runs = [(task, rank(task, q, p, by=by, weights=weights, rerank=120)) for task, q, p in tasks]
        return np.mean([measure(run, task.qrels)["ndcg_at_10"] for task, run in runs])

    chosen, quality = choose_weights(by, tasks, rerank=120)
    tried = {weights: mean(weights) for weights in grid(by)}
    assert quality == pytest.approx(tried[chosen]) == pytest.approx(max(tried.values()))
    assert tried[chosen] > tried[DEFAULT[by]] + 0.01  # so that there was something to choose


@pytest.mark.parametrize("by", HYBRIDS)
def test_among_equals_searchs_own_weights_stay(by):
    task = Task("one passage", {"p": ""}, {"q": ""}, {"q": {"p": 1}})
    one = embeddings(np.random.default_rng(1), 1)
    assert choose_weights(by, [(task, one, one)]) == (DEFAULT[by], 1.0)
