"""Embeddings in files: shards of NumPy arrays that appear whole, and the Embeddings that map them.

Not here: which texts make a shard, and going on after a stop (corpus.py), reading rows (mapped.py). No JAX.

A directory holds `settings.json`, written first: what the rows were made with; a folder `shard-00000000`, … of consecutive
texts each; and `finished.json`, written last. Every array is a .npy file that NumPy maps:

    dense.npy                   [texts, D] float32
    sparse_{data,indices,indptr}.npy    float32, int32, int64: `csr_matrix((data, indices, indptr))`, as SciPy names them
    colbert.npy                 [vectors of all texts, C] float16, int8 or float32
    colbert_indptr.npy          [texts + 1] int64: text i's vectors are colbert[indptr[i]:indptr[i + 1]]
    colbert_scales.npy          [vectors] float32, with int8 only: the vector is colbert * scale
    shard.json                  numbers of texts and bytes, and the digest of the texts
"""

import errno
import json
import os
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float32, Int8
from scipy.sparse import csr_matrix

from m3jax import paths
from m3jax.embeddings import Embeddings
from m3jax.mapped import Colbert, Dense, Terms

ColbertDtype = Literal["float16", "int8", "float32"]
COLBERT_DTYPES: tuple[ColbertDtype, ...] = get_args(ColbertDtype)

FORMAT = "m3jax embeddings 1"
SETTINGS, FINISHED, SHARD = "settings.json", "finished.json", "shard.json"
PARTIAL = ".m3jax-partial-"  # begins the name of what is being written


def open_embeddings(directory: str | Path) -> Embeddings:
    """The Embeddings that `encode_to` wrote, mapped: opening reads no vector, and `search` and `score` read block by block.

    Its parts read rows when asked: `embeddings[10:20]` is in memory and has all that `encode` gives, `dense_vecs[10:20]` is an
    array [10, D], `sparse[10:20]` a CSR matrix [10, vocabulary], `colbert_vecs[10]` an array [tokens - 1, C] float32,
    whatever it is stored in. The files must stay as they are while it is in use.

    Raises ValueError where directory holds no embeddings, or is not finished: it says then how to go on.
    """
    if paths.is_url(directory):
        raise ValueError(
            f"open_embeddings: directory must be on a file system, got {directory}; copy it to a disk first"
        )
    directory = Path(directory)
    settings = read_settings(directory)
    if settings is None:
        raise ValueError(
            f"{directory}: expected a directory that m3jax.encode_to wrote, but there is no {SETTINGS} in it"
        )
    if not (directory / FINISHED).is_file():
        count = len(there(directory))
        raise ValueError(
            f"{directory}: the embeddings are not finished: {count} shards are there; call encode_to again with the same "
            "texts and settings, and it goes on from there"
        )
    return _mapped(directory, read_finished(directory))


def _mapped(directory: Path, finished: dict[str, Any]) -> Embeddings:
    counts, parts = finished["shards"], finished["parts"]
    missing = sorted(set(range(len(counts))) - there(directory))
    if missing:
        raise ValueError(
            f"{directory}: {len(counts)} shards were finished, but {len(missing)} are not there, {_name(missing[0])} first; "
            "copy the directory again, or remove it and encode again"
        )
    folders = [directory / _name(index) for index in range(len(counts))]
    colbert = parts.get("colbert")
    return Embeddings(
        dense=Dense(folders, counts, parts["dense"]["width"]) if "dense" in parts else None,
        terms=Terms(folders, counts, parts["sparse"]["width"]) if "sparse" in parts else None,
        colbert=Colbert.of(folders, counts, colbert["width"], scaled=colbert["dtype"] == "int8") if colbert else None,
    )


def quantise(vectors: Float32[np.ndarray, "j c"]) -> tuple[Int8[np.ndarray, "j c"], Float32[np.ndarray, " j"]]:
    """Vectors in 8 bits and the scale of each, max|x| / 127; a number comes back within scale / 2 of what it was.

    >>> quantise(np.array([[0.6, -0.8]], np.float32))
    (array([[  95, -127]], dtype=int8), array([0.00629921], dtype=float32))
    """
    scales = np.abs(vectors).max(axis=1) / np.float32(127)
    return np.rint(vectors / np.where(scales > 0, scales, 1)[:, None]).astype(np.int8), scales


def write_shard(
    directory: Path,
    index: int,
    rows: Embeddings,
    *,
    colbert_dtype: ColbertDtype,
    go_on: Callable[[], None] = lambda: None,
    **record: Any,
) -> None:
    """Write the shard of these rows, and `record` into its shard.json. It appears whole or not at all.

    go_on: called between its files and before it appears; an error that it raises ends the writing. Raises ValueError where
    the disk has too little room, or the shard is there already.
    """
    arrays, parts = _arrays(rows, colbert_dtype)
    size = sum(array.nbytes for array in arrays.values())
    room = free(directory)
    too_large = (
        f"{directory}: {_name(index)} takes {size:,} bytes, but {room:,} are free; make room and call encode_to again "
        "with the same texts: it goes on here"
    )
    if room < size:
        raise ValueError(too_large)
    for part, about in parts.items():
        about["bytes"] = sum(array.nbytes for name, array in arrays.items() if name.partition("_")[0] == part)
    record = {"texts": len(rows), "parts": parts, **record}
    partial = _partial(directory)
    partial.mkdir()
    try:
        for name, array in arrays.items():
            go_on()
            paths.write_array(partial / f"{name}.npy", array)
        write_json(partial / SHARD, record)
        _sync(partial)
        go_on()
        partial.rename(directory / _name(index))
        _sync(directory)
    except OSError as error:
        # What is free is not always this user's, nor what one file may take.
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ValueError(f"{too_large} ({error})") from error
        if error.errno not in (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY):
            raise
        raise ValueError(
            f"{directory}: {_name(index)} cannot be written ({error.strerror}); does another run write here?"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def free(directory: Path) -> int:
    """The bytes that can still be written to a directory."""
    return shutil.disk_usage(directory).free


def there(directory: Path) -> set[int]:
    """The numbers of the shards of a directory."""
    names = [entry.name for entry in os.scandir(directory)]
    return {int(name[6:]) for name in names if name.startswith("shard-") and name[6:].isdecimal()}


def read_record(directory: Path, index: int) -> dict[str, Any]:
    """What shard.json says of one shard."""
    return _read_json(directory / _name(index) / SHARD, texts=int, parts=dict, cut=int, digest=str)


def read_finished(directory: Path) -> dict[str, Any]:
    """What finished.json says of all shards together: as `summary`."""
    return _read_json(directory / FINISHED, texts=int, parts=dict, cut=int, shards=list)


def read_settings(directory: Path) -> dict[str, Any] | None:
    """What the rows of a directory are made with; None where none were begun. ValueError for another format."""
    if not (directory / SETTINGS).is_file():
        return None
    settings = _read_json(directory / SETTINGS, format=str)
    if settings["format"] != FORMAT:
        raise ValueError(
            f"{directory / SETTINGS}: the format must be {FORMAT!r}, got {settings['format']!r}; read it with the m3jax "
            "that wrote it, or encode again"
        )
    return _read_json(directory / SETTINGS, model=dict)


def finish(directory: Path) -> None:
    """Write finished.json from the records of shards 0, 1, …; ValueError where one of them or an array of theirs is missing."""
    finished = summary(directory)
    _mapped(directory, finished)
    write_json(directory / FINISHED, finished)


def clear(directory: Path) -> None:
    """Remove what a kill left half written."""
    for left in directory.glob(f"{PARTIAL}*"):
        aside = _partial(directory)
        # Taken away whole: a call that is still writing there is told, and renames no shard into place that lacks arrays.
        with suppress(FileNotFoundError):
            left.rename(aside)
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)  # of a shard
        else:
            aside.unlink(missing_ok=True)  # of a JSON file


def summary(directory: Path) -> dict[str, Any]:
    """The shards of a directory together: rows of each, and of each part its width, bytes, numbers and type."""
    records = [read_record(directory, index) for index in sorted(there(directory))]
    parts: dict[str, dict[str, Any]] = {}
    for record in records:
        for name, about in record["parts"].items():
            total = parts.setdefault(name, {"width": about["width"], "dtype": about["dtype"]})
            for count in ("bytes", "weights", "vectors"):
                if count in about:
                    total[count] = total.get(count, 0) + about[count]
    texts = [record["texts"] for record in records]
    return {"texts": sum(texts), "cut": sum(record["cut"] for record in records), "parts": parts, "shards": texts}


def _read_json(path: Path, **kinds: type) -> dict[str, Any]:
    """The object of a file that this module wrote, with keys of these kinds; ValueError with its path where it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no object")
        if wrong := [key for key, kind in kinds.items() if not isinstance(content.get(key), kind)]:
            raise ValueError(f"no {', '.join(wrong)} of its kind")
        return content
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a JSON object as encode_to writes it ({error}); encode again") from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an object aside and rename it into place."""
    partial = _partial(path.parent)
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    _sync(path.parent)


def _arrays(rows: Embeddings, colbert_dtype: ColbertDtype) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Any]]]:
    """The arrays of a shard by file name, and of each part its width, type and how many numbers it has."""
    arrays: dict[str, np.ndarray] = {}
    parts: dict[str, dict[str, Any]] = {}
    if rows.dense is not None:
        arrays["dense"] = rows.dense[:]
        parts["dense"] = {"width": rows.dense.shape[1], "dtype": "float32"}
    if rows.terms is not None:
        terms = csr_matrix(rows.terms)
        arrays |= {"sparse_data": terms.data, "sparse_indices": terms.indices.astype(np.int32, copy=False)}
        arrays["sparse_indptr"] = np.asarray(terms.indptr, np.int64)
        parts["sparse"] = {"width": rows.terms.shape[1], "dtype": "float32", "weights": len(terms.data)}  # pyright: ignore
    if rows.colbert is not None:
        ends = np.cumsum([0, *(len(vectors) for vectors in rows.colbert)], dtype=np.int64)
        width = rows.colbert[0].shape[1] if len(rows.colbert) else 0
        # Text by text into one array, so that beside the rows only their stored form is in memory.
        stored = np.empty((ends[-1], width), colbert_dtype)
        scales = np.empty(ends[-1], np.float32)
        for start, vectors in zip(ends[:-1], rows.colbert, strict=True):
            some = slice(start, start + len(vectors))
            if colbert_dtype == "int8":
                stored[some], scales[some] = quantise(vectors)
            else:
                stored[some] = vectors
        arrays |= {"colbert": stored, "colbert_indptr": ends}
        if colbert_dtype == "int8":
            arrays["colbert_scales"] = scales
        parts["colbert"] = {"width": width, "dtype": colbert_dtype, "vectors": len(stored)}
    return arrays, parts


def _partial(directory: Path) -> Path:
    return directory / f"{PARTIAL}{uuid.uuid4().hex}"


def _name(index: int) -> str:
    return f"shard-{index:08d}"


def _sync(folder: Path) -> None:
    """A folder's names to the disk, so that a loss of power does not take back a rename."""
    if os.name == "nt":  # folders cannot be opened there
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
