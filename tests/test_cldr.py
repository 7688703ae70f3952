"""The rules of the embedded data: strings kept apart, relevance complete, ids as transformers gives them.

How well a model learns from it is the quickstart's own figure, not tested here.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("babel", reason="the embedded data comes with Babel (the train extra)")

from babel import Locale
from tokenizers import Tokenizer

from train.data import cldr
from train.data.cldr import Entry, entry_facts, entry_names, normalise, passage, write_demo

SETS = ("dev", "test", "test-unseen")


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def small() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cldr, "LANGUAGES", ("sw", "es", "fr", "ru", "bg", "hi", "ne", "ar"))
        patch.setattr(cldr, "QUERIES", {"dev": 40, "test": 80, "test-unseen": 40})
        patch.setattr(cldr, "VOCABULARY", 3000)
        yield patch


@pytest.fixture(scope="module")
def demo(small: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo")
    write_demo(directory, seed=0)
    return directory


def test_full_size_in_numbers() -> None:
    locales = {code: Locale.parse(code) for code in cldr.LANGUAGES}
    names = {code: entry_names(locale) for code, locale in locales.items()}
    facts = entry_facts()
    entries = set().union(*names.values())
    told = [
        sum(passage(entry, facts.get(entry, ()), names[code], locales[code]) is not None for code in locales)
        for entry in entries
    ]
    assert sum(count >= cldr.PASSAGE_LANGUAGES for count in told) * cldr.PASSAGE_LANGUAGES > 5000
    assert {entry.kind for entry in entries} >= {"territory", "language", "currency", "script", "unit", "zone"}


def test_passage_in_the_locales_own_listing() -> None:
    names, facts, locale = entry_names(Locale("sw")), entry_facts(), Locale("sw")
    tanzania = Entry("territory", "TZ")
    text = passage(tanzania, facts[tanzania], names, locale)
    assert text == "Tanzania: Kiswahili, Kiingereza na Shilingi ya Tanzania"
    assert passage(Entry("territory", "nowhere"), (), names, locale) is None


def test_counts_and_layout(demo: Path) -> None:
    rows = read(demo / "train.jsonl")
    assert all(set(row) == {"query", "pos", "neg"} and row["neg"] == [] for row in rows)
    assert {len(row["pos"]) for row in rows} <= set(range(1, cldr.PASSAGE_LANGUAGES + 1))
    assert all(len(row["query"]) <= cldr.QUERY_LENGTH for row in rows)
    assert len(rows) > 2000
    texts = read(demo / "texts.jsonl")
    assert all(set(row) == {"text"} for row in texts)
    assert {text for row in rows for text in row["pos"]} <= {row["text"] for row in texts}
    for name in SETS:
        folder = demo / name
        corpus, queries, qrels = (read(folder / f"{f}.jsonl") for f in ("corpus", "test_queries", "test_qrels"))
        assert len(queries) == cldr.QUERIES[name]
        assert len({row["id"] for row in corpus}) == len(corpus) and len({row["id"] for row in queries}) == len(queries)
        assert {row["qid"] for row in qrels} == {row["id"] for row in queries}
        assert {row["docid"] for row in qrels} <= {row["id"] for row in corpus}
        assert all(len(row["text"].split()) > 1 and len(row["text"]) <= cldr.PASSAGE_LENGTH for row in corpus)
        assert (folder / "corpus.jsonl").read_bytes() == (demo / "test" / "corpus.jsonl").read_bytes()


def test_evaluation_queries_stand_in_no_training_text_and_no_relevant_passage(demo: Path) -> None:
    rows = read(demo / "train.jsonl")
    training = "\n".join({normalise(text) for row in rows for text in (row["query"], *row["pos"])})
    asked: list[str] = []
    for name in SETS:
        texts = {row["id"]: normalise(row["text"]) for row in read(demo / name / "corpus.jsonl")}
        queries = {row["id"]: normalise(row["text"]) for row in read(demo / name / "test_queries.jsonl")}
        assert [query for query in queries.values() if query in training] == []
        assert not any(queries[r["qid"]] in texts[r["docid"]] for r in read(demo / name / "test_qrels.jsonl"))
        asked += queries.values()
    assert len(set(asked)) == len(asked)


def test_relevant_are_all_passages_of_the_one_entry_in_other_languages(demo: Path) -> None:
    names = {code: entry_names(Locale.parse(code)) for code in cldr.LANGUAGES}
    named: dict[str, set[Entry]] = defaultdict(set)
    for known in names.values():
        for entry, found in known.items():
            for name in found:
                named[normalise(name)].add(entry)
    facts = entry_facts()
    assert [row for row in read(demo / "train.jsonl") if len(named.get(normalise(row["query"]), "1")) > 1] == []
    for name in SETS:
        corpus = [row["id"] for row in read(demo / name / "corpus.jsonl")]
        relevant: dict[str, set[str]] = defaultdict(set)
        for row in read(demo / name / "test_qrels.jsonl"):
            relevant[row["qid"]].add(row["docid"])
        for row in read(demo / name / "test_queries.jsonl"):
            name_of, language, _ = row["id"].rsplit(".", 2)
            kind, code = name_of.split(".", 1)
            assert relevant[row["id"]] == {doc for doc in corpus if doc.rsplit(".", 1)[0] == name_of}
            assert not any(doc.endswith(f".{language}") for doc in relevant[row["id"]])
            asked = Entry(kind, code)
            if normalise(row["text"]) in named:
                assert named[normalise(row["text"])] == {asked}
            else:
                told = set(facts[asked][: cldr.FACTS])
                assert [e for e, known in facts.items() if told <= set(known)] == [asked]


def test_unseen_entries_are_told_nowhere_in_training(demo: Path) -> None:
    rows = read(demo / "train.jsonl")
    asked = {row["query"] for row in rows}
    training = (
        asked | {text for row in rows for text in row["pos"]} | {row["text"] for row in read(demo / "texts.jsonl")}
    )
    corpus = {row["id"]: row["text"] for row in read(demo / "test-unseen" / "corpus.jsonl")}
    unseen = {row["docid"] for row in read(demo / "test-unseen" / "test_qrels.jsonl")}
    assert training.isdisjoint(corpus[doc] for doc in unseen)
    unseen_entries = {Entry(*doc.rsplit(".", 1)[0].split(".", 1)) for doc in unseen}
    names = {code: entry_names(Locale.parse(code)) for code in cldr.LANGUAGES}
    facts, checked = entry_facts(), 0
    for doc, text in corpus.items():
        name_of, language = doc.rsplit(".", 1)
        told = set(facts.get(Entry(*name_of.split(".", 1)), ())[: cldr.FACTS])
        if hidden := told & unseen_entries & names[language].keys():
            checked += 1
            assert text not in training, f"{text} tells {hidden}"
    assert checked > 10
    # What is left of such passages is still learnt from, and all the others are learnt as they stand.
    seen = {corpus[row["docid"]] for row in read(demo / "test" / "test_qrels.jsonl")}
    assert len(seen & training) > 0.5 * len(seen)
    assert not {text for text in training - asked if text not in corpus.values()} <= set()


def test_same_seed_same_files(small: pytest.MonkeyPatch, demo: Path, tmp_path: Path) -> None:
    write_demo(tmp_path, seed=0)
    files = sorted(path.relative_to(demo) for path in demo.rglob("*.json*"))
    assert len(files) == 12
    assert [str(file) for file in files if (demo / file).read_bytes() != (tmp_path / file).read_bytes()] == []
    write_demo(tmp_path, seed=1)
    assert (demo / "train.jsonl").read_bytes() != (tmp_path / "train.jsonl").read_bytes()


def test_ids_are_those_of_transformers(demo: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the reference for token ids")
    tokenizer = Tokenizer.from_file(str(demo / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    assert [tokenizer.id_to_token(i) for i in (0, 1, 2, 3, size - 1)] == ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    (tmp_path / "config.json").write_text('{"model_type": "xlm-roberta"}')
    (tmp_path / "tokenizer.json").write_bytes((demo / "tokenizer.json").read_bytes())
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = [row["text"] for row in read(demo / "test" / "corpus.jsonl")[:2000]]
    texts += ["", " ", "  two   spaces\u00a0and\ttabs\n", "漢字 🙂 unknown", "a <mask> b <unk> c", "x<mask>y </s>"]
    assert [encoding.ids for encoding in tokenizer.encode_batch(texts)] == theirs(texts)["input_ids"]
    assert tokenizer.encode("a", "b").ids == theirs("a", "b")["input_ids"]


def test_too_few_queries_is_an_error(small: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cldr, "QUERIES", {"dev": 40, "test": 80, "test-unseen": 100_000})
        with pytest.raises(ValueError, match="test-unseen needs 100000 queries"):
            write_demo(tmp_path / "none", seed=0)
    assert not (tmp_path / "none").exists()
