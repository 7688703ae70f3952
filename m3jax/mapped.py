"""The parts of Embeddings that stay in the files of shards: mapped when first read, rows copied when they are asked for.

Not here: which files those are and how they are written (shards.py).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, vstack

from m3jax.embeddings import Stored

# Shards that a part keeps mapped: three parts of at most three files each stay below Linux's 65,530 maps of a process.
_MAPPED = 4096


class _Shards:
    """The mapped arrays of a part, and which of them holds a row."""

    def __init__(
        self,
        folders: Sequence[Path],
        counts: Sequence[int],
        shapes: Mapping[str, Callable[..., tuple[int, ...]]],
        take: Callable[..., Any],
    ):
        """shapes: of each array's name, from the number of a shard's texts and the arrays. take: of the arrays, what to map."""
        self.ends = np.cumsum(counts, dtype=np.int64)
        for path in (folder / f"{name}.npy" for folder in folders for name in shapes):
            if not path.is_file():
                raise _damaged(path, "it is not there")

        @functools.lru_cache(_MAPPED)
        def mapped(index: int) -> Any:
            paths = [folders[index] / f"{name}.npy" for name in shapes]
            arrays = [_map(path) for path in paths]
            for path, array, shape in zip(paths, arrays, shapes.values(), strict=True):
                if array.shape != (expected := shape(counts[index], *arrays)):
                    raise _damaged(path, f"it must have the shape {expected}, but has {array.shape}")
            return take(*arrays)

        self.mapped = mapped

    def __len__(self) -> int:
        return int(self.ends[-1])

    def at(self, row: int) -> tuple[Any, int]:
        """The mapped shard of a row, and which of its rows that is."""
        shard = int(np.searchsorted(self.ends, row, side="right"))
        return self.mapped(shard), row - (int(self.ends[shard - 1]) if shard else 0)

    def gather(self, index: Any, join: Callable[[list[Any]], Any]) -> Any:
        """The rows of a slice, an array of ints or a mask, copied: those of each shard, joined, then in the order asked."""
        rows = np.arange(*index.indices(len(self))) if isinstance(index, slice) else np.asarray(index)
        if isinstance(index, tuple) or rows.ndim != 1 or (len(rows) and rows.dtype.kind not in "iub"):
            raise IndexError(
                f"rows are asked for by an int, a slice, a list of ints or a mask, got {index!r:.80}; columns are those of "
                "the array that this gives"
            )
        if rows.dtype == bool:
            if len(rows) != len(self):
                raise IndexError(f"a mask must have one value for each of {len(self)} rows, got {len(rows)}")
            rows = np.flatnonzero(rows)
        if len(rows) and not -len(self) <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows go from 0 to {len(self) - 1}, got {rows.min()} to {rows.max()}")
        rows = np.where(rows < 0, rows + len(self), rows).astype(np.int64)
        shards = np.searchsorted(self.ends, rows, side="right")
        order = np.argsort(shards, kind="stable")
        if not len(rows):
            return self.mapped(0)[:0]
        found, firsts = np.unique(shards[order], return_index=True)
        starts = np.concatenate([[0], self.ends])
        parts = [
            self.mapped(int(shard))[some - starts[shard]]
            for shard, some in zip(found, np.split(rows[order], firsts[1:]), strict=True)
        ]
        joined = parts[0] if len(parts) == 1 else join(parts)
        return joined if (order[1:] > order[:-1]).all() else joined[np.argsort(order)]


def _map(path: Path) -> np.ndarray:
    try:
        # The array under np.memmap, whose class makes every slice dearer.
        return np.asarray(np.load(path, mmap_mode="r"))
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, why: object) -> ValueError:
    return ValueError(
        f"{path}: expected the array that encode_to wrote ({why}); copy the directory again, or remove {path.parent.name} and "
        "finished.json, if it is there: the same call of encode_to then makes that shard anew"
    )


class Dense(Stored):
    """[texts, D] float32."""

    dtype = np.dtype(np.float32)
    ndim = 2

    def __init__(self, folders: Sequence[Path], counts: Sequence[int], width: int):
        self._shards = _Shards(folders, counts, {"dense": lambda n, _: (n, width)}, lambda dense: dense)
        self.shape = len(self._shards), width

    def __getitem__(self, index: Any) -> np.ndarray:
        if isinstance(index, int | np.integer):
            rows, row = self._shards.at(range(len(self))[int(index)])
            return np.array(rows[row])
        return np.asarray(self._shards.gather(index, np.concatenate))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All rows, read into memory: np.asarray(embeddings.dense_vecs)."""
        return self[:].astype(dtype or np.float32, copy=False)


class Terms(Stored):
    """[texts, vocabulary] float32 in CSR form."""

    def __init__(self, folders: Sequence[Path], counts: Sequence[int], width: int):
        def matrix(indptr: np.ndarray, data: np.ndarray, indices: np.ndarray) -> csr_matrix:
            return csr_matrix((data, indices, indptr), shape=(len(indptr) - 1, width), copy=False)

        shapes: dict[str, Callable[..., tuple[int, ...]]] = {
            "sparse_indptr": lambda n, *_: (n + 1,),
            "sparse_data": lambda n, indptr, *_: (int(indptr[-1]),),
            "sparse_indices": lambda n, indptr, *_: (int(indptr[-1]),),
        }
        self._shards = _Shards(folders, counts, shapes, matrix)
        self.shape = len(self._shards), width

    def __getitem__(self, index: Any) -> csr_matrix:
        if isinstance(index, int | np.integer):
            index = [range(len(self))[int(index)]]
        return csr_matrix(self._shards.gather(index, lambda parts: vstack(parts, format="csr")))


class Colbert(Stored, Sequence):
    """An array [tokens - 1, C] float32 a text, made of what is stored when it is asked for; a slice reads nothing."""

    def __init__(self, shards: _Shards, width: int, rows: range):
        self._shards, self._rows = shards, rows
        self.shape = len(rows), width

    @classmethod
    def of(cls, folders: Sequence[Path], counts: Sequence[int], width: int, *, scaled: bool) -> "Colbert":
        """All rows; scaled says that they are in int8, with a scale each."""
        shapes: dict[str, Callable[..., tuple[int, ...]]] = {
            "colbert_indptr": lambda n, *_: (n + 1,),
            "colbert": lambda n, indptr, *_: (int(indptr[-1]), width),
        }
        if scaled:
            shapes["colbert_scales"] = lambda n, indptr, *_: (int(indptr[-1]),)
        shards = _Shards(folders, counts, shapes, lambda *arrays: arrays)
        return cls(shards, width, range(len(shards)))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Colbert(self._shards, self.shape[1], self._rows[index])
        (indptr, vectors, *scales), row = self._shards.at(self._rows[int(index)])
        some = slice(*indptr[row : row + 2])
        found = vectors[some].astype(np.float32)
        return found * scales[0][some, None] if scales else found
