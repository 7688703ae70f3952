"""A part of the training rows held out: the rest as files of its own, and the part as a folder that measures.

Not here: what a row must be (rows.py), and how a folder is measured (tasks.py, evaluation.py).
"""

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path

from train.data.rows import Texts, check_files, files_of, parse
from train.files import parse_object, read_lines, write_json, written_once
from train.tasks import write_task

# Enough for a mean to one or two hundredths, and few enough to be measured again and again during training.
MOST_QUERIES = 1000
MOST_PASSAGES = 10_000
_VERSION = 2  # changes with what is drawn and how it is written
_BACKWARDS = "backwards.json"  # how many rows


def hold_out(
    paths: Sequence[str | PathLike[str]], data_dir: str | PathLike[str], *, share: float, seed: int
) -> tuple[list[Path], Path]:
    """The rows of `paths` without those held out, a path for each, and the evaluation folder of these.

    Held out are `share` of the different queries, whatever their prompts, at most MOST_QUERIES, with all their rows, so that
    none is trained; nor is a pair of them the other way round, its positive the query, as parallel sentences often come: a
    warning counts such rows. Its passages are those of the rows held out, filled up with others of `paths` to MOST_PASSAGES;
    training may see them, as passages of other queries. Which ones is drawn by `seed`. Prompts are before the queries, as in
    training. All of it is written under `data_dir`, the rows of a folder in one file, and found again by the files' names and
    contents, the share and the seed.

    ValueError lists the first bad rows as path:line, and says where nothing would be left to train.
    """
    datasets = files_of(paths)
    # The last part of a dataset's path stays: it may say that its rows take no negatives from others.
    names = [
        Path(str(number), Path(os.path.abspath(path)).name.removesuffix(".gz")) for number, path in enumerate(paths)
    ]
    inside = [[str(file.relative_to(path)) for file in files] for path, files in zip(paths, datasets, strict=True)]
    digest = hashlib.blake2b(repr((_VERSION, share, seed, names, inside)).encode(), digest_size=8)
    for path in (path for files in datasets for path in files):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    whole = Path(data_dir) / f"held-out-{digest.hexdigest()}"
    if not whole.exists():
        check_files([path for files in datasets for path in files])
        with written_once(whole) as partial:
            _write(datasets, [Path(path) for path in paths], names, partial, share, seed)
    if backwards := json.loads((whole / _BACKWARDS).read_text(encoding="utf-8")):
        warnings.warn(
            f"{backwards} rows are left out of training: they are pairs that are held out, the other way round.",
            stacklevel=2,
        )
    return [whole / "train" / name for name in names], whole / "held-out"


def _write(
    datasets: list[list[Path]], paths: list[Path], names: list[Path], folder: Path, share: float, seed: int
) -> None:
    def pairs_of_all() -> Iterator[tuple[str, str]]:
        return (pair for files in datasets for path in files for _, line in read_lines(path) for pair in _pairs(line))

    drawn = sorted({_drawn(query, seed) for query, _ in pairs_of_all()})
    held = {*drawn[: min(MOST_QUERIES, max(1, round(share * len(drawn))))]}
    held_pairs = {(query, positive) for query, positive in pairs_of_all() if _drawn(query, seed) in held}
    rows: list[Texts] = []
    others: dict[bytes, str] = {}
    backwards = 0
    for files, path, name in zip(datasets, paths, names, strict=True):
        # A folder's rows in one file: a.jsonl and a.jsonl.gz may stand in it.
        to = folder / "train" / name / "rows.jsonl" if path.is_dir() else folder / "train" / name
        to.parent.mkdir(parents=True, exist_ok=True)
        left = 0
        with to.open("wb") as out:
            for _, line in (row for file in files for row in read_lines(file)):
                row, pairs = parse(line), _pairs(line)
                if _drawn(pairs[0][0], seed) in held:
                    rows.append(row)
                    continue
                if not held_pairs.isdisjoint((positive, query) for query, positive in pairs):
                    backwards += 1
                    continue
                left += 1
                out.write(line.rstrip(b"\r\n") + b"\n")
                others |= {_drawn(text, seed): text for text in (*row.positives, *row.negatives) if text.strip()}
                if len(others) > 2 * MOST_PASSAGES:
                    others = _first(others)
        if not left:
            raise ValueError(
                f"{path}: held_out = {share} leaves none of its rows to train; leave the file out, give more rows, or "
                "set --config.data.held_out=0"
            )
    write_json(folder / _BACKWARDS, backwards)
    _write_task(folder / "held-out", rows, _first(others).values())


def _pairs(line: bytes) -> list[tuple[str, str]]:
    """The query of a row that `parse` takes with each of its positives, without its prompt."""
    row = parse_object(line)
    return [(row["query"], positive) for positive in row["pos"]]


def _write_task(folder: Path, rows: list[Texts], others: Iterable[str]) -> None:
    relevant: dict[str, dict[str, None]] = {}
    for row in rows:
        relevant.setdefault(row.query, {}).update(dict.fromkeys(row.positives))
    passages = dict.fromkeys(text for row in rows for text in (*row.positives, *row.negatives) if text.strip())
    for text in others:
        if len(passages) >= MOST_PASSAGES:
            break
        passages.setdefault(text)
    ids = {text: f"p{number}" for number, text in enumerate(passages)}
    write_task(
        folder,
        corpus={id: text for text, id in ids.items()},
        queries={f"q{number}": text for number, text in enumerate(relevant)},
        qrels={f"q{number}": {ids[text]: 1 for text in texts} for number, texts in enumerate(relevant.values())},
    )


def _drawn(text: str, seed: int) -> bytes:
    """A text's place in a random order that depends on nothing else."""
    return hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest()


def _first(texts: dict[bytes, str]) -> dict[bytes, str]:
    return dict(sorted(texts.items())[:MOST_PASSAGES])
