import gzip
import json
import warnings

import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets")

from train.data import builders
from train.data.builders import prepare

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
    check = builders._check
    monkeypatch.setattr(builders, "_check", lambda files: (calls.append(1), check(files)))
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


def test_texts_cut_are_counted_in_one_warning_every_time(prepared, tiny_tokenizer):
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


def test_scores_and_equal_negatives_are_counted(prepared, tmp_path):
    rows = [
        {
            "query": "q",
            "pos": ["a fox"],
            "neg": ["a dog", "a  fox", "a dog"],
            "pos_scores": [1],
            "neg_scores": [0.5, 2, 3],
        },
        {"query": "q", "pos": ["a fox"], "neg": ["a dog"], "neg_scores": [1e-3]},
        {"query": "q", "pos": ["a fox"], "neg": ["a dog"]},
    ]
    with pytest.warns(UserWarning) as caught:
        source = prepared(write(tmp_path / "rows.jsonl", rows))
    messages = [str(w.message) for w in caught if w.category is UserWarning]
    assert len(messages) == 2
    assert messages[0].startswith("2 rows carry pos_scores or neg_scores")
    assert messages[1].startswith("2 negatives are left out")
    assert source.negatives.tolist() == [1, 1, 1]


BAD_LINES = [
    ("{", r"must be one JSON object; Expecting .* at character 2"),
    ("[1]", r"must be one JSON object; \[1\] came"),
    ('{"query": "q"}', "the field `pos` is required; the row has query"),
    ('{"pos": ["p"]}', "the field `query` is required"),
    ('{"query": " ", "pos": ["p"]}', '`query` must be a non-empty str; " " came'),
    ('{"query": 3, "pos": ["p"]}', "`query` must be a non-empty str; 3 came"),
    ('{"query": "q", "pos": []}', r"`pos` must be a non-empty list of non-empty str; \[\] came"),
    ('{"query": "q", "pos": "p"}', '`pos` must be a non-empty list of non-empty str; "p" came'),
    ('{"query": "q", "pos": ["p", ""]}', r'`pos\[1\]` must be a non-empty str; "" came'),
    ('{"query": "q", "pos": ["p"], "neg": "n"}', '`neg` must be a list of str; "n" came'),
    ('{"query": "q", "pos": ["p"], "neg": ["n", 1]}', r"`neg\[1\]` must be a str; 1 came"),
    ('{"query": "q", "pos": ["p"], "prompt": 1}', "`prompt` must be a str; 1 came"),
    ('{"query": "q", "pos": ["p"], "type": "only_1neg"}', 'rows of `type` "normal" only; "only_1neg" came'),
    ('{"query": "q", "pos": ["p"], "pos_scores": [1, 2]}', "one number for each of 1 texts; 2 came"),
    ('{"query": "q", "pos": ["p"], "pos_scores": ["1"]}', r'`pos_scores` must be a list of numbers; \["1"\] came'),
    ('{"query": "q", "pos": ["p"], "neg_scores": [1]}', "one number for each of 0 texts; 1 came"),
    ('{"query": "q", "pos": ["p"], "negs": []}', "unknown field `negs`. Did you mean `neg`?"),
    ('{"query": "q", "pos": ["p"], "id": 7}', "unknown field `id`. Known fields: query, pos, neg"),
    ('{"query": "q \\ud800", "pos": ["p"]}', r"valid Unicode; lone surrogate '\\ud800' came"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_bad_row(prepared, tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"bad\.jsonl:2: .*{message}"):
        prepared(path)


def test_bad_bytes(prepared, tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(b'{"query": "\xff"}')
    with pytest.raises(ValueError, match=r"bad\.jsonl:1: must be UTF-8; byte 11 is not"):
        prepared(tmp_path / "bad.jsonl")
    whole = gzip.compress(json.dumps(ROWS[0]).encode() * 50)
    (tmp_path / "half.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"half\.jsonl\.gz: not a whole gzip file"):
        prepared(tmp_path / "half.jsonl.gz")


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


def test_bad_paths(prepared, tmp_path, tiny_tokenizer):
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"none: the folder holds no \*\.jsonl"):
        prepared(tmp_path / "none")
    with pytest.raises(ValueError, match=r"lost\.jsonl: no such file"):
        prepared(tmp_path / "lost.jsonl")
    write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"rows\.jsonl: named twice"):
        prepared(tmp_path / "rows.jsonl", tmp_path)
    with pytest.raises(ValueError, match="one path came"):
        prepare("x", tiny_tokenizer, data_dir=tmp_path, query_max_length=9, passage_max_length=9)
    with pytest.raises(ValueError, match="no training files"):
        prepare([], tiny_tokenizer, data_dir=tmp_path, query_max_length=9, passage_max_length=9)


def test_rows_are_found_in_their_files(prepared, tmp_path):
    """By line, blank ones counted, whichever file they stand in."""
    line = json.dumps({"query": "fox", "pos": ["the fox"]})
    (tmp_path / "a.jsonl").write_text(f"\n{line}\n\n{line}\n")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(f"{line}\n")
    source = prepared(tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz")
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"
    assert source.places(np.array([2, 0, 1, 0])) == [f"{b}:1", f"{a}:2", f"{a}:4", f"{a}:2"]
