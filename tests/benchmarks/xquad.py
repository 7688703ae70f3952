"""Training rows, evaluation folders and the starting model of RESULTS.md's figures for XQuAD questions → English paragraphs.

`python tests/benchmarks/xquad.py DATA OUT`: DATA has load.py and its sets/ and tokenizer/. What is written: OUT/rows/*.jsonl,
OUT/dev/LANGUAGE, OUT/test/LANGUAGE and OUT/start, for the commands of RESULTS.md. Only questions and paragraphs of the train
split become rows; its articles are others than those of dev and test.
"""

import random
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # before this folder, whose train.py is another

import jax
import jax.numpy as jnp
from babel import Locale
from sets import load_py, write_one

import m3jax
from train.files import write_lines

LANGUAGES = ("ar", "de", "el", "es", "hi", "ro", "ru", "th", "tr", "vi", "zh")
WITHOUT_SPACES = ("th", "zh")
_SENTENCE = re.compile(r"[^.!?。！？।]+(?:[.!?。！？।](?=\s|$|[^\s\d])|$)+[”\"»]*")


def row(query: str, passage: str) -> dict[str, Any]:
    return {"query": query, "pos": [passage], "neg": []}


def sentences(text: str) -> list[str]:
    return [found.strip() for found in _SENTENCE.findall(text) if found.strip()]


def chunks(text: str, english: str, language: str) -> list[dict[str, Any]]:
    """Stretches of a translated paragraph, each with the 44 words around the same place of the English one."""
    words, sep, size = (list(text), "", 45) if language in WITHOUT_SPACES else (text.split(), " ", 16)
    theirs, rows = english.split(), []
    for start in range(0, max(1, len(words) - size // 3), size):
        middle = round((start + size / 2) / max(len(words), size) * len(theirs))
        rows.append(row(sep.join(words[start : start + size]), " ".join(theirs[max(0, middle - 22) : middle + 22])))
    return rows


def names() -> list[dict[str, Any]]:
    """CLDR's names of territories, languages, months and days and the English ones, four a row: short texts cost as much as
    longer ones once they are padded."""
    english, pairs = Locale("en"), []
    for language in LANGUAGES:
        locale = Locale(language)
        for kind in ("territories", "languages"):
            theirs, ours = getattr(locale, kind), getattr(english, kind)
            pairs += [(language, theirs[key], ours[key]) for key in ours if key in theirs and theirs[key] != ours[key]]
        for kind in ("months", "days"):
            theirs, ours = (getattr(one, kind)["stand-alone"]["wide"] for one in (locale, english))
            pairs += [(language, theirs[key], ours[key]) for key in theirs]
    random.Random(0).shuffle(pairs)
    by_language = defaultdict(list)
    for language, theirs, ours in pairs:
        by_language[language].append((str(theirs), str(ours)))
    return [
        row(*(", ".join(side) for side in zip(*of[start : start + 4], strict=True)))
        for of in by_language.values()
        for start in range(0, len(of), 4)
    ]


def training(load: Any) -> dict[str, list[dict[str, Any]]]:
    """Questions → paragraphs and → the same question in English; chunks and sentences of paragraphs → English; names."""
    every = (*LANGUAGES, "en")
    corpus = {
        code: {one["id"].split(":")[1]: one["text"].strip() for one in load.read_jsonl(f"xquad/{code}.corpus.jsonl")}
        for code in every
    }
    queries = {
        code: {one["id"]: one["text"] for one in load.read_jsonl(f"xquad/{code}.queries.jsonl")} for code in every
    }
    judged = [line.split("\t") for line in (load.SETS / "xquad/qrels.en.train.tsv").read_text().splitlines()]
    asked = [(query, document.split(":")[1]) for query, _, document, _ in judged]
    rows = defaultdict(list)
    rows["names"] = names()
    for query, document in asked:
        rows["questions"] += [row(queries[code][query], corpus["en"][document]) for code in every]
        rows["pairs"] += [row(queries[code][query], queries["en"][query]) for code in LANGUAGES]
    for document in sorted({document for _, document in asked}):
        english = corpus["en"][document]
        for code in LANGUAGES:
            text = corpus[code][document]
            rows["chunks"] += chunks(text, english, code)
            mine, theirs = sentences(text), sentences(english)
            if len(mine) == len(theirs) and code != "th":  # Thai has no full stop
                pairs = zip(mine, theirs, strict=True)
                rows["sentences"] += [row(a, b) for a, b in pairs if code == "zh" or 0.5 < len(a) / len(b) < 2]
    return rows


def start(tokenizer: m3jax.Tokenizer) -> m3jax.M3:
    """One layer that begins near the identity, on random word vectors without positions: equal pieces match from the first
    step, those that training never sees too, and what is learnt is which others mean the same."""
    width = 128
    sizes = {"hidden_size": width, "colbert_dim": width, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = m3jax.M3Config(
        vocab_size=tokenizer.vocab_size, intermediate_size=256, max_position_embeddings=514, pooler=False, **sizes
    )
    params = m3jax.init(config, jax.random.key(0))
    tables, layer, heads = params["encoder"]["embeddings"], params["encoder"]["layers"][0], params["heads"]
    tables["word_embeddings"]["embedding"] *= 1.5
    for name in ("position_embeddings", "token_type_embeddings"):
        tables[name]["embedding"] *= 0
    for name in ("v", "attention_out"):
        layer[name]["kernel"] = jnp.eye(width)
    for name, factor in (("q", 0.3), ("k", 0.3), ("down", 0.1)):
        layer[name]["kernel"] *= factor
    heads["colbert_linear"]["kernel"] = jnp.eye(width)
    heads["sparse_linear"]["bias"] = jnp.full(1, 0.5)
    return m3jax.M3(config, params, tokenizer)


def main(data: Path, out: Path) -> None:
    load = load_py(data)
    for name, rows in training(load).items():
        write_lines(out / "rows" / f"{name}.jsonl", rows)
        print(f"{len(rows):,} rows of {name}")
    for split in ("dev", "test"):
        for code in LANGUAGES:
            write_one(load, f"xquad/{code}-en/{split}", out / split / code)
    m3jax.save(start(m3jax.Tokenizer.from_file(data / "tokenizer" / "tokenizer.json")), out / "start")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
