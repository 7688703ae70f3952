"""encode_to: what is on disk is what encode gives, in bounded memory, and what it refuses.

Not here: runs that were stopped and went on, and those of several processes (test_corpus_resumed.py).
"""

import json
import shutil
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from tqdm import tqdm

import m3jax
from m3jax import corpus, shards
from tests.small_corpus import ALL, SMALL, TEXTS, files, raising, small_model

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def m3(tiny_tokenizer):
    return small_model(tiny_tokenizer)


@pytest.fixture(scope="module")
def whole(m3, tmp_path_factory):
    """The files of `TEXTS`, never interrupted."""
    directory = tmp_path_factory.mktemp("corpus") / "whole"
    m3jax.encode_to(directory, m3, TEXTS, **SMALL)
    return files(directory)


@pytest.mark.parametrize("texts", [TEXTS, tuple(TEXTS), np.array(TEXTS), iter(TEXTS)], ids=lambda x: type(x).__name__)
def test_it_holds_what_encode_gives(m3, tmp_path, whole, texts):
    got = m3jax.encode_to(tmp_path / "new" / "x", m3, texts, colbert_dtype="float32", **SMALL)
    for start in range(0, 23, 5):
        own, expected = got[start : start + 5], m3jax.encode(m3, TEXTS[start : start + 5], **ALL)
        assert own.dense.tobytes() == expected.dense.tobytes()
        assert own.lexical_weights == expected.lexical_weights
        assert [x.tolist() for x in own.colbert] == [x.tolist() for x in expected.colbert]
    np.testing.assert_allclose(got.dense_vecs[:], m3jax.encode(m3, TEXTS).dense_vecs, atol=1e-5)
    again = m3jax.open_embeddings(tmp_path / "new" / "x")
    assert len(again) == 23 and again.dense_vecs[:].tobytes() == got.dense_vecs[:].tobytes()
    names = {path.name for path in (tmp_path / "new" / "x").iterdir()}
    assert names == {*(f"shard-{index:08d}" for index in range(5)), "settings.json", "finished.json"}


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_colbert_is_stored_in_fewer_bits(m3, tmp_path, dtype):
    got = m3jax.encode_to(tmp_path / "x", m3, TEXTS, colbert_dtype=dtype, **SMALL)
    assert np.load(tmp_path / "x" / "shard-00000000" / "colbert.npy").dtype == dtype
    expected = m3jax.encode(m3, TEXTS, **ALL)
    for stored, vectors in zip(got.colbert_vecs, expected.colbert, strict=True):
        np.testing.assert_allclose(stored, vectors, atol=1 / 254 if dtype == "int8" else 2**-11)


def test_every_argument_of_encode_reaches_it(m3, tmp_path):
    asked = {
        "colbert": True,
        "max_length": 30,
        "instruction": "the dog ",
        "truncate_dim": 4,
        "mcls": True,
        "batch_tokens": 64,
    }
    got = m3jax.encode_to(tmp_path / "x", m3, TEXTS, colbert_dtype="float32", **asked)
    expected = m3jax.encode(m3, TEXTS, **asked)
    np.testing.assert_array_equal(got.dense_vecs[:], expected.dense)
    assert got.sparse[:].nnz == expected.terms.nnz and got.colbert_vecs[3].tolist() == expected.colbert[3].tolist()
    assert not np.allclose(m3jax.encode(m3, TEXTS, truncate_dim=4).dense, expected.dense)


def test_only_what_is_asked_for(m3, tmp_path):
    got = m3jax.encode_to(tmp_path / "x", m3, TEXTS, sparse=False)
    assert got.sparse is None and got.colbert_vecs is None and got.dense_vecs.shape == (23, 16)
    assert json.loads(files(tmp_path / "x")["settings.json"])["colbert_dtype"] is None


def test_no_texts(m3, tmp_path):
    got = m3jax.encode_to(tmp_path / "x", m3, iter([]), **SMALL)
    assert len(got) == 0 and got.dense_vecs.shape == (0, 16) and got.sparse.shape == (0, m3.config.vocab_size)
    assert len(got[:]) == 0 and len(m3jax.encode_to(tmp_path / "x", m3, [], **SMALL)) == 0
    assert m3jax.score(m3jax.encode(m3, ["a"], **ALL), got).hybrid.shape == (1, 0)


def test_bad_arguments(m3, tmp_path):
    for arguments, error, message in (
        ({"max_lenght": 3}, TypeError, "max_lenght"),
        ({"truncate_dim": 17}, ValueError, "between 1 and the width of the vectors that are asked for, 16, got 17"),
        ({"shard_texts": 0}, ValueError, "shard_texts must be at least 1, got 0"),
        ({"colbert_dtype": "int4"}, ValueError, "colbert_dtype must be one of float16, int8, float32, got 'int4'"),
        ({"colbert_dtype": "int8"}, ValueError, "colbert_dtype is of colbert, which is not asked for; got 'int8'"),
        ({"mcls": 1}, ValueError, "mcls must be True or False, got 1"),
        ({"max_length": 99}, ValueError, "2 to 38, got 99"),
        ({"max_length": 4.5}, ValueError, "max_length must be a whole number, got 4.5"),
        ({"shard_texts": 4.5}, ValueError, "shard_texts must be a whole number, got 4.5"),
        ({"shard_texts": True}, ValueError, "shard_texts must be a whole number, got True"),
        ({"progress": "no"}, ValueError, "progress must be True or False, got 'no'"),
        ({"dense": False, "sparse": False}, ValueError, "must give something"),
    ):
        with pytest.raises(error, match=message):
            m3jax.encode_to(tmp_path / "x", m3, TEXTS, **arguments)
    for texts in ("one text", b"bytes", None, 5):
        with pytest.raises(ValueError, match=f"texts must be an iterable of str, got {texts!r}; of one text pass"):
            m3jax.encode_to(tmp_path / "x", m3, texts)
    with pytest.raises(ValueError, match="must be on a file system, got gs://bucket/x"):
        m3jax.encode_to("gs://bucket/x", m3, TEXTS)
    assert not list(tmp_path.iterdir())
    numbers = {"max_length": np.int64(9), "truncate_dim": np.int64(4), "shard_texts": np.int64(2), "mcls": np.False_}
    m3jax.encode_to(tmp_path / "x", m3, ["a"], **numbers)


def test_a_bad_text_is_named_by_its_place_in_the_corpus(m3, tmp_path, whole):
    for bad, message in ((None, "text 13 must be a str; NoneType came"), ("a\ud800", "text 13 is not valid Unicode")):
        with pytest.raises(ValueError, match=message):
            m3jax.encode_to(tmp_path / "x", m3, [*TEXTS[:13], bad, *TEXTS[14:]], **SMALL)
    with pytest.raises(ValueError, match="text 0 must be a str; int came"):  # before anything is written
        m3jax.encode_to(tmp_path / "y", m3, [5], colbert=True, colbert_dtype="int8")
    for directory in ("x", "y"):
        m3jax.encode_to(tmp_path / directory, m3, TEXTS, **SMALL)
        assert files(tmp_path / directory) == whole


class Announced:
    """Texts of a source that can be read once, and what it says of their number."""

    def __init__(self, texts, length):
        self.texts, self.length = iter(texts), length

    def __len__(self):
        return self.length

    def __iter__(self):
        yield from self.texts


def test_texts_that_can_be_read_once_are_all_there_whatever_says_how_many(m3, tmp_path, whole):
    bar = tqdm((text for text in TEXTS), total=len(TEXTS), disable=True)
    untold = tqdm((text for text in TEXTS), disable=True)
    for number, texts in enumerate((bar, untold, Announced(TEXTS, len(TEXTS)))):
        m3jax.encode_to(tmp_path / str(number), m3, texts, **SMALL)
        assert files(tmp_path / str(number)) == whole


@pytest.mark.parametrize("length", [22, 24, 90])
def test_other_numbers_than_announced_are_refused_before_the_last_shard(m3, tmp_path, whole, length):
    """What ends early, a download or a data set that shrank, is not taken for a whole corpus."""
    with pytest.raises(ValueError, match=rf"as many as len\(texts\) says, {length}, but 23 came; pass all of them"):
        m3jax.encode_to(tmp_path / "x", m3, Announced(TEXTS, length), **SMALL)
    assert shards.there(tmp_path / "x") == {0, 1, 2, 3}
    with pytest.raises(ValueError, match="not finished"):
        m3jax.open_embeddings(tmp_path / "x")
    m3jax.encode_to(tmp_path / "x", m3, TEXTS, **SMALL)
    assert files(tmp_path / "x") == whole


def test_cut_texts_are_counted_once_for_all(m3, tmp_path):
    texts = [text * 20 if number % 4 == 1 else text for number, text in enumerate(TEXTS)]
    with pytest.warns(UserWarning) as expected:
        m3jax.encode(m3, texts, max_length=9)
    more = {"shard_texts": 5, "max_length": 9}
    with pytest.raises(OSError):
        m3jax.encode_to(tmp_path / "x", m3, raising(texts, 13), **more)
    for _ in range(2):  # resumed, then finished
        with pytest.warns(UserWarning) as caught:
            m3jax.encode_to(tmp_path / "x", m3, texts, **more)
        assert [str(w.message) for w in caught] == [str(expected[0].message)] and caught[0].filename == __file__


def test_a_shard_is_closed_by_its_characters(m3, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "SHARD_CHARACTERS", 60)
    texts = ["a" * length for length in (20, 30, 10, 1, 99, 59, 1)]
    with pytest.warns(UserWarning, match="longer than max_length"):
        m3jax.encode_to(tmp_path / "x", m3, texts)
    assert json.loads(files(tmp_path / "x")["finished.json"])["shards"] == [3, 1, 1, 2]


def test_a_shard_with_colbert_is_closed_by_its_size(m3, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "COLBERT_BYTES", 6 * 4 * 60)  # of 60 tokens
    texts = ["a" * length for length in (1000, 18, 18, 18, 3, 1, 50, 1)]  # which count for 38, 20, 20, 20, 5, 3, 38, 3
    for colbert, counts in ((True, [2, 4, 2]), (False, [8])):
        with pytest.warns(UserWarning, match="longer than max_length"):
            m3jax.encode_to(tmp_path / str(colbert), m3, texts, colbert=colbert)
        assert json.loads(files(tmp_path / str(colbert))["finished.json"])["shards"] == counts


def test_memory_is_that_of_two_shards(m3, tmp_path, monkeypatch):
    """Of one that is written and one that waits for it: the disk is slower here."""

    def run(m3, parts, plan, *, deliver, taken_in):
        for key, texts in parts:
            deliver(key, (np.ones((len(texts), 2**18), np.float32), None, None), 0)

    monkeypatch.setattr(corpus, "run", run)
    m3jax.encode_to(tmp_path / "first", m3, ["a"] * 8, sparse=False, shard_texts=4)
    tracemalloc.start()
    try:
        m3jax.encode_to(tmp_path / "x", m3, ("a" for _ in range(4 * 20)), sparse=False, shard_texts=4)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(map(len, files(tmp_path / "x").values())) > 80 * 2**20
    assert 8 * 2**20 <= peak < 14 * 2**20


def test_a_longer_corpus_takes_no_more_memory(m3, tmp_path):
    """But for the record of each shard, of 2 kB. The shards are alike, so that no shape is compiled meanwhile."""

    def peak(name, shards):
        texts = (TEXTS[i % 23] for i in range(230 * shards))
        tracemalloc.start()
        try:
            m3jax.encode_to(tmp_path / name, m3, texts, colbert=True, shard_texts=230)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak("compiled", 6)
    more, longer = peak("more", 6), peak("longer", 24)
    written = [sum(map(len, files(tmp_path / name).values())) for name in ("more", "longer")]
    assert longer - more < 0.2 * (written[1] - written[0])


def test_a_shard_is_written_while_the_next_is_encoded(m3, tmp_path, monkeypatch):
    write, put, encoded = shards.write_shard, corpus._Writer.put, threading.Event()

    def waits(directory, index, rows, **more):
        assert threading.current_thread() is not threading.main_thread()
        if index == 0:
            assert encoded.wait(60)
        return write(directory, index, rows, **more)

    def came(writer, group, *given):
        if group.index == 1:
            encoded.set()
        put(writer, group, *given)

    monkeypatch.setattr(shards, "write_shard", waits)
    monkeypatch.setattr(corpus._Writer, "put", came)
    assert len(m3jax.encode_to(tmp_path / "x", m3, TEXTS, sparse=False, shard_texts=5)) == 23


def test_progress_only_when_asked(m3, tmp_path, capsys):
    m3jax.encode_to(tmp_path / "x", m3, TEXTS, **SMALL)
    assert "/23" not in capsys.readouterr().err
    shutil.rmtree(tmp_path / "x")
    m3jax.encode_to(tmp_path / "x", m3, TEXTS, progress=True, **SMALL)
    assert "23/23" in capsys.readouterr().err
