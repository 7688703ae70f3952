"""Texts of wanted lengths in tokens, from a file or made of syllables, and a tokenizer that fits the latter.

Not here: what is measured on them.
"""

import argparse
import gzip
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

MIXES = {"queries": (5, 40), "passages": (50, 400), "documents": (1000, 8000)}


def small_tokenizer(path: Path) -> None:
    """A tokenizer.json of XLM-R's form whose pieces are syllables."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, processors

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = [(piece, 0.0) for piece in special]
    pieces += [(start + syllable, -5.0) for start in ("▁", "") for syllable in syllables()]
    inner = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=3))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.add_special_tokens(special)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    inner.save(str(path))


def syllables() -> list[str]:
    return [consonant + vowel for consonant in "bcdfghjklmnprstvwz" for vowel in "aeiou"]


def source_texts(path: Path | None) -> Iterator[str]:
    """The texts of a file, or words of syllables, in one random order again and again."""
    random = np.random.default_rng(0)
    if path is None:
        words = ["".join(random.choice(syllables(), random.integers(1, 4))) for _ in range(5000)]
        texts = [" ".join(random.choice(words, 100)) for _ in range(500)]
    else:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            texts = [json.loads(x)["text"] if ".jsonl" in path.name else x.rstrip("\n") for x in lines if x.strip()]
    return itertools.cycle([texts[i] for i in random.permutation(len(texts))])


def make_texts(given: argparse.Namespace, low: int, high: int, count: int) -> tuple[list[str], list[int]]:
    """Texts whose lengths fill low to high evenly, in random order, and their lengths in tokens, `<s>` and `</s>` included."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(given.tokenizer))
    tokenizer.no_truncation()
    source = source_texts(given.texts)
    texts = []
    for length in np.random.default_rng(1).permutation(np.linspace(low, high, count).round().astype(int)):
        parts, room = [], length - 2
        while room > 0:
            part = next(source)[
                : 8 * room + 64
            ]  # tokens are seldom longer; if they are, the next text fills what is left
            encoding = tokenizer.encode(part, add_special_tokens=False)
            parts.append(part if len(encoding) <= room else part[: encoding.offsets[room - 1][1]])
            room -= len(encoding)
        texts.append(" ".join(parts))
    return texts, [len(encoding) for encoding in tokenizer.encode_batch_fast(texts)]
