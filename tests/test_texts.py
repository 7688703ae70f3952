"""Plain texts from files and TFDS names: what is read, what is refused, and which batches they make.

Not here: the order of batches itself (test_order.py) and the run (e2e/test_train_retromae.py).
"""

import gzip
import json
import shutil

import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets", reason="training needs the train extra")

import tensorflow_datasets as tfds

from configs import base
from train.data.rows import check_files
from train.data.streams import LengthGroup
from train.data.texts import TextBatches, prepare_texts
from train.data.tfds_sets import rows_file
from train.start import data_paths

TEXTS = [f"fox {'river ' * (n % 5)}house" for n in range(10)]


@pytest.fixture
def prepared(tiny_tokenizer, tmp_path):
    def prepare(*paths, max_length=64):
        return prepare_texts(
            [str(path) for path in paths], tiny_tokenizer, data_dir=tmp_path / "data", max_length=max_length
        )

    return prepare


def write(path, texts):
    path.write_text(
        "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(texts)), encoding="utf-8"
    )
    return path


def test_texts_of_each_kind_of_file(prepared, tiny_tokenizer, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    write(folder / "a.jsonl", TEXTS[:3])
    (folder / "b.txt").write_text("\n".join(["", *TEXTS[3:6]]), encoding="utf-8")
    with gzip.open(folder / "c.txt.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(TEXTS[6:]))
    texts = prepared(folder)
    expected = tiny_tokenizer.encode(TEXTS)[0]
    assert [ids.tolist() for ids in texts.ids(range(10))] == [ids.tolist() for ids in expected]
    assert texts.lengths.tolist() == [len(ids) for ids in expected]
    assert texts.places([3, 0]) == [f"{folder / 'b.txt'}:2", f"{folder / 'a.jsonl'}:1"]
    again = prepared(folder / "a.jsonl", folder)
    assert len(again) == 13 and again.name != texts.name
    assert again.ids([4])[0].tolist() == expected[1].tolist()  # of the second path


class Fables(tfds.core.GeneratorBasedBuilder):
    """Four records with a feature `text`, as a TFDS data set."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None

    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "year": np.int64})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield from ((n, {"text": text, "year": n}) for n, text in enumerate(TEXTS[:4]))


class Riddles(Fables):
    """Training rows as a TFDS data set: `pos` is one text, `neg` several; and `text` is no text."""

    def _info(self):
        texts = tfds.features.Sequence(tfds.features.Text())
        features = {
            "query": tfds.features.Text(),
            "pos": tfds.features.Text(),
            "neg": texts,
            "prompt": tfds.features.Text(),
            "type": tfds.features.Text(),
            "text": texts,
            "id": np.int64,
        }
        features["pos_scores"] = features["neg_scores"] = tfds.features.Sequence(np.float32)
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _generate_examples(self):
        for n in range(5):
            row = {"query": f"what {n}", "pos": f"fox {n}", "neg": ["dog", "house"][: n % 3], "text": ["a"], "id": n}
            row |= {"prompt": "", "type": ""}
            yield n, row | {"pos_scores": [0.5], "neg_scores": [0.25, 0.125][: n % 3]}


def test_rows_of_a_tfds_name(tmp_path):
    path = rows_file("tfds:riddles", tmp_path)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["query"] for row in rows] == [f"what {n}" for n in range(5)]
    assert rows[3] == {"query": "what 3", "pos": ["fox 3"], "pos_scores": [0.5]}
    assert rows[2] == {
        "query": "what 2",
        "pos": ["fox 2"],
        "neg": ["dog", "house"],
        "pos_scores": [0.5],
        "neg_scores": [0.25, 0.125],
    }
    check_files([path])
    config = base.get_config()
    config.data.update(train="tfds:riddles", folder=str(tmp_path))
    assert data_paths(config).train == [path]
    before = path.stat().st_mtime_ns
    assert rows_file("tfds:riddles", tmp_path) == path and path.stat().st_mtime_ns == before
    with pytest.raises(
        ValueError, match="tfds:fables: the features `query`, `pos` are read; the data set has text, year"
    ):
        rows_file("tfds:fables", tmp_path)


def test_a_set_of_the_same_name_and_size_that_was_made_anew_is_another(tmp_path, monkeypatch):
    first = rows_file("tfds:riddles", tmp_path)
    shutil.rmtree(tmp_path / "riddles")
    assert rows_file("tfds:riddles", tmp_path) == first  # the same content
    shutil.rmtree(tmp_path / "riddles")
    generate = Riddles._generate_examples

    def in_capitals(self):
        return ((n, row | {"query": row["query"].upper()}) for n, row in generate(self))

    monkeypatch.setattr(Riddles, "_generate_examples", in_capitals)
    again = rows_file("tfds:riddles", tmp_path)
    assert again != first and json.loads(again.read_text().splitlines()[0])["query"] == "WHAT 0"


def test_a_feature_that_is_no_text_is_refused(prepared):
    with pytest.raises(ValueError, match=r"tfds:riddles#0: `text` must be a str; \[\"a\"\] came"):
        prepared("tfds:riddles")


def test_a_tfds_name(prepared, tiny_tokenizer):
    texts = prepared("tfds:fables")
    assert [ids.tolist() for ids in texts.ids(range(4))] == [
        ids.tolist() for ids in tiny_tokenizer.encode(TEXTS[:4])[0]
    ]
    assert texts.places([2]) == ["tfds:fables#2"]
    with pytest.raises(ValueError, match="tfds:no_such_fables: expected a data set of TFDS"):
        prepared("tfds:no_such_fables")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "fox"}\n{"text": 3}\n', r"a\.jsonl:2: `text` must be a non-empty str; 3 came"),
        ("a.jsonl", '{"query": "fox"}\n', r"a\.jsonl:1: the field `text` is required; the row has query"),
        ("a.jsonl", '{"text": "fox"}\nfox\n', r"a\.jsonl:2: must be one JSON object"),
        ("a.txt", "\n", r"a\.txt: holds no texts"),
        ("a.csv", "fox\n", r"a\.csv: texts are read from"),
    ],
)
def test_what_is_no_text(prepared, tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    for _ in range(2):  # nothing is left that a second try would take for prepared
        with pytest.raises(ValueError, match=message):
            prepared(tmp_path / name)
    with pytest.raises(ValueError, match="no such file or folder of texts"):
        prepared(tmp_path / "absent.jsonl")


def test_what_is_cut_is_said(prepared, tmp_path):
    with pytest.warns(UserWarning, match=r"of 10 texts were cut to 6 token ids"):
        texts = prepared(write(tmp_path / "a.jsonl", TEXTS), max_length=6)
    assert texts.lengths.max() == 6


@pytest.fixture
def batches(prepared, tmp_path):
    short, long = ["fox " + "river " * (n % 5) for n in range(12)], ["fox " * (25 + n) for n in range(8)]
    texts = prepared(write(tmp_path / "a.jsonl", short + long))
    groups = [LengthGroup(20, 2), LengthGroup(64, 4)]

    def make(**options):
        return texts, TextBatches(texts, seed=3, groups=groups, pad_id=1, **options)

    return make


def test_every_text_comes_once_in_a_round_in_a_batch_of_its_group(batches):
    texts, given = batches()
    long = texts.lengths > 20
    steps = int((~long).sum() // 2 + long.sum() // 4)
    assert long.sum() == 8 and steps == 8
    found = [given[step] for step in range(steps)]
    rows = sorted(tuple(row[real].tolist()) for batch in found for row, real in zip(batch.ids, batch.mask, strict=True))
    assert rows == sorted(tuple(ids.tolist()) for ids in texts.ids(range(20)))
    assert {batch.ids.shape[0] for batch in found} == {2, 4}
    assert all(batch.ids[~batch.mask].tolist() == [1] * int((~batch.mask).sum()) for batch in found)
    assert all((batch.mask.sum(axis=1).max() > 20) == (len(batch.ids) == 4) for batch in found)
    group, places = given.places(0)
    line = int(places[0].rpartition(":")[2]) - 1
    assert (
        found[0].ids[0][found[0].mask[0]].tolist() == texts.ids([line])[0].tolist() and len(places) == group.batch_size
    )


def test_parts_of_a_batch_and_lengths_in_steps(batches):
    whole, parts = batches()[1], [batches(held=[part], parts=2)[1] for part in range(2)]
    for step in (0, 5, 100):
        np.testing.assert_array_equal(whole[step].ids, np.concatenate([part[step].ids for part in parts]))
    assert {batches(step=32)[1][step].ids.shape[1] % 32 for step in range(6)} == {0}
