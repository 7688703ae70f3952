"""What is asked of a model, and how its answer is measured: tasks and their folders, nDCG@10 and Recall@100.

Not here: how passages are ranked (evaluation.py). What the metrics mean is pytrec_eval's.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pytrec_eval

from train.files import came, parse_object, read_lines, write_lines

# {query id: {passage id: score}}, best first.
Run = dict[str, dict[str, float]]
Qrels = Mapping[str, Mapping[str, int]]

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

    def run(self, indices: np.ndarray, scores: np.ndarray) -> Run:
        """The run of what m3jax.search found for `judged_queries` in `corpus`: rows become ids, empty places are left out."""
        passages = list(self.corpus)
        return {
            query: {passages[row]: score for row, score in zip(rows, values, strict=True) if row >= 0}
            for query, rows, values in zip(self.judged_queries, indices.tolist(), scores.tolist(), strict=True)
        }


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


def write_task(folder: Path, corpus: Mapping[str, str], queries: Mapping[str, str], qrels: Qrels) -> None:
    """What `read_task` reads, into a folder that need not be there."""
    judged = ((query, passage, relevance) for query, of in qrels.items() for passage, relevance in of.items())
    write_lines(folder / "corpus.jsonl", ({"id": id, "title": "", "text": text} for id, text in corpus.items()))
    write_lines(folder / "test_queries.jsonl", ({"id": id, "text": text} for id, text in queries.items()))
    write_lines(folder / "test_qrels.jsonl", ({"qid": q, "docid": p, "relevance": r} for q, p, r in judged))


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
