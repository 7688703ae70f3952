"""A model measured on a task, with BM25 beside its formula in plain Python."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix

import m3jax
import train.evaluation
from m3jax.embeddings import Embeddings
from train.evaluation import DEPTH, Evaluation, bm25, evaluate, rank
from train.tasks import Task, measure, read_task


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


def test_rank_gives_ids_and_leaves_empty_places_out(task_folder):
    task = read_task(task_folder)
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


def test_evaluate_encodes_what_it_needs_and_measures_every_function(tiny_model, task_folder, monkeypatch, recwarn):
    asked = []
    real = m3jax.encode

    def spy(m3, texts, **arguments):
        asked.append((list(texts), arguments))
        return real(m3, texts, **arguments)

    monkeypatch.setattr(m3jax, "encode", spy)
    small = read_task(task_folder)
    with (task_folder / "corpus.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"id": "p4", "text": "東京 は 日本 " * 30}))
    task = read_task(task_folder)
    evaluation = evaluate(tiny_model, task, max_length=40)
    assert not [str(w.message) for w in recwarn if "cut" in str(w.message)]  # said once, beside the scores
    assert [texts for texts, _ in asked] == [["capital of france", "fox"], list(task.corpus.values())]
    assert [arguments["max_length"] for _, arguments in asked] == [tiny_model.config.max_length, 40]
    assert list(evaluation.scores) == ["bm25", "dense", "sparse", "colbert", "dense+sparse", "all"]
    assert evaluation.scores["bm25"] == {"ndcg_at_10": 1, "recall_at_100": 1}
    assert evaluation.scores["all"]["recall_at_100"] == 1
    assert (evaluation.queries, evaluation.passages) == (2, 4)
    assert evaluation.warnings == [*task.warnings, "1 of 4 passages were cut to 40 tokens"]
    for function, run in evaluation.runs.items():
        assert measure(run, task.qrels) == evaluation.scores[function]
    assert json.loads(json.dumps(evaluation.to_dict()))["scores"] == evaluation.scores

    asked.clear()
    assert list(evaluate(tiny_model, small, functions=["sparse"], baseline=False).scores) == ["sparse"]
    assert all((a["dense"], a["sparse"], a["colbert"]) == (False, True, False) for _, a in asked)
    asked.clear()
    assert list(evaluate(tiny_model, small, functions=["colbert"], baseline=False).scores) == ["colbert"]
    assert all((a["dense"], a["sparse"], a["colbert"]) == (True, False, True) for _, a in asked)


def test_in_slices_with_a_look_before_each_it_measures_the_same(tiny_model, task_folder, monkeypatch):
    task, looks = read_task(task_folder), []
    whole = evaluate(tiny_model, task)
    monkeypatch.setattr(train.evaluation, "_AT_ONCE", 2)
    found = evaluate(tiny_model, task, look=lambda: looks.append(0))
    assert found.runs.keys() == whole.runs.keys() and found.scores == whole.scores
    for function, run in whole.runs.items():
        for query, hits in run.items():
            assert found.runs[function][query] == pytest.approx(hits, abs=1e-5)
    assert len(looks) == 1 + 2 + 5  # 2 judged queries, 3 passages, 5 functions

    def look():
        looks.pop()
        if len(looks) == 4:
            raise StopIteration

    with pytest.raises(StopIteration):
        evaluate(tiny_model, task, look=look)
    assert len(looks) == 4


def test_weights_and_rerank_reach_the_two_hybrid_functions(tiny_model, task_folder):
    task = read_task(task_folder)
    plain = evaluate(tiny_model, task)
    assert plain.weights == {"dense+sparse": (1.0, 0.3, 0.0), "all": (1.0, 0.3, 1.0)}
    weighted = evaluate(tiny_model, task, weights={"all": (0.0, 0.0, 2.0)}, baseline=False)
    assert weighted.weights == {"dense+sparse": (1.0, 0.3, 0.0), "all": (0.0, 0.0, 2.0)}
    for query, hits in weighted.runs["all"].items():
        expected = {passage: 2 * score for passage, score in plain.runs["colbert"][query].items()}
        assert hits == pytest.approx(expected)
    for function in ("dense", "sparse", "colbert", "dense+sparse"):
        assert weighted.runs[function] == plain.runs[function]
    assert weighted.to_dict()["weights"]["all"] == [0.0, 0.0, 2.0]
    assert "Weights of dense, sparse, colbert: 1, 0.3, 0 in dense+sparse; 0, 0, 2 in all." in weighted.to_markdown()
    assert evaluate(tiny_model, task, functions=["dense"], weights={"all": (0, 0, 2)}).weights == {}
    # Three passages cannot be the best of two.
    for function in ("colbert", "all"):
        with pytest.raises(ValueError, match="rerank=2"):
            evaluate(tiny_model, task, functions=[function], rerank=2)


@pytest.mark.parametrize(
    ("functions", "expected"),
    [(["colbert"], 3), (["sparse", "colbert"], 3), (["all"], 200), (["dense", "colbert"], 200), (None, 200)],
)
def test_colbert_ranks_all_where_dense_is_not_asked_for(tiny_model, task_folder, monkeypatch, functions, expected):
    """A hybrid is of dense too: alone it has the ranking that it has beside the others."""
    seen, search = set(), train.evaluation.search
    monkeypatch.setattr(
        train.evaluation,
        "search",
        lambda *given, rerank, **more: seen.add(rerank) or search(*given, rerank=rerank, **more),
    )
    task = read_task(task_folder)
    assert len(task.corpus) == 3
    evaluate(tiny_model, task, **({"functions": functions} if functions else {}))
    assert seen == {expected}


def test_bm25_sees_no_special_and_no_unknown_token(tiny_model):
    task = Task("unknown", {"p1": "fox☃", "p2": "fox"}, {"q": "☃"}, {"q": {"p1": 1}})
    assert evaluate(tiny_model, task, functions=["sparse"]).runs["bm25"] == {"q": {}}


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
