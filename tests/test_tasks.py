"""Folders of tasks that are read or refused, and metrics beside their formulas in plain Python."""

import math
import re
import shutil

import numpy as np
import pytest

from train.tasks import Task, measure, read_task, read_tasks


def test_read_task(task_folder):
    with (task_folder / "corpus.jsonl").open("a", encoding="utf-8") as file:
        file.write('\n{"id": "p4", "title": "A", "text": "line\u2028separator", "url": "ignored"}\n\n')
    task = read_task(task_folder)
    assert task.name == "demo"
    assert task.corpus == {
        "p1": "Paris is the capital of france",
        "p2": "the quick brown fox",
        "p3": "東京 は 日本 の 首都 です",
        "p4": "A line\u2028separator",
    }
    assert list(task.queries) == ["q1", "q2", "q3", "q4"]
    assert task.qrels == {"q2": {"p2": 2}, "q1": {"p1": 1, "p3": 0}, "q4": {"p2": 0}}
    assert list(task.judged_queries) == ["q1", "q2"]
    assert task.warnings == ["2 of 4 queries have no relevant passage and were left out"]
    assert Task("all judged", {"p": ""}, {"q": ""}, {"q": {"p": 1}}).warnings == []


@pytest.mark.parametrize(
    ("file", "line", "row", "message"),
    [
        (
            "corpus.jsonl",
            2,
            '{"id": "p9", "text": ',
            "expected {id: str, text: str}: must be one JSON object; Expecting value",
        ),
        ("corpus.jsonl", 1, b'{"id": "p9", "text": "\xff"}', "must be UTF-8; byte 22 is not"),
        ("corpus.jsonl", 3, '["p9", "text"]', r"must be one JSON object; \[.*\] came"),
        ("corpus.jsonl", 3, '{"id": "p9", "title": "x"}', "the row lacks text"),
        ("corpus.jsonl", 1, '{"id": "p9", "text": "x", "title": null}', "`title` must be of type str; null came"),
        ("corpus.jsonl", 2, '{"id": "p9", "text": "x \\ud800"}', "valid Unicode; lone surrogate"),
        ("corpus.jsonl", 3, '{"id": "p1", "text": "x"}', "no other row has, got 'p1' again"),
        ("corpus.jsonl", 3, '{"id": "p 1", "text": "x"}', "neither empty nor has whitespace"),
        ("corpus.jsonl", 3, '{"id": "", "text": "x"}', "neither empty nor has whitespace"),
        ("test_queries.jsonl", 2, '{"id": 7, "text": "x"}', "`id` must be of type str; 7 came"),
        ("test_queries.jsonl", 2, '{"id": "q1", "text": "x"}', "no other row has, got 'q1' again"),
        ("test_qrels.jsonl", 1, '{"qid": "q2", "docid": "p2"}', "the row lacks relevance"),
        (
            "test_qrels.jsonl",
            1,
            '{"qid": "q2", "docid": "p2", "relevance": true}',
            "`relevance` must be of type int; true came",
        ),
        (
            "test_qrels.jsonl",
            1,
            '{"qid": "q2", "docid": "p2", "relevance": "1"}',
            '`relevance` must be of type int; "1" came',
        ),
        ("test_qrels.jsonl", 2, '{"qid": "q7", "docid": "p2", "relevance": 1}', "as qid an id of test_queries.jsonl"),
        ("test_qrels.jsonl", 2, '{"qid": "q1", "docid": "p7", "relevance": 1}', "as docid an id of corpus.jsonl"),
        ("test_qrels.jsonl", 2, '{"qid": "q2", "docid": "p2", "relevance": 0}', "got a second of 'q2' and 'p2'"),
    ],
)
def test_a_bad_row_is_named_by_path_and_line(task_folder, file, line, row, message):
    lines = (task_folder / file).read_bytes().splitlines()
    lines[line - 1] = row if isinstance(row, bytes) else row.encode()
    (task_folder / file).write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match=f"{re.escape(str(task_folder / file))}:{line}: .*{message}"):
        read_task(task_folder)


@pytest.mark.parametrize("file", ["corpus.jsonl", "test_queries.jsonl"])
def test_missing_and_empty_files(task_folder, file):
    (task_folder / file).write_text("\n")
    with pytest.raises(ValueError, match=f"{file}: expected at least one row, got none"):
        read_task(task_folder)
    (task_folder / file).unlink()
    with pytest.raises(ValueError, match=f"{file}: expected a file of JSON lines .* got no such file"):
        read_task(task_folder)


def test_a_task_without_a_relevant_passage_is_refused(task_folder):
    (task_folder / "test_qrels.jsonl").write_text('{"qid": "q2", "docid": "p2", "relevance": 0}\n')
    with pytest.raises(ValueError, match="task demo: no query has a passage of relevance 1 or more"):
        read_task(task_folder)


@pytest.mark.parametrize(
    ("corpus", "queries", "qrels", "message"),
    [
        ({}, {"q": ""}, {"q": {}}, "expected passages, got none"),
        ({"p": ""}, {}, {}, "expected queries, got none"),
        ({"p": ""}, {"q": ""}, {"x": {"p": 1}}, "name the query 'x'"),
        ({"p": ""}, {"q": ""}, {"q": {"x": 1}}, "name the passage 'x'"),
        ({"p 1": ""}, {"q": ""}, {"q": {"p 1": 1}}, "ids of passages must be .* got 'p 1'"),
    ],
)
def test_a_task_made_in_memory_is_checked_too(corpus, queries, qrels, message):
    with pytest.raises(ValueError, match=message):
        Task("memory", corpus, queries, qrels)


def test_measure_equals_the_formulas():
    rng = np.random.default_rng(0)
    passages = [f"p{i}" for i in range(300)]
    qrels, run, ndcg, recall = {}, {}, [], []
    for query in map("q{}".format, range(8)):
        qrels[query] = {p: int(rng.integers(0, 4)) for p in rng.choice(passages, 25, replace=False)}
        order = list(rng.permutation(passages))
        run[query] = {p: 1.0 / (position + 1) for position, p in enumerate(order)}
        gains = [qrels[query].get(p, 0) for p in order]
        ideal = sorted(qrels[query].values(), reverse=True)
        dcg, best = (sum(g / math.log2(i + 2) for i, g in enumerate(values[:10])) for values in (gains, ideal))
        ndcg.append(dcg / best)
        recall.append(sum(g > 0 for g in gains[:100]) / sum(g > 0 for g in ideal))
    # One query that found nothing counts 0; one without a relevant passage does not count.
    qrels |= {"found nothing": {"p0": 1}, "nothing relevant": {"p0": 0}}
    run |= {"found nothing": {}, "nothing relevant": {"p0": 1.0}}
    scores = measure(run, qrels)
    assert scores == {"ndcg_at_10": pytest.approx(sum(ndcg) / 9), "recall_at_100": pytest.approx(sum(recall) / 9)}
    assert measure({}, qrels) == {"ndcg_at_10": 0, "recall_at_100": 0}
    with pytest.raises(ValueError, match="relevance 1 or more"):
        measure(run, {"nothing relevant": {"p0": 0}})


def test_tasks_of_one_name_are_told_apart_and_none_is_read_twice(task_folder, tmp_path):
    other = shutil.copytree(task_folder, tmp_path / "other" / task_folder.name)
    assert [task.name for task in read_tasks([task_folder])] == ["demo"]
    assert [task.name for task in read_tasks([task_folder, other])] == [task_folder.as_posix(), other.as_posix()]
    with pytest.raises(ValueError, match="each folder is measured once"):
        read_tasks([task_folder, other / ".." / ".." / "demo"])


def test_a_run_has_ids_for_rows_and_no_empty_places(task_folder):
    task = read_task(task_folder)
    run = task.run(np.array([[2, 0], [1, -1]]), np.array([[0.5, 0.25], [1.0, -np.inf]], np.float32))
    assert run == {"q1": {"p3": 0.5, "p1": 0.25}, "q2": {"p2": 1.0}}
    with pytest.raises(ValueError, match="shorter"):
        task.run(np.array([[2, 0]]), np.array([[0.5, 0.25]], np.float32))
