"""What a JSONL row of training must be, and the texts that it asks for; errors say the place, the rule and what came."""

import gzip
import json

import pytest

pytest.importorskip("ml_collections", reason="training needs the train extra")

from train.data.rows import TYPES, Texts, check_files, files_of, own_group, parse

GOOD = {"query": "where does the fox live", "pos": ["the fox lives in the forest"], "neg": ["a dog", "a cat"]}


def test_the_least_and_the_most_that_a_row_says():
    assert parse(b'{"query": "q", "pos": ["p"]}') == Texts("q", ["p"], [], 0, None)
    everything = {"prompt": "find: ", "type": "symmetric_sts", "pos_scores": [1], "neg_scores": [0.5, -2]}
    expected = Texts(
        "find: " + GOOD["query"], ["find: " + GOOD["pos"][0]], ["find: a dog", "find: a cat"], 2, [1, 0.5, -2]
    )
    assert parse(json.dumps(GOOD | everything).encode()) == expected
    nulls = dict.fromkeys(("neg", "pos_scores", "neg_scores", "prompt", "type"))
    assert parse(json.dumps(GOOD | nulls).encode()) == Texts(GOOD["query"], GOOD["pos"], [], 0, None)


@pytest.mark.parametrize("kind", TYPES)
def test_only_texts_of_the_same_kind_as_the_query_have_its_prompt(kind):
    row = parse(json.dumps(GOOD | {"type": kind, "prompt": "find: "}).encode())
    assert row.query.startswith("find: ") and TYPES[row.kind] == kind
    prompted = kind in ("symmetric_sts", "symmetric_clustering")
    assert {text.startswith("find: ") for text in row.positives + row.negatives} == {prompted}


def test_names_that_say_no_in_batch_negatives(tmp_path):
    names = ("a_no_in_batch_neg", "a_no_in_batch_neg.jsonl", "x/no_in_batch_neg.jsonl.gz")
    assert all(map(own_group, names)) and own_group(tmp_path / "no_in_batch_neg/")
    assert not any(map(own_group, ("a.jsonl", "no_in_batch_neg/a.jsonl", "no_in_batch_neg_2.jsonl")))


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
    (
        '{"query": "q", "pos": ["p"], "type": "only_2neg"}',
        '`type` must be one of normal, only_1neg, .*"only_2neg" came',
    ),
    ('{"query": "q", "pos": ["p"], "type": 1}', "`type` must be one of .* 1 came"),
    ('{"query": "q", "pos": ["p"], "pos_scores": [1, 2]}', "one number for each of 1 texts; 2 came"),
    ('{"query": "q", "pos": ["p"], "pos_scores": ["1"]}', r'`pos_scores` must be a list of numbers; \["1"\] came'),
    ('{"query": "q", "pos": ["p"], "pos_scores": [true]}', r"`pos_scores` must be a list of numbers; \[true\] came"),
    ('{"query": "q", "pos": ["p"], "pos_scores": [NaN]}', r"`pos_scores` must be finite float32 numbers; \[NaN\] came"),
    ('{"query": "q", "pos": ["p"], "pos_scores": [1e39]}', "must be finite float32 numbers"),
    ('{"query": "q", "pos": ["p"], "neg": ["n"], "pos_scores": [1]}', "all of its texts; `neg_scores` is missing"),
    ('{"query": "q", "pos": ["p"], "neg": ["n"], "neg_scores": [1]}', "all of its texts; `pos_scores` is missing"),
    ('{"query": "q", "pos": ["p"], "neg_scores": [1]}', "one number for each of 0 texts; 1 came"),
    ('{"query": "q", "pos": ["p"], "negs": []}', "unknown field `negs`. Did you mean `neg`?"),
    ('{"query": "q", "pos": ["p"], "id": 7}', "unknown field `id`. Known fields: query, pos, neg"),
    ('{"query": "q \\ud800", "pos": ["p"]}', r"valid Unicode; lone surrogate '\\ud800' came"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_bad_row(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"bad\.jsonl:2: .*{message}"):
        check_files([path])


def test_bad_bytes(tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(b'{"query": "\xff"}')
    with pytest.raises(ValueError, match=r"bad\.jsonl:1: must be UTF-8; byte 11 is not"):
        check_files([tmp_path / "bad.jsonl"])
    whole = gzip.compress(json.dumps(GOOD).encode() * 50)
    (tmp_path / "half.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"half\.jsonl\.gz: not a whole gzip file"):
        check_files([tmp_path / "half.jsonl.gz"])


def test_files_of_datasets(tmp_path):
    for name in ("b.jsonl", "a/z.jsonl", "a/deep/y.jsonl.gz", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = files_of([tmp_path / "b.jsonl", tmp_path / "a"])
    assert found == [[tmp_path / "b.jsonl"], [tmp_path / "a/deep/y.jsonl.gz", tmp_path / "a/z.jsonl"]]


def test_bad_paths(tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"none: the folder holds no \*\.jsonl"):
        files_of([tmp_path / "none"])
    with pytest.raises(ValueError, match=r"lost\.jsonl: no such file"):
        files_of([tmp_path / "lost.jsonl"])
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(ValueError, match=r"rows\.jsonl: named twice"):
        files_of([tmp_path / "rows.jsonl", tmp_path])
    with pytest.raises(ValueError, match="one path came"):
        files_of("x")
    with pytest.raises(ValueError, match="no training files"):
        files_of([])
