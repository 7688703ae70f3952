"""One worked example of a trained model: a query, the first passages by each function, and the terms that they share.

Not here: how it is shown (report.py).
"""

import fnmatch
import warnings
from collections.abc import Mapping
from typing import Any

import m3jax
from m3jax.model import M3
from train.tasks import Task

Runs = Mapping[str, Mapping[str, Mapping[str, float]]]  # function → query id → passage id → score


def worked_example(
    m3: M3, task: Task, runs: Runs, pattern: str, language: str, *, lengths: tuple[int, int], passages: int = 3
) -> dict[str, Any] | None:
    """The first query (by id) that matches the pattern, as the "example" of results.json; None where none matches.

    lengths: of queries and passages in tokens, as the ranking cut them. The terms marked in a passage are those whose
    weights multiply to its sparse score, heaviest product first; none without a run by "sparse".
    """
    found = sorted(query for query in task.judged_queries if fnmatch.fnmatch(query, pattern))
    if not found:
        return None
    query = found[0]

    def weights(text: str, length: int) -> dict[str, float]:
        with warnings.catch_warnings(action="ignore"):  # the ranking has said how many texts are cut
            found = m3jax.encode(m3, text, dense=False, max_length=length).lexical_weights
        assert isinstance(found, dict)
        return found

    own = weights(task.queries[query], lengths[0]) if "sparse" in runs else {}

    def shared(text: str) -> list[str]:
        if not own:
            return []
        theirs = weights(text, lengths[1])
        return list(m3.tokens({term: own[term] * theirs[term] for term in own.keys() & theirs.keys()}))

    tops = {}
    for function, run in runs.items():
        best = sorted(run.get(query, {}).items(), key=lambda item: -item[1])[:passages]
        tops[function] = [
            {
                "text": task.corpus[passage],
                "score": score,
                "relevant": task.qrels[query].get(passage, 0) > 0,
                "matched": shared(task.corpus[passage]),
            }
            for passage, score in best
        ]
    return {"query": task.queries[query], "tops": tops} | ({"language": language} if language else {})
