"""Data sets of tensorflow_datasets by name, "tfds:NAME": their examples as plain Python, and training rows of them as a file.

Not here: what a row or a text must be (rows.py, texts.py).
"""

import hashlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from train.data.rows import FIELDS
from train.files import write_lines, written_once

PREFIX = "tfds:"
_LISTS = ("pos", "neg", "pos_scores", "neg_scores")


def open_set(name: str, data_dir: Path, *required: str) -> tfds.core.DatasetBuilder:
    """The data set "tfds:NAME", prepared under data_dir; ValueError where there is none, or it lacks a feature."""
    try:
        builder = tfds.builder(name.removeprefix(PREFIX), data_dir=data_dir, file_format="array_record")
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        raise ValueError(
            f"{name}: expected a data set of TFDS that is prepared under {data_dir} or that TFDS knows: {error}"
        ) from error
    if not builder.data_path.exists():
        prepare_once(builder)
    features = _features(builder)
    if missing := [feature for feature in required if feature not in features]:
        raise ValueError(
            f"{name}: the feature{'s' * (len(missing) > 1)} `{'`, `'.join(missing)}` are read; the data set has "
            f"{', '.join(features) or 'none'}"
        )
    return builder


def digest_of(builder: tfds.core.DatasetBuilder) -> str:
    """What the examples of a data set are known by: its name and its files, as one of the same name may be made anew."""
    digest = hashlib.blake2b(builder.info.full_name.encode(), digest_size=8)
    for path in sorted(builder.info.splits["train"].filepaths):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


def prepare_once(builder: tfds.core.DatasetBuilder) -> None:
    """Write what the builder makes, unless another run does so first: two may start at once on one folder."""
    try:
        builder.download_and_prepare()
    except OSError:  # TFDS renames what is whole, and takes away what is not
        if not builder.data_path.exists():
            raise


def examples(
    builder: tfds.core.DatasetBuilder, name: str, fields: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """("tfds:NAME#index", these fields as str, number or list) of each example of the split "train", in its order."""
    for index, record in enumerate(builder.as_data_source(split="train")):  # pyright: ignore[reportCallIssue] (a wrapped method)
        yield f"{name}#{index}", {field: _plain(record[field]) for field in fields}


def rows_file(name: str, data_dir: Path) -> Path:
    """The training rows of "tfds:NAME" as a JSONL file under data_dir, written once: rows.py says what a row must be.

    The features are named as the fields are, and others passed over. `pos`, `neg` and their scores may be one in place of a
    list. An empty text or list is a field that the row does not have: TFDS knows no null.
    """
    builder = open_set(name, data_dir, "query", "pos")
    fields = [field for field in FIELDS if field in _features(builder)]
    base = name.removeprefix(PREFIX).translate(str.maketrans("/:[]", "----"))
    folder = data_dir / f"rows-of-{base}-{digest_of(builder)}"
    path = folder / f"{base}.jsonl"
    if not folder.exists():
        with written_once(folder) as partial:
            write_lines(partial / path.name, (_row(example) for _, example in examples(builder, name, fields)))
    return path


def _row(example: dict[str, Any]) -> dict[str, Any]:
    there = {field: value for field, value in example.items() if value not in ("", [])}
    return {field: [x] if field in _LISTS and not isinstance(x, list) else x for field, x in there.items()}


def _features(builder: tfds.core.DatasetBuilder) -> Collection[str]:
    return getattr(builder.info.features, "keys", tuple)()


def _plain(value: Any) -> Any:
    """A value of TFDS as JSON has it."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    return [_plain(x) for x in value] if isinstance(value, list | tuple) else value
