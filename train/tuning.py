"""Weights of the two hybrid functions, chosen on held-out tasks: the paper too has other weights for other sets (PAPER §1).

Not here: what a metric means (tasks.py), and that nobody chooses on what is then reported (evaluate.py).
"""

import itertools
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from m3jax.embeddings import Embeddings
from m3jax.retrieval import search
from train.tasks import Task, measure

# Of dense, sparse and colbert.
Weights = tuple[float, float, float]
Hybrid = Literal["dense+sparse", "all"]
HYBRIDS: tuple[Hybrid, ...] = get_args(Hybrid)
# What m3jax.search takes where nothing else is given (PAPER §1, §6).
DEFAULT: dict[Hybrid, Weights] = {"dense+sparse": (1.0, 0.3, 0.0), "all": (1.0, 0.3, 1.0)}
RERANK = 200

# Only ratios count, so one weight is 1. The parts' spreads can differ by two powers of ten (RESULTS.md, "Real sets").
_STEPS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.0)
_DEPTH = 10  # as far down as nDCG@10 looks


def grid(by: Hybrid) -> list[Weights]:
    """The weights that `choose_weights` tries, search's own first.

    >>> grid("dense+sparse")[:3], len(grid("dense+sparse")), len(grid("all"))
    ([(1.0, 0.3, 0.0), (1.0, 1.0, 0.0), (1.0, 0.1, 0.0)], 11, 91)
    """
    colbert = _STEPS if by == "all" else (0.0,)
    tried = [weights for weights in itertools.product(_STEPS, _STEPS, colbert) if max(weights) == 1.0]
    return list(dict.fromkeys([DEFAULT[by], *tried]))


def choose_weights(
    by: Hybrid, encoded: Sequence[tuple[Task, Embeddings, Embeddings]], *, rerank: int = RERANK
) -> tuple[Weights, float]:
    """The weights of `grid` with the highest mean nDCG@10 over tasks, the first of equals, and that mean.

    encoded: each task with the embeddings of its `judged_queries` and of its `corpus`, with the parts that `by` needs.
    rerank: as m3jax.search has it.
    """
    rankings = [_Ranking(by, queries, passages, rerank) for _, queries, passages in encoded]

    def quality(weights: Weights) -> float:
        found = zip(encoded, rankings, strict=True)
        runs = [(task, task.run(*ranking.best(weights))) for (task, _, _), ranking in found]
        return float(np.mean([measure(run, task.qrels)["ndcg_at_10"] for task, run in runs]))

    # The mean is taken once for each, and max keeps the first of equals.
    return max(((weights, quality(weights)) for weights in grid(by)), key=lambda tried: tried[1])


class _Ranking:
    """What m3jax.search ranks by a hybrid function, for any weights; colbert, the slow part of "all", is scored once."""

    def __init__(self, by: Hybrid, queries: Embeddings, passages: Embeddings, rerank: int):
        self._by, self._queries, self._passages = by, queries, passages
        if by == "dense+sparse":
            return
        # "all" is linear in its weights over passages that do not depend on them.
        parts = []
        for weights in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)):
            found = search(queries, passages, by=by, k=rerank, weights=weights, rerank=rerank)
            order = np.argsort(found.indices, axis=1)
            self._indices = np.take_along_axis(found.indices, order, axis=1)
            parts.append(np.take_along_axis(found.scores, order, axis=1))
        self._parts = np.stack(parts)

    def best(self, weights: Weights) -> tuple[np.ndarray, np.ndarray]:
        if self._by == "dense+sparse":
            found = search(self._queries, self._passages, by=self._by, k=_DEPTH, weights=weights)
            return found.indices, found.scores
        scores = np.tensordot(np.array(weights, np.float32), self._parts, axes=1)
        # Stable over ascending rows: of equal scores the lower row comes first, as in search.
        order = np.argsort(-scores, axis=1, kind="stable")[:, :_DEPTH]
        return np.take_along_axis(self._indices, order, axis=1), np.take_along_axis(scores, order, axis=1)
