"""Tests of train.evaluate: folders that are refused, metrics and BM25 beside formulas in plain Python, and the program."""

import json
import math
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy.sparse import csr_matrix

import m3jax
from m3jax.embeddings import Embeddings
from train.evaluate import DEPTH, Evaluation, Task, bm25, evaluate, main, measure, rank, read_task

CORPUS = [
    {"id": "p1", "title": "Paris", "text": "is the capital of france"},
    {"id": "p2", "title": "", "text": "the quick brown fox"},
    {"id": "p3", "text": "東京 は 日本 の 首都 です"},
]
QUERIES = [
    {"id": "q1", "text": "capital of france"},
    {"id": "q2", "text": "fox"},
    {"id": "q3", "text": "nobody judged this"},
    {"id": "q4", "text": "judged, nothing relevant"},
]
QRELS = [
    {"qid": "q2", "docid": "p2", "relevance": 2},
    {"qid": "q1", "docid": "p1", "relevance": 1},
    {"qid": "q1", "docid": "p3", "relevance": 0},
    {"qid": "q4", "docid": "p2", "relevance": 0},
]
FILES = {"corpus.jsonl": CORPUS, "test_queries.jsonl": QUERIES, "test_qrels.jsonl": QRELS}


@pytest.fixture
def folder(tmp_path):
    """The demonstration task as the three files of a folder."""
    folder = tmp_path / "demo"
    folder.mkdir()
    for name, rows in FILES.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / name).write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def model(tiny_tokenizer):
    """A tiny model of random weights."""
    config = m3jax.M3Config.tiny(vocab_size=tiny_tokenizer.vocab_size)
    return m3jax.M3(config, m3jax.init(config, jax.random.key(0)), tiny_tokenizer)


def test_read_task(folder):
    with (folder / "corpus.jsonl").open("a", encoding="utf-8") as file:
        file.write('\n{"id": "p4", "title": "A", "text": "line\u2028separator", "url": "ignored"}\n\n')
    task = read_task(folder)
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
def test_a_bad_row_is_named_by_path_and_line(folder, file, line, row, message):
    lines = (folder / file).read_bytes().splitlines()
    lines[line - 1] = row if isinstance(row, bytes) else row.encode()
    (folder / file).write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match=f"{re.escape(str(folder / file))}:{line}: .*{message}"):
        read_task(folder)


@pytest.mark.parametrize("file", ["corpus.jsonl", "test_queries.jsonl"])
def test_missing_and_empty_files(folder, file):
    (folder / file).write_text("\n")
    with pytest.raises(ValueError, match=f"{file}: expected at least one row, got none"):
        read_task(folder)
    (folder / file).unlink()
    with pytest.raises(ValueError, match=f"{file}: expected a file of JSON lines .* got no such file"):
        read_task(folder)


def test_a_task_without_a_relevant_passage_is_refused(folder):
    (folder / "test_qrels.jsonl").write_text('{"qid": "q2", "docid": "p2", "relevance": 0}\n')
    with pytest.raises(ValueError, match="task demo: no query has a passage of relevance 1 or more"):
        read_task(folder)


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


def test_bm25_equals_its_formula():
    rng = np.random.default_rng(0)
    passages = [rng.integers(4, 30, rng.integers(1, 40)).tolist() for _ in range(150)] + [[]]
    queries = [rng.integers(4, 36, 5).tolist() for _ in range(6)] + [[], [99], [4, 4, 4]]
    corpus, texts = {f"p{i}": "" for i in range(151)}, {f"q{i}": "" for i in range(9)}
    run = bm25(Task("t", corpus, texts, {q: {"p0": 1} for q in texts}), queries, passages)
    average = sum(map(len, passages)) / len(passages)
    for query, terms in enumerate(queries):
        scores = {}
        for row, passage in enumerate(passages):
            for term in terms:
                count, documents = passage.count(term), sum(term in p for p in passages)
                idf = math.log(1 + (len(passages) - documents + 0.5) / (documents + 0.5))
                weight = count / (count + 0.9 * (1 - 0.4 + 0.4 * len(passage) / average))
                scores[f"p{row}"] = scores.get(f"p{row}", 0) + idf * weight
        best = sorted((-score, id) for id, score in scores.items() if score > 0)[:DEPTH]
        assert list(run[f"q{query}"].values()) == pytest.approx([-score for score, _ in best], rel=1e-4)
        for id, score in run[f"q{query}"].items():
            assert score == pytest.approx(scores[id], rel=1e-4)
    assert run["q6"] == run["q7"] == {} and len(run["q0"]) == DEPTH


def test_bm25_of_equal_scores_the_earlier_passage_comes_first_and_no_terms_are_no_error():
    task = Task("t", {f"p{i}": "" for i in (2, 0, 1, 3)}, {"q": ""}, {"q": {"p0": 1}})
    assert list(bm25(task, [[5]], [[5, 6], [5, 7], [5, 8], [9, 9]])["q"]) == ["p2", "p0", "p1"]
    assert bm25(task, [[5]], [[], [], [], []]) == {"q": {}}


def test_rank_gives_ids_and_leaves_empty_places_out():
    task = read_like(QRELS)
    queries = Embeddings(dense=np.eye(3, dtype=np.float32)[:2])
    passages = Embeddings(dense=np.array([[0.1, 0.9, 0], [0.8, 0.2, 0], [0.5, 0.5, 0]], np.float32))
    run = rank(task, queries, passages, by="dense")
    assert {query: list(hits) for query, hits in run.items()} == {"q1": ["p2", "p3", "p1"], "q2": ["p1", "p3", "p2"]}
    assert run["q1"]["p2"] == pytest.approx(0.8)
    terms = csr_matrix(np.array([[1, 0], [0, 0], [2, 0]], np.float32))
    run = rank(task, Embeddings(terms=terms[:2]), Embeddings(terms=terms), by="sparse")
    assert run == {"q1": {"p3": 2.0, "p1": 1.0}, "q2": {}}
    with pytest.raises(ValueError, match="2 judged queries and 3 passages, got embeddings of 3 and 3"):
        rank(task, passages, passages, by="dense")


def read_like(qrels) -> Task:
    judged = {}
    for row in qrels:
        judged.setdefault(row["qid"], {})[row["docid"]] = row["relevance"]
    return Task("demo", {row["id"]: row["text"] for row in CORPUS}, {row["id"]: row["text"] for row in QUERIES}, judged)


def test_evaluate_encodes_what_it_needs_and_measures_every_function(model, folder, monkeypatch):
    asked = []
    real = m3jax.encode

    def spy(m3, texts, **arguments):
        asked.append((list(texts), arguments))
        return real(m3, texts, **arguments)

    monkeypatch.setattr(m3jax, "encode", spy)
    with (folder / "corpus.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"id": "p4", "text": "東京 は 日本 " * 30}))
    task = read_task(folder)
    with pytest.warns(UserWarning, match="were cut"):
        evaluation = evaluate(model, task, max_length=40)
    assert [texts for texts, _ in asked] == [["capital of france", "fox"], list(task.corpus.values())]
    assert [arguments["max_length"] for _, arguments in asked] == [model.config.max_length, 40]
    assert list(evaluation.scores) == ["bm25", "dense", "sparse", "colbert", "dense+sparse", "all"]
    assert evaluation.scores["bm25"] == {"ndcg_at_10": 1, "recall_at_100": 1}
    assert evaluation.scores["all"]["recall_at_100"] == 1
    assert (evaluation.queries, evaluation.passages) == (2, 4)
    assert evaluation.warnings == [*task.warnings, "1 of 4 passages were cut to 40 tokens"]
    for function, run in evaluation.runs.items():
        assert measure(run, task.qrels) == evaluation.scores[function]
    assert json.loads(json.dumps(evaluation.to_dict()))["scores"] == evaluation.scores

    asked.clear()
    task = read_like(QRELS)
    assert list(evaluate(model, task, functions=["sparse"], baseline=False).scores) == ["sparse"]
    assert all((a["dense"], a["sparse"], a["colbert"]) == (False, True, False) for _, a in asked)
    asked.clear()
    assert list(evaluate(model, task, functions=["colbert"], baseline=False).scores) == ["colbert"]
    assert all((a["dense"], a["sparse"], a["colbert"]) == (True, False, True) for _, a in asked)


def test_bm25_sees_no_special_and_no_unknown_token(model):
    task = Task("unknown", {"p1": "fox☃", "p2": "fox"}, {"q": "☃"}, {"q": {"p1": 1}})
    assert evaluate(model, task, functions=["sparse"]).runs["bm25"] == {"q": {}}


def test_write_leaves_whole_files_and_a_trec_run(tmp_path):
    runs = {"dense+sparse": {"q1": {"p2": 0.1, "p1": float(np.float32(0.1))}, "q2": {}}}
    scores = {"dense+sparse": {"ndcg_at_10": 0.5, "recall_at_100": 1.0}}
    evaluation = Evaluation("demo", 2, 3, ["1 of 3 queries left out"], scores, runs)
    for _ in range(2):  # the second time over the first
        evaluation.write(tmp_path / "new" / "folder")
    files = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "new" / "folder").iterdir()}
    assert files.keys() == {"dense+sparse.run", "results.json", "results.md"}
    assert files["dense+sparse.run"] == (
        "q1 Q0 p2 1 0.1 m3jax-dense+sparse\nq1 Q0 p1 2 0.10000000149011612 m3jax-dense+sparse\n"
    )
    assert json.loads(files["results.json"]) == evaluation.to_dict()
    assert "| dense+sparse | 0.500 | 1.000 |" in files["results.md"]
    assert files["results.md"].endswith("\n\nWarning: 1 of 3 queries left out.\n")


def test_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    Evaluation("old", 1, 1, [], {}, {}).write(tmp_path)

    def half(path: Path, content: str, encoding: str) -> None:
        path.write_bytes(content[: len(content) // 2].encode(encoding))
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="disk full"):
        Evaluation("new", 1, 1, [], {}, {}).write(tmp_path)
    assert (tmp_path / "results.md").read_text(encoding="utf-8").startswith("old: ")
    assert json.loads((tmp_path / "results.json").read_bytes())["name"] == "old"


def test_the_program_prints_the_table_and_writes_the_files(model, folder, tmp_path, monkeypatch, capsys):
    loaded = []
    monkeypatch.setattr(m3jax, "load", lambda directory: loaded.append(directory) or model)
    arguments = ["--model", "somewhere", "--task", "custom", "--data", str(folder)]
    main([*arguments, "--output", str(tmp_path / "out"), "--max_length", "100"])
    assert loaded == ["somewhere"]
    printed = capsys.readouterr().out
    assert [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")] == [
        *("", "BM25", "dense", "sparse", "colbert", "dense+sparse", "all")
    ]
    assert (tmp_path / "out" / "results.md").read_text(encoding="utf-8") == printed
    assert len((tmp_path / "out" / "all.run").read_text(encoding="utf-8").splitlines()) == 2 * 3

    # Two folders of one name: told apart by their paths, each with its own files, and the mean of both.
    other = tmp_path / "other" / folder.name
    shutil.copytree(folder, other)
    main([*arguments, str(other), "--output", str(tmp_path / "both")])
    assert "mean of 2 tasks: 4 queries" in capsys.readouterr().out
    written = sorted(path.parent.name for path in (tmp_path / "both").glob("*/all.run"))
    assert len(written) == 2 and all(name.endswith(f"-{folder.name}") for name in written)
    single = json.loads((tmp_path / "out" / "results.json").read_text())["scores"]
    assert json.loads((tmp_path / "both" / "results.json").read_text())["scores"] == single

    with pytest.raises(SystemExit, match=r"error: .* fit the position table"):
        main([*arguments, "--max_length", "100000"])
    (folder / "test_qrels.jsonl").write_text("{}\n")
    loaded.clear()
    with pytest.raises(SystemExit, match=r"error: .*test_qrels.jsonl:1: expected"):
        main(arguments)
    assert loaded == []  # bad data is said before a model is read
