"""Measure a model on a folder of passages, queries and relevance judgements: nDCG@10 and Recall@100 of all functions.

How passages are ranked is m3jax.retrieval's, what the metrics mean pytrec_eval's, and a page of results train.report's.
"""

import argparse
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import pytrec_eval

import m3jax
from m3jax.embeddings import Embeddings
from m3jax.model import M3
from m3jax.retrieval import FUNCTIONS, Function, search
from m3jax.tokenization import Tokenizer
from train.files import came, parse_object, read_lines, write_json, write_whole
from train.results import METRICS

# {query id: {passage id: score}}, best first.
Run = dict[str, dict[str, float]]
Qrels = Mapping[str, Mapping[str, int]]

# Passages of each query in a run: as many as the deepest metric looks at.
DEPTH = 100
# Our names of the metrics -> trec_eval's.
_TREC = {"ndcg_at_10": "ndcg_cut_10", "recall_at_100": "recall_100"}


@dataclass(frozen=True)
class Task:
    """Passages, queries, and which passages are relevant to which query (relevance 1 or more).

    Raises:
      ValueError: for no passage, no query, judgements of unknown ids, ids that are empty or have whitespace (which TREC
        files cannot hold), or no query with a relevant passage.
    """

    name: str
    corpus: Mapping[str, str]
    queries: Mapping[str, str]
    qrels: Qrels

    def __post_init__(self) -> None:
        for kind, texts in (("passages", self.corpus), ("queries", self.queries)):
            if not texts:
                raise ValueError(f"task {self.name}: expected {kind}, got none.")
            if bad := [id for id in texts if not _is_id(id)]:
                raise ValueError(f"task {self.name}: ids of {kind} must be {_ID}, got {bad[0]!r}.")
        for query, judged in self.qrels.items():
            if query not in self.queries:
                raise ValueError(
                    f"task {self.name}: judgements name the query {query!r}, which is not among the queries."
                )
            if unknown := judged.keys() - self.corpus.keys():
                raise ValueError(
                    f"task {self.name}: judgements of query {query!r} name the passage {min(unknown)!r}, which is not in"
                    " the corpus."
                )
        if not self.judged_queries:
            raise ValueError(
                f"task {self.name}: no query has a passage of relevance 1 or more, so there is nothing to measure."
            )

    @cached_property
    def judged_queries(self) -> dict[str, str]:
        """The queries that have a relevant passage, in their order; the others are neither ranked nor measured."""
        relevant = _with_relevant(self.qrels)
        return {id: text for id, text in self.queries.items() if id in relevant}

    @property
    def warnings(self) -> list[str]:
        """What a reader of the figures must know: how many queries were left out."""
        left_out = len(self.queries) - len(self.judged_queries)
        return (
            [f"{left_out} of {len(self.queries)} queries have no relevant passage and were left out"]
            if left_out
            else []
        )


@dataclass(frozen=True)
class Evaluation:
    """What a model (and BM25) scored on a task.

    Attributes:
      name, queries, passages: of the task; only the queries that were measured are counted.
      warnings: what a reader of the figures must know.
      scores: {"bm25" or a function: {"ndcg_at_10", "recall_at_100": mean over the queries}}.
      runs: {"bm25" or a function: {query id: {passage id: score}}}, best first.
    """

    name: str
    queries: int
    passages: int
    warnings: list[str]
    scores: dict[str, dict[str, float]]
    runs: dict[str, Run]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the runs, for json.dump."""
        return {
            "name": self.name,
            "queries": self.queries,
            "passages": self.passages,
            "warnings": self.warnings,
            "scores": self.scores,
        }

    def to_markdown(self) -> str:
        """The scores as a Markdown table, with the sizes above and the warnings below.

        >>> scores = {"bm25": {"ndcg_at_10": 0.25, "recall_at_100": 1}, "all": {"ndcg_at_10": 0.5, "recall_at_100": 1}}
        >>> print(Evaluation("demo", 2, 3, [], scores, {}).to_markdown())
        demo: 2 queries, 3 passages
        <BLANKLINE>
        | | nDCG@10 | Recall@100 |
        |---|---:|---:|
        | BM25 | 0.250 | 1.000 |
        | all | 0.500 | 1.000 |
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


def read_task(folder: str | Path) -> Task:
    """The task of a folder with corpus.jsonl, test_queries.jsonl and test_qrels.jsonl (FlagEmbedding's custom layout).

    Rows are {"id", "title"?, "text"}, {"id", "text"} and {"qid", "docid", "relevance"}; other fields are ignored, and
    blank lines too. The text of a passage is its title, a space, and its text.

    Raises:
      ValueError: with path:line and what was expected, for a row that is not JSON, lacks a field or has a wrong type, an
        id that is repeated, empty or has whitespace, or a judgement that is repeated or names an unknown id; with the path
        for a missing or empty file; and where no query has a relevant passage.
    """
    folder = Path(folder).resolve()
    corpus, queries = (_read_texts(folder / name) for name in ("corpus.jsonl", "test_queries.jsonl"))
    qrels: dict[str, dict[str, int]] = {}
    path = folder / "test_qrels.jsonl"
    for where, row in _rows(path, {"qid": str, "docid": str, "relevance": int}):
        for field, known, file in (("qid", queries, "test_queries.jsonl"), ("docid", corpus, "corpus.jsonl")):
            if row[field] not in known:
                raise ValueError(
                    f"{where}: expected as {field} an id of {file}, got {row[field]!r}, which is not there."
                )
        judged = qrels.setdefault(row["qid"], {})
        if row["docid"] in judged:
            raise ValueError(
                f"{where}: expected one judgement of each query and passage, got a second of {row['qid']!r} and"
                f" {row['docid']!r}."
            )
        judged[row["docid"]] = row["relevance"]
    return Task(folder.name, corpus, queries, qrels)


def read_tasks(folders: Sequence[str | Path]) -> list[Task]:
    """The tasks of several folders; where two have one name ("test"), each is named by its path. ValueError as `read_task`,
    and for a folder that is given twice."""
    if len({Path(folder).resolve() for folder in folders}) < len(folders):
        raise ValueError(f"each folder is measured once; got one of them twice: {', '.join(map(str, folders))}")
    tasks = [read_task(folder) for folder in folders]
    if len({task.name for task in tasks}) < len(tasks):
        tasks = [replace(task, name=Path(folder).as_posix()) for task, folder in zip(tasks, folders, strict=True)]
    return tasks


def measure(run: Mapping[str, Mapping[str, float]], qrels: Qrels) -> dict[str, float]:
    """Means of nDCG@10 and Recall@100 over the queries of qrels that have a relevant passage, by trec_eval.

    A query that the run lacks counts 0. Among equal scores trec_eval ranks by passage id, not by the run's order.

    Raises:
      ValueError: where no query has a relevant passage.

    >>> measure({"q": {"a": 2.0, "b": 1.0}}, {"q": {"a": 1}, "not in the run": {"b": 1}, "nothing relevant": {"b": 0}})
    {'ndcg_at_10': 0.5, 'recall_at_100': 0.5}
    """
    relevant = _with_relevant(qrels)
    if not relevant:
        raise ValueError("measure: expected qrels with a query that has a passage of relevance 1 or more, got none.")
    evaluator = pytrec_eval.RelevanceEvaluator(
        {query: dict(qrels[query]) for query in relevant}, {"ndcg_cut.10", "recall.100"}
    )
    found = evaluator.evaluate({query: dict(run[query]) for query in relevant if run.get(query)})
    return {name: sum(values[trec] for values in found.values()) / len(relevant) for name, trec in _TREC.items()}


def evaluate(
    m3: M3,
    task: Task,
    *,
    functions: Sequence[Function] = FUNCTIONS,
    baseline: bool = True,
    max_length: int | None = None,
    query_max_length: int | None = None,
    progress: bool = False,
) -> Evaluation:
    """Encode a task's queries and passages, rank by each function, and measure.

    Args:
      functions: those of m3jax.search, with its default weights and depths.
      baseline: whether to measure BM25 too, on the terms that the model sees.
      max_length, query_max_length: tokens of passages and of queries; None is the model's positions.
      progress: show the progress of encode.

    Raises:
      ValueError: as `m3jax.encode` and `m3jax.search` do.
    """
    warnings, texts = [], {"queries": list(task.judged_queries.values()), "passages": list(task.corpus.values())}
    terms: dict[str, list[list[int]]] = {}
    embeddings: dict[str, Embeddings] = {}
    for kind, length in (("queries", query_max_length), ("passages", max_length)):
        length = m3.config.max_length if length is None else length
        terms[kind], cut = _terms(m3.tokenizer, texts[kind], length)
        if cut:
            warnings.append(f"{cut} of {len(texts[kind])} {kind} were cut to {length} tokens")
        embeddings[kind] = m3jax.encode(
            m3,
            texts[kind],
            dense=set(functions) != {"sparse"},
            sparse=not {"sparse", "dense+sparse", "all"}.isdisjoint(functions),
            colbert=not {"colbert", "all"}.isdisjoint(functions),
            max_length=length,
            progress=progress,
        )
    runs = {"bm25": bm25(task, terms["queries"], terms["passages"])} if baseline else {}
    for function in functions:
        runs[function] = rank(task, embeddings["queries"], embeddings["passages"], by=function)
    return Evaluation(
        name=task.name,
        queries=len(task.judged_queries),
        passages=len(task.corpus),
        warnings=task.warnings + warnings,
        scores={function: measure(run, task.qrels) for function, run in runs.items()},
        runs=runs,
    )


def rank(task: Task, queries: Embeddings, passages: Embeddings, *, by: Function) -> Run:
    """The best DEPTH passages of each judged query; the rows are those of `task.judged_queries` and `task.corpus`.

    Raises:
      ValueError: where the numbers of rows are others, and as `m3jax.search` does.
    """
    query_ids, passage_ids = list(task.judged_queries), list(task.corpus)
    if (len(queries), len(passages)) != (len(query_ids), len(passage_ids)):
        raise ValueError(
            f"rank: task {task.name} has {len(query_ids)} judged queries and {len(passage_ids)} passages, got embeddings"
            f" of {len(queries)} and {len(passages)}; encode task.judged_queries.values() and task.corpus.values()."
        )
    results = search(queries, passages, by=by, k=DEPTH)
    return {
        query: {passage_ids[row]: score for row, score in zip(rows, scores, strict=True) if row >= 0}
        for query, rows, scores in zip(query_ids, results.indices.tolist(), results.scores.tolist(), strict=True)
    }


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


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m train.evaluate`: print the table of each folder and of their mean, and write them where --output says."""
    parser = argparse.ArgumentParser(
        prog="python -m train.evaluate", description="nDCG@10 and Recall@100 of BM25 and of a model's five functions."
    )
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="a released directory, a checkpoint of ours, or a hub name"
    )
    parser.add_argument("--task", required=True, choices=["custom"], help="custom: the files of --data")
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        metavar="FOLDER",
        help="each with corpus.jsonl, test_queries.jsonl and test_qrels.jsonl",
    )
    parser.add_argument(
        "--output", metavar="DIR", help="where results.json, results.md and the TREC runs go, a folder each"
    )
    parser.add_argument("--max_length", type=int, help="tokens of a passage (default: the model's positions)")
    parser.add_argument("--query_max_length", type=int, help="tokens of a query (default: the model's positions)")
    flags = parser.parse_args(arguments)
    try:
        # The data first: reading it takes seconds, encoding it may take hours.
        tasks = [read_task(folder) for folder in flags.data]
        if len({task.name for task in tasks}) < len(tasks):
            # All folders called "test": their parents tell them apart.
            tasks = [
                replace(task, name=Path(folder).as_posix()) for task, folder in zip(tasks, flags.data, strict=True)
            ]
        m3 = m3jax.load(flags.model)
        done = []
        for task in tasks:
            if done:
                print()
            lengths = {"max_length": flags.max_length, "query_max_length": flags.query_max_length}
            done.append(evaluate(m3, task, progress=True, **lengths))
            print(done[-1].to_markdown(), flush=True)
            if flags.output is not None:
                done[-1].write(Path(flags.output) / task.name.replace("/", "-") if len(tasks) > 1 else flags.output)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if len(done) > 1:
        overall = mean(done)
        print(f"\n{overall.to_markdown()}")
        if flags.output is not None:
            overall.write(flags.output)


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
    )


def _terms(tokenizer: Tokenizer, texts: Sequence[str], max_length: int) -> tuple[list[list[int]], int]:
    """The ids of each text that can be lexical terms, and how many texts were cut."""
    rows, cut = tokenizer.encode(texts, max_length)
    unused = np.array(sorted(tokenizer.unused_ids))
    return [row[~np.isin(row, unused)].tolist() for row in rows], cut


def _with_relevant(qrels: Qrels) -> Collection[str]:
    # Not a set, whose order changes from process to process, and with it the last digit of a mean.
    return dict.fromkeys(
        query for query, judged in qrels.items() if any(relevance > 0 for relevance in judged.values())
    )


_ID = "a str that is neither empty nor has whitespace (TREC files could not hold it)"


def _is_id(id: str) -> bool:
    return len(id.split()) == 1 and id.split()[0] == id


def _read_texts(path: Path) -> dict[str, str]:
    texts: dict[str, str] = {}
    for where, row in _rows(path, {"id": str, "text": str}, optional={"title": str}):
        id = row["id"]
        if not _is_id(id):
            raise ValueError(f"{where}: expected as id {_ID}, got {id!r}.")
        if id in texts:
            raise ValueError(f"{where}: expected an id that no other row has, got {id!r} again.")
        texts[id] = f"{row.get('title', '')} {row['text']}".strip()
    if not texts:
        raise ValueError(f"{path}: expected at least one row, got none.")
    return texts


def _rows(path: Path, fields: dict[str, type], optional: dict[str, type] | None = None) -> Iterator[tuple[str, dict]]:
    """("path:line", row) of each line that is not blank; ValueError if a row is not an object with these fields."""
    expected = ", ".join(f"{name}: {kind.__name__}" for name, kind in fields.items())
    if not path.is_file():
        raise ValueError(f"{path}: expected a file of JSON lines {{{expected}}}, got no such file.")
    for where, line in read_lines(path):
        try:
            row = parse_object(line)
            if missing := [name for name in fields if name not in row]:
                raise ValueError(f"the row lacks {', '.join(missing)}; {came(row)}")
            for name, kind in {**fields, **(optional or {})}.items():
                # type() and not isinstance: true is no relevance.
                if name in row and type(row[name]) is not kind:
                    raise ValueError(f"`{name}` must be of type {kind.__name__}; {came(row[name])}")
        except ValueError as error:
            raise ValueError(f"{where}: expected {{{expected}}}: {error}.") from None
        yield where, row


if __name__ == "__main__":
    main()
