"""safetensors files without a copy in memory: a reader that maps the file, and a writer that takes one tensor at a time.

Not here: PyTorch's pickles (pickles.py) and what tensors are called (weights.py). The safetensors package checks the files;
its own `load_file` and `save_file` hold all tensors at once, beside those that the caller holds.
"""

import json
import mmap
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors

from m3jax import layout

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# What two cores write fastest (RESULTS.md, "Weights in and out"): from 2 MiB on the system takes several times as long.
_PIECE_BYTES, _THREADS = 2**19, 2


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Every tensor by name, in the dtype stored, as read-only views of the mapped file.

    The file must not change while they are in use. Raises ValueError on a file that is cut off, damaged or holds a dtype
    that weights do not have.
    """
    try:
        with safetensors.safe_open(path, "numpy"):  # checks header, offsets and file size
            pass
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error}); download or write it again") from error
    with open(path, "rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    start = 8 + int.from_bytes(content[:8], "little")
    tensors = {}
    for name, entry in json.loads(content[8:start]).items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise ValueError(
                f"{path}: tensors are of {', '.join(_DTYPES)}, but {name} is of {entry['dtype']}; convert it"
            )
        tensors[name] = np.ndarray(entry["shape"], _DTYPES[entry["dtype"]], content, start + entry["data_offsets"][0])
    return tensors


def write(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray]) -> None:
    """Write tensors in row-major order, whatever their strides; a transposed view is copied only while it is written.

    The bytes depend on names and values alone. ValueError for a dtype that `read` does not know.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(f"{folder}/one.safetensors", {"a": np.float32([[1, 2], [3, 4]]).T})
    ...     read(f"{folder}/one.safetensors")
    {'a': array([[1., 3.],
           [2., 4.]], dtype=float32)}
    """
    unknown = [f"{name} ({x.dtype})" for name, x in tensors.items() if x.dtype not in _NAMES]
    if unknown:
        raise ValueError(f"{path}: tensors are of {', '.join(_DTYPES)}; convert {', '.join(unknown)}")
    # Wide dtypes first, so that every tensor begins at a multiple of its item's size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
    end = 0
    for name, x in ordered:
        header[name] = {"dtype": _NAMES[x.dtype], "shape": x.shape, "data_offsets": (end, end + x.nbytes)}
        end += x.nbytes
    described = json.dumps(header).encode()
    described += b" " * (-(8 + len(described)) % 64)  # so that JAX can take the mapped tensors as they lie
    with Path(path).open("xb") as file:
        file.write(len(described).to_bytes(8, "little") + described)
        file.flush()
        starts = accumulate((x.nbytes for _, x in ordered), initial=8 + len(described))
        with ThreadPoolExecutor(_THREADS) as threads:
            for written in [
                threads.submit(_write_at, path, start, x) for start, (_, x) in zip(starts, ordered, strict=False)
            ]:
                written.result()
        os.fsync(file.fileno())


def _write_at(path: str | os.PathLike[str], start: int, x: np.ndarray) -> None:
    """Write an array in row-major order from a position of a file on, in pieces that stay in the processor's cache."""
    if x.ndim < 2:
        x = x.reshape(1, -1)
    rows = max(1, _PIECE_BYTES * len(x) // max(x.nbytes, 1))
    copy = np.empty((rows, *x.shape[1:]), x.dtype)
    with open(path, "r+b", buffering=0) as file:
        file.seek(start)
        for first in range(0, len(x), rows):
            piece = x[first : first + rows]
            if not piece.flags.c_contiguous:
                layout.copy(copy[: len(piece)], piece)
                piece = copy[: len(piece)]
            content = piece.reshape(-1).view(np.uint8).data
            while content:  # a write may be cut short
                content = content[file.write(content[:_PIECE_BYTES]) :]
