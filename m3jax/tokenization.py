"""Texts to token ids and back to pieces, on the `tokenizers` library alone.
Padding, batching and everything with arrays on a device is not here; nor is any instruction or prompt text.
"""

from collections.abc import Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path

import numpy as np
import tokenizers

# PAPER §5: content tokens between two CLS tokens.
MCLS_RUN = 256

_REQUIRED = {"cls_id": "<s>", "pad_id": "<pad>", "eos_id": "</s>", "unk_id": "<unk>"}


def cls_columns(length: int, *, mcls: bool) -> range:
    """The columns of the CLS tokens in a text of that many ids: the first, and with mcls each that opens a run.

    >>> list(cls_columns(258, mcls=True)), list(cls_columns(260, mcls=True))
    ([0], [0, 257])
    """
    # The last id is </s>, which opens no run.
    return range(0, max(length - 1, 1), MCLS_RUN + 1) if mcls else range(1)


def utf8(text: str, name: str) -> bytes:
    """The bytes of a text; ValueError, which calls it by its name, where it is no str or has no such form.

    >>> utf8("☃", "texts[0]")
    b'\\xe2\\x98\\x83'
    """
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a str; {type(text).__name__} came: {text!r:.80}")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} is not valid Unicode: lone surrogate {text[error.start]!a} at character {error.start}; decode the source "
            "again, or use text.encode('utf-8', 'replace').decode()"
        ) from error


class Tokenizer:
    """A released `tokenizer.json` at work: `<s> … </s>` around each text, the ids of transformers' fast tokenizer.

    Attributes: `json` (the text it was made from, unchanged), `cls_id`, `pad_id`, `eos_id`, `unk_id`, `mask_id`
    (None where there is no `<mask>`), `unused_ids` (CLS, PAD, EOS, UNK: the ids that give no lexical term).
    """

    def __init__(self, json: str, source: str = "the tokenizer's JSON"):
        try:
            inner = tokenizers.Tokenizer.from_str(json)
        except Exception as error:  # the Rust library raises bare Exception
            raise ValueError(f"{source}: expected the text of a tokenizer.json; `tokenizers` says: {error}") from error
        # Stored settings would cut texts silently and pad them with ids that look real.
        inner.no_truncation()
        inner.no_padding()
        found = {name: inner.token_to_id(token) for name, token in _REQUIRED.items()}
        ids = {name: id for name, id in found.items() if id is not None}
        if missing := [token for name, token in _REQUIRED.items() if name not in ids]:
            raise ValueError(
                f"{source}: a tokenizer needs the tokens {' '.join(_REQUIRED.values())}; missing: {' '.join(missing)}. "
                "Take the tokenizer.json of an XLM-RoBERTa model, or train one with these special tokens."
            )
        self.json = json
        self.cls_id: int = ids["cls_id"]
        self.pad_id: int = ids["pad_id"]
        self.eos_id: int = ids["eos_id"]
        self.unk_id: int = ids["unk_id"]
        self.mask_id: int | None = inner.token_to_id("<mask>")
        self.unused_ids = frozenset(ids.values())
        self._inner = inner
        if (frame := inner.encode("").ids) != [self.cls_id, self.eos_id]:
            raise ValueError(
                f"{source}: the empty text must become <s> </s>, ids {[self.cls_id, self.eos_id]}; it became {frame}. "
                "The post-processor of the tokenizer must be the template `<s> $A </s>`."
            )

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """The tokenizer of the text of a tokenizer.json; ValueError if it is none or lacks a special token."""
        return cls(text)

    @classmethod
    def from_file(cls, path: str | PathLike[str]) -> "Tokenizer":
        """The tokenizer of a tokenizer.json file; ValueError as `from_json`, naming the path."""
        # Bytes, because reading as text would translate line ends and `json` could not be written back unchanged.
        try:
            text = Path(path).read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: expected UTF-8, {error}; download or write it again") from error
        return cls(text, source=str(path))

    @cached_property
    def vocab_size(self) -> int:
        """The largest id + 1, added tokens included: the rows that an embedding table must have."""
        if not isinstance(self._inner.model, tokenizers.models.Unigram):
            return max(self._inner.get_vocab(with_added_tokens=True).values()) + 1
        # The ids of a Unigram model are places in its list: no need to copy 250,000 names.
        return max(
            self._inner.get_vocab_size(with_added_tokens=False),
            *(i + 1 for i in self._inner.get_added_tokens_decoder()),
        )

    def encode(
        self,
        texts: Sequence[str],
        max_length: int | None = None,
        *,
        mcls: bool = False,
    ) -> tuple[list[np.ndarray], int]:
        """Token ids of each text, int32 `[length]` with `<s>` first and `</s>` last, and the number of texts cut.

        A text longer than `max_length` ids keeps its first `max_length - 1` and `</s>`, as Hugging Face truncation
        does; the caller tells the user how many were cut. mcls: a `<s>` stands before every 256 tokens and counts as one
        (PAPER §5); `cls_columns` says where. ValueError for what is not a str or not valid Unicode.
        """
        if isinstance(texts, str):
            raise ValueError("texts must be a sequence of str; one str came. Pass [text].")
        if max_length is not None and max_length < 2:
            raise ValueError(f"max_length must be at least 2, the room of <s> and </s>; {max_length} came.")
        texts = list(texts)
        for index, text in enumerate(texts):
            utf8(text, f"texts[{index}]")
        encodings = self._inner.encode_batch_fast(texts)
        rows = [np.asarray(encoding.ids, np.int32) for encoding in encodings]
        room = max_length
        if room and mcls:  # of the places but that of </s>, one in 257 is a <s>; the first of these a text has anyway
            room -= -(-(room - 1) // (MCLS_RUN + 1)) - 1
        cut = 0
        for index, row in enumerate(rows):
            if room and len(row) > room:
                row = np.append(row[: room - 1], row[-1:])
                cut += 1
            if mcls:
                row = np.insert(row, range(MCLS_RUN + 1, len(row) - 1, MCLS_RUN), self.cls_id)
            rows[index] = row
        return rows, cut

    def pieces(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """The piece of each id, as the vocabulary spells it: `▁a` (a word's start) stays apart from `a`.

        ValueError for an id that the vocabulary does not have.
        """
        pieces = []
        for id in ids:
            piece = self._inner.id_to_token(int(id)) if id >= 0 else None
            if piece is None:
                raise ValueError(f"id {id} has no piece: ids go from 0 to {self.vocab_size - 1}, some may be unused.")
            pieces.append(piece)
        return pieces

    def __repr__(self) -> str:
        return f"Tokenizer({self.vocab_size} ids)"
