import gzip
import json
import warnings
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets")

from train.data import builders
from train.data.builders import prepare
from train.data.rows import TYPES

ROOT = Path(__file__).parents[1]
ROWS = [
    {"query": "where does the fox live", "pos": ["the fox lives in the forest"], "neg": ["a dog", "a cat", "a house"]},
    {"query": "paris", "pos": ["paris is the capital", "la ville de paris"], "neg": []},
    {"query": "capital", "pos": ["paris is the capital"], "prompt": "what is the ", "type": "normal"},
    {"query": "fox", "pos": ["the fox"], "neg": None, "pos_scores": None, "prompt": None},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def prepared(tiny_tokenizer, tmp_path):
    def run(*paths, lengths=(64, 64)):
        return prepare(
            paths or [write(tmp_path / "rows.jsonl", ROWS)],
            tiny_tokenizer,
            data_dir=tmp_path / "data",
            query_max_length=lengths[0],
            passage_max_length=lengths[1],
        )

    return run


def test_rows_come_back(prepared, tiny_tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        source = prepared()
    assert len(source) == 4
    for row, got in zip(ROWS, source.rows([0, 1, 2, 3]), strict=True):
        query = (row.get("prompt") or "") + row["query"]
        texts = [query, *row["pos"], *(row.get("neg") or [])]
        expected, _ = tiny_tokenizer.encode(texts)
        assert [ids.tolist() for ids in (got.query, *got.passages)] == [ids.tolist() for ids in expected]
        assert all(ids.dtype == np.int32 for ids in (got.query, *got.passages))
        assert got.positives == len(row["pos"])
        assert got.identity.shape == (len(got.passages), 2) and got.identity.dtype == np.uint32
    assert [row.query.tolist() for row in source.rows([2, 0])] == [source.rows([i])[0].query.tolist() for i in (2, 0)]


def test_identity_is_of_the_passage(prepared):
    rows = prepared().rows([0, 1, 2])
    keys = [[tuple(key) for key in row.identity.tolist()] for row in rows]
    assert keys[1][0] == keys[2][0]
    assert len({key for row in keys for key in row}) == sum(map(len, keys)) - 1
    assert max(max(key) for row in keys for key in row) > 2**31  # unsigned survives the file


def test_lengths_stand_beside(prepared):
    source = prepared()
    rows = source.rows(range(4))
    assert source.query_lengths.tolist() == [len(row.query) for row in rows]
    assert source.passage_lengths.tolist() == [max(map(len, row.passages)) for row in rows]
    assert source.positives.tolist() == [1, 2, 1, 1]
    assert source.negatives.tolist() == [3, 0, 0, 0]
    assert source.kinds.tolist() == [0, 0, 0, 0]


def test_many_rows_keep_their_order(prepared, tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(builders, "_ROWS_PER_ENCODE", 7)
    rows = [{"query": "fox " * (i % 9 + 1), "pos": ["a " * (i + 1)]} for i in range(60)]
    source = prepared(write(tmp_path / "many.jsonl", rows), lengths=(64, 500))
    alone, _ = tiny_tokenizer.encode([row["pos"][0] for row in rows])
    assert [row.passages[0].tolist() for row in source.rows(range(60))] == [ids.tolist() for ids in alone]
    assert source.passage_lengths.tolist() == [len(ids) for ids in alone]


def test_folders_and_gz(prepared, tmp_path):
    folder = tmp_path / "set"
    (folder / "deep").mkdir(parents=True)
    write(folder / "b.jsonl", ROWS[:1])
    (folder / "notes.txt").write_text("not rows")
    with gzip.open(folder / "deep" / "c.jsonl.gz", "wt") as file:
        file.write(json.dumps(ROWS[1]) + "\n\n")
    write(folder / "a.jsonl", ROWS[2:3])
    assert prepared(folder).positives.tolist() == [1, 1, 2]  # a, b, deep/c


def test_prepared_once_until_something_changes(prepared, tmp_path, monkeypatch):
    calls = []
    check = builders.check_files
    monkeypatch.setattr(builders, "check_files", lambda files: (calls.append(files), check(files)))
    path = write(tmp_path / "rows.jsonl", ROWS)
    first = prepared(path)
    again = prepared(path)
    assert len(calls) == 1
    assert first.rows([1])[0].query.tolist() == again.rows([1])[0].query.tolist() and again.counts == first.counts
    prepared(path, lengths=(64, 63))
    write(path, ROWS[::-1])
    assert prepared(path).positives.tolist() == [1, 1, 2, 1]
    assert len(calls) == 3


def test_interrupted_preparation_is_not_taken_for_finished(prepared, tmp_path, monkeypatch):
    encode = builders._encode
    monkeypatch.setattr(builders, "_ROWS_PER_ENCODE", 2)

    def interrupted(chunk, *rest):
        if chunk[0].query == "what is the capital":
            raise KeyboardInterrupt
        return encode(chunk, *rest)

    monkeypatch.setattr(builders, "_encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepared()
    assert not list((tmp_path / "data").rglob("*.array_record*")) and not list((tmp_path / "data").rglob("*.npy"))
    monkeypatch.setattr(builders, "_encode", encode)
    assert len(prepared()) == 4


def test_two_runs_that_start_at_once_share_what_one_of_them_wrote(prepared, monkeypatch):
    """As three seeds of a run on one data folder do."""
    encode, meanwhile = builders._encode, []

    def slowly(*given):
        monkeypatch.undo()
        meanwhile.append(prepared())
        return encode(*given)

    monkeypatch.setattr(builders, "_encode", slowly)
    assert prepared().counts == meanwhile[0].counts and len(prepared()) == len(ROWS)


def test_peer_2_10_texts_cut_are_counted_in_one_warning_every_time(prepared, tiny_tokenizer):
    """PEER §2.10: there they are cut silently."""
    queries, _ = tiny_tokenizer.encode([(r.get("prompt") or "") + r["query"] for r in ROWS])
    passages, _ = tiny_tokenizer.encode([t for r in ROWS for t in (*r["pos"], *(r.get("neg") or []))])
    cut = sum(len(ids) > 8 for ids in queries), sum(len(ids) > 12 for ids in passages)
    assert cut[0] and cut[1]
    expected = f"{cut[0]} of 4 queries were cut to 8 token ids and {cut[1]} of 8 passages to 12"
    for _ in range(2):
        with pytest.warns(UserWarning, match=expected) as caught:
            source = prepared(lengths=(8, 12))
        assert len([w for w in caught if w.category is UserWarning]) == 1
    assert source.query_lengths.max() == 8 and source.passage_lengths.max() == 12


def test_scores_stay_with_their_passages(prepared, tmp_path):
    scores = {"pos_scores": [1], "neg_scores": [0.5, 2, 3, -7]}
    rows = [
        {"query": "q", "pos": ["a fox"], "neg": ["a dog", "a  fox", "a dog", "a cat"]} | scores,
        {"query": "q", "pos": ["a fox", "fox"], "pos_scores": [0.25, 1e-3]},
        {"query": "q", "pos": ["a fox"], "neg": ["a dog"], "pos_scores": None, "neg_scores": None},
        {"query": "q", "pos": ["a fox"], "neg": [], "neg_scores": []},
    ]
    with pytest.warns(UserWarning) as caught:
        source = prepared(write(tmp_path / "rows.jsonl", rows))
    messages = [str(w.message) for w in caught if w.category is UserWarning]
    assert len(messages) == 1 and messages[0].startswith("2 negatives are left out")
    assert source.negatives.tolist() == [2, 0, 1, 0] and source.counts["rows_with_scores"] == 2
    found = [row.scores for row in source.rows(range(4))]
    expected = [[1, 0.5, -7], [0.25, 1e-3], [-np.inf, -np.inf], [-np.inf]]
    assert [x.tolist() for x in found] == [np.float32(x).tolist() for x in expected]
    assert all(x.dtype == np.float32 for x in found)


def test_peer_2_1_a_row_without_a_prompt_has_none(prepared, tmp_path, tiny_tokenizer):
    """PEER §2.1: there, with batches of one dataset, the query is trained as "None" + text."""
    rows = [{"query": "the fox", "pos": ["a"]}, {"query": "the fox", "pos": ["a"], "prompt": None}]
    expected = tiny_tokenizer.encode(["the fox"])[0][0].tolist()
    assert [row.query.tolist() for row in prepared(write(tmp_path / "rows.jsonl", rows)).rows([0, 1])] == [expected] * 2


def test_types_say_where_the_prompt_goes(prepared, tmp_path, tiny_tokenizer):
    row = {"query": "the fox", "pos": ["a dog"], "neg": ["a cat"], "prompt": "what is "}
    rows = [row | {"type": kind} for kind in TYPES]
    source = prepared(write(tmp_path / "rows.jsonl", rows))
    assert source.kinds.tolist() == [0, 1, 2, 3, 4]
    for kind, got in zip(TYPES, source.rows(range(5)), strict=True):
        before = "what is " if kind in ("symmetric_sts", "symmetric_clustering") else ""
        expected, _ = tiny_tokenizer.encode(["what is the fox", before + "a dog", before + "a cat"])
        assert [ids.tolist() for ids in (got.query, *got.passages)] == [ids.tolist() for ids in expected]


def test_datasets_are_prepared_each_by_itself(prepared, tmp_path, monkeypatch):
    calls = []
    check = builders.check_files
    monkeypatch.setattr(builders, "check_files", lambda files: (calls.append([f.name for f in files]), check(files)))
    (tmp_path / "b_no_in_batch_neg").mkdir()
    one = write(tmp_path / "a.jsonl", ROWS[:1])
    write(tmp_path / "b_no_in_batch_neg" / "x.jsonl", ROWS[1:2])
    write(tmp_path / "b_no_in_batch_neg" / "y.jsonl", ROWS[2:])
    two = tmp_path / "b_no_in_batch_neg"
    alone = prepared(one)
    both = prepared(one, two)
    turned = prepared(two, one)
    assert calls == [["a.jsonl"], ["x.jsonl", "y.jsonl"]]
    assert both.datasets == [(str(one), 1, False), (str(two), 3, True)]
    assert both.positives.tolist() == [1, 2, 1, 1] and turned.positives.tolist() == [2, 1, 1, 1]
    assert len(alone) == 1 and len(both) == len(turned) == 4
    assert both.counts["rows"] == 4 and both.counts["passages"] == 8
    order = [3, 0, 1, 0, 2]
    assert [row.query.tolist() for row in both.rows(order)] == [both.rows([i])[0].query.tolist() for i in order]
    assert [row.query.tolist() for row in turned.rows([3, 0])] == [row.query.tolist() for row in both.rows([0, 1])]
    files = [one, two / "x.jsonl", two / "y.jsonl"]
    assert both.places([3, 0, 1]) == [f"{files[2]}:2", f"{files[0]}:1", f"{files[1]}:1"]
    renamed = two.rename(tmp_path / "b")
    assert len({source.name for source in (alone, both, turned, prepared(one, renamed))}) == 4
    assert len(calls) == 2


def test_all_first_errors_at_once_and_nothing_prepared(prepared, tmp_path):
    good = json.dumps(ROWS[0])
    (tmp_path / "a.jsonl").write_text("\n".join([good, "{", good, '{"query": "q"}']))
    (tmp_path / "b.jsonl").write_text("3\n")
    (tmp_path / "c.jsonl").write_text("\n")
    with pytest.raises(ValueError) as error:
        prepared(*(tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl")))
    for place in ("a.jsonl:2: ", "a.jsonl:4: ", "b.jsonl:1: ", "c.jsonl: holds no rows"):
        assert place in str(error.value)
    assert not list((tmp_path / "data").rglob("*.array_record*"))
    (tmp_path / "b.jsonl").write_text("3\n" * 50)
    with pytest.raises(ValueError, match="first 10; there may be more") as error:
        prepared(tmp_path / "b.jsonl")
    assert str(error.value).count("b.jsonl:") == 10
