"""The disk that embeddings take: said first, refused where it is not there. Not here: shards as they are written."""

import json
import re

import numpy as np
import pytest

import m3jax
from m3jax import __main__ as program
from m3jax import corpus, room, shards
from m3jax.arguments import make_plan
from tests.small_corpus import SMALL, TEXTS, files, small_model, stopped


@pytest.fixture(scope="module")
def m3(tiny_tokenizer):
    return small_model(tiny_tokenizer)


def said(capsys):
    return capsys.readouterr().err.splitlines()


def test_the_size_is_said_first(m3, tmp_path, capsys):
    for dtype in ("float16", "int8", "float32"):
        m3jax.encode_to(tmp_path / dtype, m3, TEXTS, colbert_dtype=dtype, **SMALL)
        (line,) = said(capsys)
        numbers = [int(n.replace(",", "")) for n in re.findall(r"(?:dense|sparse about|colbert about) ([\d,]+)", line)]
        parts = json.loads(files(tmp_path / dtype)["finished.json"])["parts"]
        assert (
            line.startswith(f"{tmp_path / dtype}: 23 texts take dense {23 * 64:,}, sparse about ")
            and " are free" in line
        )
        assert numbers[0] + 5 * 128 >= parts["dense"]["bytes"] >= numbers[0]
        for number, part in zip(numbers[1:], ("sparse", "colbert"), strict=True):  # here the sample is all
            assert parts[part]["bytes"] == pytest.approx(number, abs=5 * 8)
    m3jax.encode_to(tmp_path / "y", m3, iter(TEXTS), **SMALL)
    assert "each 1,000,000 texts take dense 64,000,000, sparse about" in said(capsys)[0]
    stopped(m3, tmp_path / "z", 12)
    said(capsys)
    m3jax.encode_to(tmp_path / "z", m3, TEXTS, **SMALL)
    assert said(capsys)[0].endswith("; 10 texts are there")
    m3jax.encode_to(tmp_path / "z", m3, TEXTS, **SMALL)
    assert said(capsys) == []


@pytest.mark.parametrize("kind", [list, np.array, "file"])
def test_the_size_is_estimated_of_all_texts_and_not_of_the_first(m3, tmp_path, capsys, kind):
    """Short ones first, as files that were sorted have them."""
    texts = ["fox"] * 20 + ["fox " * 12] * 20
    (tmp_path / "texts").write_text("\n".join(texts))
    given = program._File(tmp_path / "texts", jsonl=False) if kind == "file" else kind(texts)
    m3jax.encode_to(tmp_path / "x", m3, given, colbert=True, shard_texts=5)
    estimated = re.search(r"colbert about ([\d,]+)", said(capsys)[0])[1]
    took = json.loads(files(tmp_path / "x")["finished.json"])["parts"]["colbert"]["bytes"]
    assert took == pytest.approx(int(estimated.replace(",", "")), abs=8 * 8)


def test_the_sample_is_tokenised_one_by_one_and_to_a_bound(m3, monkeypatch):
    """Ctrl-C waits for one text, and nobody for the tokens of 256 books."""
    monkeypatch.setattr(room, "_CHARACTERS", 100)
    given, tokenise = [], m3.tokenizer.encode
    monkeypatch.setattr(
        type(m3.tokenizer), "encode", lambda self, *a, **how: (given.append(a[0]), tokenise(*a, **how))[1]
    )
    plan = make_plan(
        m3.config, dense=True, sparse=True, colbert=True, max_length=None, instruction="", truncate_dim=None, mcls=False,
        batch_tokens=None,
    )  # fmt: skip
    room.bytes_a_text(m3, ["fox fox " * 4] * 99, plan, "float16")
    assert [len(texts) for texts in given] == [1] * 4


def test_what_does_not_fit_is_refused_before_it_begins(m3, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "free", lambda directory: 23 * 64 + 100)
    monkeypatch.setattr(corpus, "run", lambda *arguments, **how: pytest.fail("it encoded"))
    with pytest.raises(ValueError, match=r"about [\d,]+ bytes are to be written, but 1,572 are free; make room"):
        m3jax.encode_to(tmp_path / "x", m3, TEXTS, **SMALL)
    monkeypatch.undo()
    m3jax.encode_to(tmp_path / "x", m3, TEXTS, **SMALL | {"colbert": False})  # as it says: an output is left out


def test_what_is_left_must_fit_and_not_what_is_there(m3, tmp_path, monkeypatch):
    stopped(m3, tmp_path / "x", 22, colbert=False)
    monkeypatch.setattr(shards, "free", lambda directory: 3 * 64 + 1000)
    assert len(m3jax.encode_to(tmp_path / "x", m3, TEXTS, **SMALL | {"colbert": False})) == 23
