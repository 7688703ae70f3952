"""A model measured on a task: its texts encoded, ranked by each function and by BM25, nDCG@10 and Recall@100.

Not here: the program (evaluate.py). How passages are ranked is m3jax.retrieval's, what is asked and measured tasks.py's, and a
page of results report.py's.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from warnings import catch_warnings, filterwarnings

import bm25s
import numpy as np
from scipy.sparse import csr_matrix, vstack

import m3jax
from m3jax.embeddings import Embeddings
from m3jax.model import M3
from m3jax.retrieval import FUNCTIONS, Function, search
from m3jax.tokenization import Tokenizer
from train.files import write_json, write_whole
from train.results import METRICS
from train.tasks import Run, Task, measure
from train.tuning import DEFAULT, HYBRIDS, RERANK, Hybrid, Weights

# Texts between two looks whether to go on: as many as encode makes batches of by themselves.
_AT_ONCE = 8192
# Passages of each query in a run: as many as the deepest metric looks at.
DEPTH = 100


@dataclass(frozen=True)
class Evaluation:
    """What a model (and BM25) scored on a task.

    Attributes:
      name, queries, passages: of the task; only the queries that were measured are counted.
      warnings: what a reader of the figures must know.
      scores: {"bm25" or a function: {"ndcg_at_10", "recall_at_100": mean over the queries}}.
      runs: {"bm25" or a function: {query id: {passage id: score}}}, best first.
      weights: of dense, sparse and colbert in "dense+sparse" and "all", where they were ranked.
    """

    name: str
    queries: int
    passages: int
    warnings: list[str]
    scores: dict[str, dict[str, float]]
    runs: dict[str, Run]
    weights: dict[Hybrid, Weights] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the runs, for json.dump."""
        return {
            "name": self.name,
            "queries": self.queries,
            "passages": self.passages,
            "warnings": self.warnings,
            "scores": self.scores,
            "weights": {function: list(weights) for function, weights in self.weights.items()},
        }

    def to_markdown(self) -> str:
        """The scores as a Markdown table, with the sizes above, and the weights and the warnings below.

        >>> scores = {"bm25": {"ndcg_at_10": 0.25, "recall_at_100": 1}, "all": {"ndcg_at_10": 0.5, "recall_at_100": 1}}
        >>> print(Evaluation("demo", 2, 3, [], scores, {}, {"all": (1, 0.3, 1)}).to_markdown())
        demo: 2 queries, 3 passages
        <BLANKLINE>
        | | nDCG@10 | Recall@100 |
        |---|---:|---:|
        | BM25 | 0.250 | 1.000 |
        | all | 0.500 | 1.000 |
        <BLANKLINE>
        Weights of dense, sparse, colbert: 1, 0.3, 1 in all.
        """
        lines = [
            f"{self.name}: {self.queries:,} queries, {self.passages:,} passages",
            "",
            f"| | {' | '.join(METRICS.values())} |",
            "|---|" + "---:|" * len(METRICS),
        ]
        for function, values in self.scores.items():
            label = "BM25" if function == "bm25" else function
            lines.append(f"| {label} | {' | '.join(f'{values[metric]:.3f}' for metric in METRICS)} |")
        if self.weights:
            lines += ["", f"Weights of dense, sparse, colbert: {shown(self.weights)}."]
        if self.warnings:
            lines += ["", *(f"Warning: {warning}." for warning in self.warnings)]
        return "\n".join(lines)

    def write(self, folder: str | Path) -> None:
        """Write results.json, results.md and a TREC run for each function (`dense.run`, …); each appears when complete."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for function, run in self.runs.items():
            lines = (
                f"{query} Q0 {passage} {rank} {score!r} m3jax-{function}\n"
                for query, hits in run.items()
                for rank, (passage, score) in enumerate(hits.items(), 1)
            )
            write_whole(folder / f"{function}.run", "".join(lines))
        write_whole(folder / "results.md", self.to_markdown() + "\n")
        write_json(folder / "results.json", self.to_dict())


@dataclass(frozen=True)
class Encoded:
    """A task's judged queries and its passages as embeddings and as BM25's terms, and how many texts were cut."""

    queries: Embeddings
    passages: Embeddings
    query_terms: list[list[int]]
    passage_terms: list[list[int]]
    warnings: list[str]


def evaluate(
    m3: M3,
    task: Task,
    *,
    functions: Sequence[Function] = FUNCTIONS,
    weights: Mapping[Hybrid, Weights] | None = None,
    rerank: int | None = None,
    baseline: bool = True,
    max_length: int | None = None,
    query_max_length: int | None = None,
    progress: bool = False,
    look: Callable[[], None] | None = None,
) -> Evaluation:
    """Encode a task's queries and passages, rank by each function, and measure.

    Args:
      functions: those of m3jax.search.
      weights: of dense, sparse and colbert in "dense+sparse" and "all"; search's own for one that is not named.
      rerank: how many of dense's passages colbert and all rank again; None is the paper's 200, and all of them where dense is
        not among the functions, alone or in a hybrid: its ranking may then be of a head that nobody trained.
      baseline: whether to measure BM25 too, on the terms that the model sees.
      max_length, query_max_length: tokens of passages and of queries; None is the model's positions.
      progress: show the progress of encode.
      look: called before each ranking and some thousands of texts, where nothing is at work; what it raises breaks this off.

    Raises:
      ValueError: as `m3jax.encode` and `m3jax.search` do.
    """
    weights = {by: (weights or {}).get(by, DEFAULT[by]) for by in HYBRIDS if by in functions}
    if rerank is None:
        rerank = RERANK if {"dense", *HYBRIDS} & {*functions} else len(task.corpus)
    encoded = encode_task(m3, task, functions, max_length, query_max_length, progress, look)
    runs = {"bm25": bm25(task, encoded.query_terms, encoded.passage_terms)} if baseline else {}
    for function in functions:
        if look:
            look()
        own = weights[function] if function in HYBRIDS else None
        runs[function] = rank(task, encoded.queries, encoded.passages, by=function, weights=own, rerank=rerank)
    return Evaluation(
        name=task.name,
        queries=len(task.judged_queries),
        passages=len(task.corpus),
        warnings=task.warnings + encoded.warnings,
        scores={function: measure(run, task.qrels) for function, run in runs.items()},
        runs=runs,
        weights=weights,
    )


def rank(
    task: Task,
    queries: Embeddings,
    passages: Embeddings,
    *,
    by: Function,
    weights: Weights | None = None,
    rerank: int = RERANK,
) -> Run:
    """The best DEPTH passages of each judged query; the rows are those of `task.judged_queries` and `task.corpus`.

    Raises:
      ValueError: where the numbers of rows are others, and as `m3jax.search` does.
    """
    if (len(queries), len(passages)) != (len(task.judged_queries), len(task.corpus)):
        raise ValueError(
            f"rank: task {task.name} has {len(task.judged_queries)} judged queries and {len(task.corpus)} passages, got"
            f" embeddings of {len(queries)} and {len(passages)}; encode task.judged_queries.values() and"
            " task.corpus.values()."
        )
    found = search(queries, passages, by=by, k=DEPTH, weights=weights, rerank=rerank)
    return task.run(found.indices, found.scores)


def bm25(task: Task, query_terms: Sequence[Sequence[int]], passage_terms: Sequence[Sequence[int]]) -> Run:
    """The best DEPTH passages of each judged query by BM25 (bm25s, Lucene's formula, k1 = 0.9, b = 0.4 as Anserini).

    Args:
      query_terms, passage_terms: the term ids of `task.judged_queries` and `task.corpus`, repeated as in the text.

    Returns:
      The run; passages that share no term with the query are not in it, and of equal scores the earlier comes first.
    """
    run: Run = {query: {} for query in task.judged_queries}
    if not any(map(len, passage_terms)):
        return run  # bm25s cannot index a corpus without a term
    index = bm25s.BM25(k1=0.9, b=0.4, method="lucene")
    index.index([list(map(str, terms)) for terms in passage_terms], show_progress=False)
    passages = list(task.corpus)
    for hits, terms in zip(run.values(), query_terms, strict=True):
        scores = index.get_scores_from_ids(index.get_tokens_ids(list(map(str, terms))))
        found = np.flatnonzero(scores > 0)
        best = found[np.argsort(-scores[found], kind="stable")[:DEPTH]]
        hits.update((passages[row], float(scores[row])) for row in best)
    return run


def mean(evaluations: Sequence[Evaluation]) -> Evaluation:
    """The mean over tasks of each score, every task counting the same, as the paper's tables have it (PAPER §6).

    >>> one = Evaluation("a", 2, 3, [], {"all": {"ndcg_at_10": 0.5, "recall_at_100": 1.0}}, {})
    >>> two = Evaluation("b", 9, 9, [], {"all": {"ndcg_at_10": 0.0, "recall_at_100": 0.5}}, {})
    >>> mean([one, two]).scores
    {'all': {'ndcg_at_10': 0.25, 'recall_at_100': 0.75}}
    """
    scores = {
        function: {metric: float(np.mean([one.scores[function][metric] for one in evaluations])) for metric in METRICS}
        for function in evaluations[0].scores
    }
    return Evaluation(
        name=f"mean of {len(evaluations)} tasks",
        queries=sum(one.queries for one in evaluations),
        passages=sum(one.passages for one in evaluations),
        warnings=[f"{one.name}: {warning}" for one in evaluations for warning in one.warnings],
        scores=scores,
        runs={},
        weights=evaluations[0].weights,
    )


def encode_task(
    m3: M3,
    task: Task,
    functions: Sequence[Function],
    max_length: int | None,
    query_max_length: int | None,
    progress: bool,
    look: Callable[[], None] | None = None,
) -> Encoded:
    warnings: list[str] = []
    terms: list[list[list[int]]] = []
    embeddings: list[Embeddings] = []
    for kind, texts, length in (
        ("queries", list(task.judged_queries.values()), query_max_length),
        ("passages", list(task.corpus.values()), max_length),
    ):
        length = m3.config.max_length if length is None else length
        of_kind, cut = _terms(m3.tokenizer, texts, length)
        terms.append(of_kind)
        if cut:
            warnings.append(f"{cut} of {len(texts)} {kind} were cut to {length} tokens")
        with catch_warnings():
            filterwarnings("ignore", message=".* were cut to it")  # counted above, beside what the texts are
            encode = functools.partial(
                m3jax.encode,
                m3,
                dense=set(functions) != {"sparse"},
                sparse=not {"sparse", *HYBRIDS}.isdisjoint(functions),
                colbert=not {"colbert", "all"}.isdisjoint(functions),
                max_length=length,
                progress=progress,
            )
            embeddings.append(_in_slices(encode, texts, look) if look else encode(texts))
    queries, passages = embeddings
    query_terms, passage_terms = terms
    return Encoded(queries, passages, query_terms, passage_terms, warnings)


def _in_slices(encode: Callable[[list[str]], Embeddings], texts: list[str], look: Callable[[], None]) -> Embeddings:
    """encode(texts), with `look` called before each slice of them."""
    slices = []
    for start in range(0, max(1, len(texts)), _AT_ONCE):
        look()
        slices.append(encode(texts[start : start + _AT_ONCE]))
    first = slices[0]
    return Embeddings(
        dense=None if first.dense is None else np.concatenate([one.dense for one in slices]),
        terms=None if first.terms is None else csr_matrix(vstack([one.terms for one in slices])),
        colbert=None if first.colbert is None else [vectors for one in slices for vectors in one.colbert],
    )


def shown(weights: Mapping[Hybrid, Weights]) -> str:
    return "; ".join(f"{', '.join(f'{weight:g}' for weight in of)} in {by}" for by, of in weights.items())


def _terms(tokenizer: Tokenizer, texts: Sequence[str], max_length: int) -> tuple[list[list[int]], int]:
    """The ids of each text that can be lexical terms, and how many texts were cut."""
    rows, cut = tokenizer.encode(texts, max_length)
    unused = np.array(sorted(tokenizer.unused_ids))
    return [row[~np.isin(row, unused)].tolist() for row in rows], cut
