"""JSONL rows (`query`, `pos`, `neg`) checked, tokenised once and kept as array_record by a TFDS builder, and read back.
Order, groups, drawing and padding are not here (`pipeline`), nor any set of our own: the demo set writes JSONL too.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import io
import itertools
import warnings
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from m3jax.tokenization import Tokenizer
from train.files import came, parse_object, read_lines

_FIELDS = ("query", "pos", "neg", "pos_scores", "neg_scores", "prompt", "type")
_ERRORS_SHOWN = 10
_ROWS_PER_ENCODE = 256  # enough texts for every thread of `tokenizers`, few enough to hold


class Row(NamedTuple):
    """One training row as token ids, with `<s>` and `</s>`, cut to the maximum lengths.

    `passages` are the positives, then the negatives; `positives` counts the former. `identity` uint32 `[passages, 2]`
    is a 64-bit hash of the passage's ids: equal for passages that the model cannot tell apart.
    """

    query: np.ndarray
    passages: list[np.ndarray]
    positives: int
    identity: np.ndarray


class RowSource:
    """Prepared rows by index; `len` is their number.

    `query_lengths`, `passage_lengths` (the longest of the row), `positives`, `negatives`: int32 `[rows]`, on disk
    until read. `query_max_length`: what queries were cut to. `counts`: what `prepare` warned of, by name. `name`: a hash
    of the files, the tokenizer and the lengths.
    """

    def __init__(self, builder: "Rows"):
        self._records = builder.as_data_source(split="train")  # pyright: ignore[reportCallIssue] (a wrapped method)
        table = np.load(builder.data_path / _TABLE, mmap_mode="r")
        self.query_lengths, self.passage_lengths, self.positives, self.negatives = table
        self.counts: dict[str, int] = dict(builder.info.metadata or {})
        assert isinstance(builder.builder_config, RowsConfig)
        self.query_max_length = builder.builder_config.query_max_length
        self._files = builder.builder_config.files
        self.name: str = builder.data_path.parent.name

    def __len__(self) -> int:
        return len(self._records)

    def rows(self, indices: Sequence[int] | np.ndarray) -> list[Row]:
        """The rows of these indices, in their order."""
        rows = []
        for record in self._records.__getitems__([int(index) for index in indices]):
            query, *passages = np.split(record["ids"], np.cumsum(record["lengths"])[:-1])
            rows.append(Row(query, passages, int(record["positives"]), record["identity"]))
        return rows

    def places(self, indices: Sequence[int] | np.ndarray) -> list[str]:
        """Where the rows of these indices stand, path:line, in their order; the files are read again up to the last of them."""
        wanted = {int(index) for index in indices}
        lines = enumerate(where for path in self._files for where, _ in read_lines(path))
        found = {row: where for row, where in itertools.islice(lines, max(wanted) + 1) if row in wanted}
        return [found[int(index)] for index in indices]


def prepare(
    paths: Sequence[str | PathLike[str]],
    tokenizer: Tokenizer,
    *,
    data_dir: str | PathLike[str],
    query_max_length: int,
    passage_max_length: int,
) -> RowSource:
    """Checks, tokenises and stores the rows of JSONL files, or of folders of them, unless that is done already.

    `paths` are files (`.gz` is opened) or folders, searched for `*.jsonl` and `*.jsonl.gz` in sorted order. What is
    stored under `data_dir` is found again by the files' contents, the tokenizer and the maximum lengths (in token ids).
    A row is `{"query": str, "pos": [str, …], "neg"?: [str, …], "prompt"?: str, "type"?: "normal", "pos_scores"?,
    "neg_scores"?}`; `prompt` is put before the query; an optional field may be null. ValueError lists the first bad
    rows as path:line before anything is stored. Warns of texts cut, of teacher scores (not used) and of negatives
    left out because they equal a positive or another negative of their row; says how many.
    """
    files = _files(paths)
    digest = hashlib.blake2b(digest_size=8)
    for part in (tokenizer.json, str(query_max_length), str(passage_max_length)):
        digest.update(hashlib.blake2b(part.encode()).digest())
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    config = RowsConfig(
        name=digest.hexdigest(),
        files=files,
        tokenizer=tokenizer,
        query_max_length=query_max_length,
        passage_max_length=passage_max_length,
    )
    builder = Rows(data_dir=Path(data_dir), config=config, file_format="array_record")
    if not builder.data_path.exists():
        _check(files)
        tfds.disable_progress_bar()
        # TFDS prints that it downloads; what happens here has its own progress bar, on stderr.
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
    source = RowSource(builder)
    _warn(source.counts, query_max_length, passage_max_length)
    return source


def _warn(counts: dict[str, int], query_max_length: int, passage_max_length: int) -> None:
    if counts["queries_cut"] or counts["passages_cut"]:
        warnings.warn(
            f"{counts['queries_cut']} of {counts['rows']} queries were cut to {query_max_length} token ids and "
            f"{counts['passages_cut']} of {counts['passages']} passages to {passage_max_length}. Raise "
            "query_max_length or passage_max_length to keep them whole.",
            stacklevel=3,
        )
    if counts["rows_with_scores"]:
        warnings.warn(
            f"{counts['rows_with_scores']} rows carry pos_scores or neg_scores: this version does not train on teacher "
            "scores, they are not used.",
            stacklevel=3,
        )
    if counts["negatives_left_out"]:
        warnings.warn(
            f"{counts['negatives_left_out']} negatives are left out: their token ids equal those of a positive or of "
            "another negative of the same row.",
            stacklevel=3,
        )


# --- Files and rows ---------------------------------------------------------------------------------------------------


class _Texts(NamedTuple):
    query: str
    positives: list[str]
    negatives: list[str]
    scored: bool


def _files(paths: Sequence[str | PathLike[str]]) -> list[Path]:
    if isinstance(paths, str | PathLike):
        raise ValueError(f"paths must be a list of files and folders; one path came: {str(paths)!r}. Pass [path].")
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.name.endswith((".jsonl", ".jsonl.gz")) and p.is_file())
            if not found:
                raise ValueError(f"{path}: the folder holds no *.jsonl or *.jsonl.gz file.")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"{path}: no such file or folder of training rows.")
    if not files:
        raise ValueError("no training files were named: expected at least one JSONL file or folder.")
    seen: set[Path] = set()
    for path in files:
        if path.resolve() in seen:
            raise ValueError(f"{path}: named twice among the training files; its rows would count double.")
        seen.add(path.resolve())
    return files


def _check(files: Sequence[Path]) -> None:
    errors: list[str] = []
    for path in files:
        empty = True
        for where, line in read_lines(path):
            empty = False
            try:
                _parse(line)
            except ValueError as error:
                errors.append(f"{where}: {error}")
                if len(errors) == _ERRORS_SHOWN:
                    raise ValueError(_report(errors)) from None
        if empty:
            errors.append(f"{path}: holds no rows")
    if errors:
        raise ValueError(_report(errors))


def _report(errors: list[str]) -> str:
    more = f" (the first {_ERRORS_SHOWN}; there may be more)" if len(errors) >= _ERRORS_SHOWN else ""
    return f"bad training rows{more}; nothing was prepared:\n  " + "\n  ".join(errors)


def _parse(line: bytes) -> _Texts:
    """One row; ValueError says the rule and what came, without the place."""
    row = parse_object(line)
    for name in row:
        if name not in _FIELDS:
            close = difflib.get_close_matches(name, _FIELDS, n=1)
            hint = f"Did you mean `{close[0]}`?" if close else f"Known fields: {', '.join(_FIELDS)}."
            raise ValueError(f"unknown field `{name}`. {hint}")
    for name in ("query", "pos"):
        if name not in row:
            raise ValueError(f"the field `{name}` is required; the row has {', '.join(row) or 'none'}")
    query, positives = row["query"], row["pos"]
    negatives = _optional(row, "neg", [])
    prompt = _optional(row, "prompt", "")
    kind = _optional(row, "type", "normal")
    if not (isinstance(query, str) and query.strip()):
        raise ValueError(f"`query` must be a non-empty str; {came(query)}")
    if not (isinstance(positives, list) and positives):
        raise ValueError(f"`pos` must be a non-empty list of non-empty str; {came(positives)}")
    for index, text in enumerate(positives):
        if not (isinstance(text, str) and text.strip()):
            raise ValueError(f"`pos[{index}]` must be a non-empty str; {came(text)}")
    if not isinstance(negatives, list):
        raise ValueError(f"`neg` must be a list of str; {came(negatives)}")
    for index, text in enumerate(negatives):
        if not isinstance(text, str):
            raise ValueError(f"`neg[{index}]` must be a str; {came(text)}")
    if not isinstance(prompt, str):
        raise ValueError(f"`prompt` must be a str; {came(prompt)}")
    if kind != "normal":
        raise ValueError(f'this version trains rows of `type` "normal" only; {came(kind)}')
    scored = False
    for name, texts in (("pos_scores", positives), ("neg_scores", negatives)):
        scores = _optional(row, name, None)
        if scores is None:
            continue
        scored = True
        # bool is an int to Python, and never a score
        if not isinstance(scores, list) or not all(type(score) in (int, float) for score in scores):
            raise ValueError(f"`{name}` must be a list of numbers; {came(scores)}")
        if len(scores) != len(texts):
            raise ValueError(f"`{name}` must have one number for each of {len(texts)} texts; {len(scores)} came")
    return _Texts(prompt + query, positives, negatives, scored)


def _optional(row: dict[str, Any], name: str, default: Any) -> Any:
    """Tables written as JSONL have null where a row lacks the field."""
    return default if row.get(name) is None else row[name]


# --- The TFDS builder -------------------------------------------------------------------------------------------------

_TABLE = "lengths.npy"
_COUNTS = ("rows", "passages", "queries_cut", "passages_cut", "rows_with_scores", "negatives_left_out")


@dataclasses.dataclass(eq=False, kw_only=True)
class RowsConfig(tfds.core.BuilderConfig):
    """Where a prepared set comes from; its `name` is the hash of all this."""

    files: list[Path] = dataclasses.field(repr=False)
    tokenizer: Tokenizer
    query_max_length: int
    passage_max_length: int


class Rows(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # a registered name is global to the process
    """Training rows as token ids; VERSION changes with the record's layout."""

    VERSION = tfds.core.Version("1.0.0")
    # Where TFDS would look for checksums of downloads, and for that import a package that it does not declare.
    code_path = None

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "ids": tfds.features.Tensor(shape=(None,), dtype=np.int32),  # query, positives, negatives
                "lengths": tfds.features.Tensor(shape=(None,), dtype=np.int32),  # of each of those texts
                "positives": tfds.features.Scalar(np.int32),
                "identity": tfds.features.Tensor(shape=(None, 2), dtype=np.uint32),  # of each passage
            }
        )
        # Shuffled records would not stand in the order of the table.
        return tfds.core.DatasetInfo(
            builder=self, features=features, metadata=tfds.core.MetadataDict(), disable_shuffling=True
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        config = self.builder_config
        assert isinstance(config, RowsConfig)
        counts = self.info.metadata
        assert counts is not None
        counts.update(dict.fromkeys(_COUNTS, 0))
        table: list[tuple[int, int, int, int]] = []
        texts = (_parse(line) for path in config.files for _, line in read_lines(path))
        with tqdm(desc="tokenising", unit=" rows", disable=None) as progress:
            while chunk := list(itertools.islice(texts, _ROWS_PER_ENCODE)):
                for row in _encode(chunk, config, counts):
                    lengths = [len(text) for text in (row.query, *row.passages)]
                    table.append((lengths[0], max(lengths[1:]), row.positives, len(row.passages) - row.positives))
                    yield (
                        len(table) - 1,
                        {
                            "ids": np.concatenate([row.query, *row.passages]),
                            "lengths": np.array(lengths, np.int32),
                            "positives": row.positives,
                            "identity": row.identity,
                        },
                    )
                progress.update(len(chunk))
        # TFDS writes into a temporary directory and renames it when all is done: the table is in it.
        np.save(self.data_path / _TABLE, np.array(table, np.int32).T.copy())


def _encode(chunk: list[_Texts], config: RowsConfig, counts: dict[str, int]) -> Iterator[Row]:
    queries, queries_cut = config.tokenizer.encode([texts.query for texts in chunk], config.query_max_length)
    flat = [text for texts in chunk for text in (*texts.positives, *texts.negatives)]
    encoded, passages_cut = config.tokenizer.encode(flat, config.passage_max_length)
    counts["rows"] += len(chunk)
    counts["passages"] += len(flat)
    counts["queries_cut"] += queries_cut
    counts["passages_cut"] += passages_cut
    remaining = iter(encoded)
    for texts, query in zip(chunk, queries, strict=True):
        counts["rows_with_scores"] += texts.scored
        positives = list(itertools.islice(remaining, len(texts.positives)))
        identities = [_identity(ids) for ids in positives]
        passages = positives
        for ids in itertools.islice(remaining, len(texts.negatives)):
            if (identity := _identity(ids)) in identities:
                counts["negatives_left_out"] += 1
            else:
                passages.append(ids)
                identities.append(identity)
        hashes = np.frombuffer(b"".join(identities), np.uint32).reshape(-1, 2)
        yield Row(query, passages, len(texts.positives), hashes)


def _identity(ids: np.ndarray) -> bytes:
    """Of the ids, not of the text: what normalises or is cut to the same ids is the same passage to the model."""
    return hashlib.blake2b(ids.tobytes(), digest_size=8).digest()
