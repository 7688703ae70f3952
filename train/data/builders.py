"""JSONL rows tokenised once and kept as array_record by a TFDS builder for each dataset, and read back.
What a row must be is not here (`rows`), nor order, groups, drawing and padding (`order`, `streams`, `pipeline`), nor any set of
our own: the demo set writes JSONL too.
"""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from m3jax import paths
from m3jax.tokenization import Tokenizer
from train.data.rows import Texts, check_files, files_of, own_group, parse
from train.data.tfds_sets import prepare_once
from train.files import read_lines

_ROWS_PER_ENCODE = 256  # enough texts for every thread of `tokenizers`, few enough to hold


class Row(NamedTuple):
    """One training row as token ids, with `<s>` and `</s>`, cut to the maximum lengths.

    `passages` are the positives, then the negatives; `positives` counts the former. `identity` uint32 `[passages, 2]`
    is a 64-bit hash of the passage's ids: equal for passages that the model cannot tell apart. `scores` float32 `[passages]`
    are a teacher's, −inf throughout where the row has none.
    """

    query: np.ndarray
    passages: list[np.ndarray]
    positives: int
    identity: np.ndarray
    scores: np.ndarray


class Dataset(NamedTuple):
    """One path of training rows: how many it has, and whether they take no negatives from other rows."""

    path: str
    rows: int
    own_group: bool


class RowSource:
    """Prepared rows of one or several datasets by index; `len` is their number.

    `query_lengths`, `passage_lengths` (the longest of the row), `positives`, `negatives`, `kinds` (the type's place in
    `rows.TYPES`): int32 `[rows]`; of one dataset they are on disk until read. `datasets`: in the order of their rows.
    `query_max_length`: what queries were cut to. `counts`: what `prepare` warned of, by name, and the rows with scores.
    `name`: a hash of the files, the tokenizer, the lengths and which datasets take no negatives from other rows.
    """

    def __init__(self, paths: Sequence[str | PathLike[str]], builders: Sequence["Rows"]):
        self._records: list[Any] = [builder.as_data_source(split="train") for builder in builders]  # pyright: ignore[reportCallIssue] (a wrapped method)
        tables = [np.load(builder.data_path / _TABLE, mmap_mode="r") for builder in builders]
        table = tables[0] if len(tables) == 1 else np.concatenate(tables, axis=1)
        self.query_lengths, self.passage_lengths, self.positives, self.negatives, self.kinds = table
        self.datasets = [
            Dataset(str(path), len(records), own_group(path))
            for path, records in zip(paths, self._records, strict=True)
        ]
        self._files = [path for builder in builders for path in _config(builder).files]
        self._starts = np.cumsum([0, *(dataset.rows for dataset in self.datasets)])
        self.counts = Counter[str]()
        for builder in builders:
            self.counts.update(builder.info.metadata or {})
        self.query_max_length: int = _config(builders[0]).query_max_length
        parts = [(_config(b).name, dataset.own_group) for b, dataset in zip(builders, self.datasets, strict=True)]
        self.name = hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def rows(self, indices: Sequence[int] | np.ndarray) -> list[Row]:
        """The rows of these indices, in their order."""
        wanted = np.asarray(indices, np.int64)
        dataset = np.searchsorted(self._starts, wanted, side="right") - 1
        found: dict[int, Row] = {}
        for of in np.unique(dataset).tolist():
            mine = np.unique(wanted[dataset == of])
            records = self._records[of].__getitems__((mine - self._starts[of]).tolist())
            found |= zip(mine.tolist(), map(_row, records), strict=True)
        return [found[index] for index in wanted.tolist()]

    def places(self, indices: Sequence[int] | np.ndarray) -> list[str]:
        """Where the rows of these indices stand, path:line, in their order; the files are read again up to the last of them."""
        wanted = {int(index) for index in indices}
        lines = enumerate(where for path in self._files for where, _ in read_lines(path))
        found = {row: where for row, where in itertools.islice(lines, max(wanted) + 1) if row in wanted}
        return [found[int(index)] for index in indices]


def _row(record: dict[str, Any]) -> Row:
    query, *passages = np.split(record["ids"], np.cumsum(record["lengths"])[:-1])
    scores = record["scores"]
    if not len(scores):
        scores = np.full(len(passages), -np.inf, np.float32)
    return Row(query, passages, int(record["positives"]), record["identity"], scores)


def prepare(
    paths: Sequence[str | PathLike[str]],
    tokenizer: Tokenizer,
    *,
    data_dir: str | PathLike[str],
    query_max_length: int,
    passage_max_length: int,
) -> RowSource:
    """Checks, tokenises and stores the rows of each dataset, a JSONL file or a folder of them, unless that is done already.

    `paths` are files (`.gz` is opened) or folders, searched for `*.jsonl` and `*.jsonl.gz` in sorted order. What is
    stored under `data_dir` is found again by the files' contents, the tokenizer and the maximum lengths (in token ids), for
    each path by itself. Of several processes that share `data_dir` one calls this first (`processes.first_then_others`), and
    the others find what it left.

    A row is `{"query": str, "pos": [str, …], "neg"?: [str, …], "prompt"?: str, "type"?: str, "pos_scores"?: [float, …],
    "neg_scores"?: [float, …]}`; an optional field may be null. `prompt` is put before the query, and nothing where there is
    none. `type` is FlagEmbedding's:

    - "normal", the default: one positive and `group_size` − 1 negatives; positives of other rows take the places for which
      the row has no negatives (`pipeline`).
    - "only_1neg": one positive and one negative, whatever `group_size` is.
    - "symmetric_sts", "symmetric_clustering": as normal, but passages are of the same kind as the query: `prompt` is put
      before them too.
    - "symmetric_class": one positive and up to `group_size` − 1 of the row's own negatives, which another row's positive never
      stands in for. In the loss other rows' passages are its negatives all the same, as in FlagEmbedding, unless the dataset's
      name ends as below: name it so where they may be of the same class.

    Rows of a dataset whose name ends in `no_in_batch_neg` (before `.jsonl`) are trained on their own group alone, in every
    part of the loss, so each needs a negative. FlagEmbedding also halves the batch of symmetric types, to save memory; here
    a batch is as large as its length group says.

    Scores are a teacher's, one for each text of `pos` and of `neg`. ValueError lists the first bad rows as path:line before
    anything is stored. Warns of texts cut and of negatives left out because they equal a positive or another negative of
    their row; says how many.
    """
    datasets = files_of(paths)
    configs = [_make_config(files, tokenizer, query_max_length, passage_max_length) for files in datasets]
    builders = [_builder(data_dir, config) for config in configs]
    missing = [builder for builder in builders if not builder.data_path.exists()]
    if missing:
        check_files([path for builder in missing for path in _config(builder).files])
        tfds.disable_progress_bar()
        # TFDS prints that it downloads; what happens here has its own progress bar, on stderr.
        with contextlib.redirect_stdout(io.StringIO()):
            for builder in missing:
                prepare_once(builder)
    # Made again: a builder reads what is known of its rows when it is made.
    source = RowSource(paths, [_builder(data_dir, config) for config in configs])
    _warn(source.counts, query_max_length, passage_max_length)
    return source


def _warn(counts: Counter[str], query_max_length: int, passage_max_length: int) -> None:
    if counts["queries_cut"] or counts["passages_cut"]:
        warnings.warn(
            f"{counts['queries_cut']} of {counts['rows']} queries were cut to {query_max_length} token ids and "
            f"{counts['passages_cut']} of {counts['passages']} passages to {passage_max_length}. Raise "
            "query_max_length or passage_max_length to keep them whole.",
            stacklevel=3,
        )
    if counts["negatives_left_out"]:
        warnings.warn(
            f"{counts['negatives_left_out']} negatives are left out: their token ids equal those of a positive or of "
            "another negative of the same row.",
            stacklevel=3,
        )


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

    VERSION = tfds.core.Version("2.0.0")
    # Where TFDS would look for checksums of downloads, and for that import a package that it does not declare.
    code_path = None

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "ids": tfds.features.Tensor(shape=(None,), dtype=np.int32),  # query, positives, negatives
                "lengths": tfds.features.Tensor(shape=(None,), dtype=np.int32),  # of each of those texts
                "positives": tfds.features.Scalar(np.int32),
                "identity": tfds.features.Tensor(shape=(None, 2), dtype=np.uint32),  # of each passage
                "scores": tfds.features.Tensor(shape=(None,), dtype=np.float32),  # of each passage, or empty
            }
        )
        # Shuffled records would not stand in the order of the table.
        return tfds.core.DatasetInfo(
            builder=self, features=features, metadata=tfds.core.MetadataDict(), disable_shuffling=True
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        config = _config(self)
        counts = self.info.metadata
        assert counts is not None
        counts.update(dict.fromkeys(_COUNTS, 0))
        table: list[tuple[int, int, int, int, int]] = []
        texts = (parse(line) for path in config.files for _, line in read_lines(path))
        with tqdm(desc="tokenising", unit=" rows", disable=None) as progress:
            while chunk := list(itertools.islice(texts, _ROWS_PER_ENCODE)):
                for given, row in zip(chunk, _encode(chunk, config, counts), strict=True):
                    lengths = [len(text) for text in (row.query, *row.passages)]
                    negatives = len(row.passages) - row.positives
                    table.append((lengths[0], max(lengths[1:]), row.positives, negatives, given.kind))
                    yield (
                        len(table) - 1,
                        {
                            "ids": np.concatenate([row.query, *row.passages]),
                            "lengths": np.array(lengths, np.int32),
                            "positives": row.positives,
                            "identity": row.identity,
                            "scores": row.scores,
                        },
                    )
                progress.update(len(chunk))
        # TFDS writes into a temporary directory and renames it when all is done: the table is in it.
        paths.write_array(Path(self.data_path / _TABLE), np.array(table, np.int32).T.copy())


def _make_config(files: list[Path], tokenizer: Tokenizer, query_max_length: int, passage_max_length: int) -> RowsConfig:
    digest = hashlib.blake2b(digest_size=8)
    for part in (tokenizer.json, str(query_max_length), str(passage_max_length)):
        digest.update(hashlib.blake2b(part.encode()).digest())
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return RowsConfig(
        name=digest.hexdigest(),
        files=files,
        tokenizer=tokenizer,
        query_max_length=query_max_length,
        passage_max_length=passage_max_length,
    )


def _builder(data_dir: str | PathLike[str], config: RowsConfig) -> Rows:
    return Rows(data_dir=Path(data_dir), config=config, file_format="array_record")


def _config(builder: Rows) -> RowsConfig:
    config = builder.builder_config
    assert isinstance(config, RowsConfig)
    return config


def _encode(chunk: list[Texts], config: RowsConfig, counts: dict[str, int]) -> Iterator[Row]:
    """The rows of these texts; scores are empty where there are none."""
    queries, queries_cut = config.tokenizer.encode([texts.query for texts in chunk], config.query_max_length)
    flat = [text for texts in chunk for text in (*texts.positives, *texts.negatives)]
    encoded, passages_cut = config.tokenizer.encode(flat, config.passage_max_length)
    counts["rows"] += len(chunk)
    counts["passages"] += len(flat)
    counts["queries_cut"] += queries_cut
    counts["passages_cut"] += passages_cut
    remaining = iter(encoded)
    for texts, query in zip(chunk, queries, strict=True):
        counts["rows_with_scores"] += texts.scores is not None
        passages = list(itertools.islice(remaining, len(texts.positives) + len(texts.negatives)))
        identities = [_identity(ids) for ids in passages]
        seen: set[bytes] = set()
        kept: list[int] = []
        for place, identity in enumerate(identities):
            if place < len(texts.positives) or identity not in seen:
                kept.append(place)
            seen.add(identity)
        counts["negatives_left_out"] += len(passages) - len(kept)
        hashes = np.frombuffer(b"".join(identities[place] for place in kept), np.uint32).reshape(-1, 2)
        scores = np.array([texts.scores[place] for place in kept] if texts.scores else [], np.float32)
        yield Row(query, [passages[place] for place in kept], len(texts.positives), hashes, scores)


def _identity(ids: np.ndarray) -> bytes:
    """Of the ids, not of the text: what normalises or is cut to the same ids is the same passage to the model."""
    return hashlib.blake2b(ids.tobytes(), digest_size=8).digest()
