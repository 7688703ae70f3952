"""JSONL rows (`query`, `pos`, `neg`, …): which files hold them, what each must be, and the texts that it asks for.
Token ids and storage are not here (`builders`), nor what a batch makes of a row (`streams`, `pipeline`).
"""

import difflib
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from train.files import came, parse_object, read_lines

TYPES = ("normal", "only_1neg", "symmetric_sts", "symmetric_class", "symmetric_clustering")

FIELDS = ("query", "pos", "neg", "pos_scores", "neg_scores", "prompt", "type")
_PROMPTED = ("symmetric_sts", "symmetric_clustering")
_OWN_GROUP = "no_in_batch_neg"
_SUFFIXES = (".jsonl", ".jsonl.gz")
_LARGEST = float(np.finfo(np.float32).max)  # scores are kept as float32
_ERRORS_SHOWN = 10


class Texts(NamedTuple):
    """A row as it is tokenised: the prompt is in the texts. `kind` is the place of its type in `TYPES`; `scores` are those of
    its positives, then of its negatives, None without."""

    query: str
    positives: list[str]
    negatives: list[str]
    kind: int
    scores: list[float] | None


def files_of(paths: Sequence[str | PathLike[str]]) -> list[list[Path]]:
    """The files of each dataset: a path is one, or a folder that is searched; ValueError where there is none or one twice."""
    if isinstance(paths, str | PathLike):
        raise ValueError(f"paths must be a list of files and folders; one path came: {str(paths)!r}. Pass [path].")
    datasets: list[list[Path]] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.name.endswith(_SUFFIXES) and p.is_file())
            if not found:
                raise ValueError(f"{path}: the folder holds no *.jsonl or *.jsonl.gz file.")
            datasets.append(found)
        elif path.is_file():
            datasets.append([path])
        else:
            raise ValueError(f"{path}: no such file or folder of training rows.")
    if not datasets:
        raise ValueError("no training files were named: expected at least one JSONL file or folder.")
    seen: set[Path] = set()
    for path in (path for files in datasets for path in files):
        if path.resolve() in seen:
            raise ValueError(f"{path}: named twice among the training files; its rows would count double.")
        seen.add(path.resolve())
    return datasets


def own_group(path: str | PathLike[str]) -> bool:
    """Whether a dataset's name says that its rows have the negatives of their own group only, as FlagEmbedding's names do.

    >>> own_group("sets/banking_no_in_batch_neg.jsonl.gz"), own_group("sets/banking.jsonl")
    (True, False)
    """
    return Path(path).name.removesuffix(".gz").removesuffix(".jsonl").endswith(_OWN_GROUP)


def check_files(files: Sequence[Path]) -> None:
    """ValueError that lists the first bad rows of these files as path:line."""
    errors: list[str] = []
    for path in files:
        empty = True
        for where, line in read_lines(path):
            empty = False
            try:
                parse(line)
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


def parse(line: bytes) -> Texts:
    """One row; ValueError says the rule and what came, without the place."""
    row = parse_object(line)
    for name in row:
        if name not in FIELDS:
            close = difflib.get_close_matches(name, FIELDS, n=1)
            hint = f"Did you mean `{close[0]}`?" if close else f"Known fields: {', '.join(FIELDS)}."
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
    if kind not in TYPES:
        raise ValueError(f"`type` must be one of {', '.join(TYPES)}; {came(kind)}")
    scores = _scores(row, positives, negatives)
    before = prompt if kind in _PROMPTED else ""
    return Texts(
        prompt + query, [before + p for p in positives], [before + n for n in negatives], TYPES.index(kind), scores
    )


def _scores(row: dict[str, Any], positives: list[str], negatives: list[str]) -> list[float] | None:
    given: dict[str, list[float]] = {}
    for name, texts in (("pos_scores", positives), ("neg_scores", negatives)):
        scores = _optional(row, name, None)
        if scores is None:
            continue
        # bool is an int to Python, and never a score
        if not isinstance(scores, list) or not all(type(score) in (int, float) for score in scores):
            raise ValueError(f"`{name}` must be a list of numbers; {came(scores)}")
        if not all(abs(score) <= _LARGEST for score in scores):  # nor is it NaN
            raise ValueError(f"`{name}` must be finite float32 numbers; {came(scores)}")
        if len(scores) != len(texts):
            raise ValueError(f"`{name}` must have one number for each of {len(texts)} texts; {len(scores)} came")
        given[name] = scores
    if not given.get("pos_scores") and not given.get("neg_scores"):
        return None
    for name, texts in (("pos_scores", positives), ("neg_scores", negatives)):
        if texts and name not in given:
            raise ValueError(f"a row with scores has them for all of its texts; `{name}` is missing")
    return given["pos_scores"] + given.get("neg_scores", [])


def _optional(row: dict[str, Any], name: str, default: Any) -> Any:
    """Tables written as JSONL have null where a row lacks the field."""
    return default if row.get(name) is None else row[name]
