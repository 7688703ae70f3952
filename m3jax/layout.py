"""Arrays into row-major order, at the speed of memory: PyTorch's weights are the transpose of our kernels.

Not here: files, and what is transposed (weights.py). NumPy alone walks a transposed view in rows that lie apart, and takes
twice as long.
"""

import mmap
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

_LINE_BYTES = 64  # what a processor reads and writes at once; also JAX's alignment for arrays that it takes as they lie


def copy(target: np.ndarray, source: np.ndarray) -> None:
    """Write the numbers of an array into another of the same shape; of a transposed view, by whole lines of memory."""
    if source.ndim < 2:
        target[...] = source
        return
    strip = max(1, _LINE_BYTES // source.itemsize)
    for column in range(0, source.shape[-1], strip):
        target[..., column : column + strip] = source[..., column : column + strip]


def row_major(tree: Any) -> Any:
    """A tree of NumPy arrays, each in row-major order: those that are stay what they are, the others are copied by two threads.

    >>> (x,) = row_major([np.arange(6).reshape(2, 3).T])
    >>> x.flags.c_contiguous, x.tolist()
    (True, [[0, 3], [1, 4], [2, 5]])
    """
    arrays, structure = jax.tree.flatten(tree)
    strided = {index: x for index, x in enumerate(arrays) if not x.flags.c_contiguous}
    # In one block that is no allocation of NumPy's, which asks for huge pages: where a machine has none at hand (a virtual one
    # that gives free memory back), 1.2 GB of them took 2.2 to 3.6 s, plain pages 0.9 s.
    sizes = {index: -(-x.nbytes // _LINE_BYTES) * _LINE_BYTES for index, x in strided.items()}
    size = max(sum(sizes.values()), 1)
    block, start = np.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8), 0
    with ThreadPoolExecutor(2) as threads:
        copies = []
        for index, x in strided.items():
            arrays[index] = block[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
            copies.append(threads.submit(copy, arrays[index], x))
            start += sizes[index]
        for copied in copies:
            copied.result()
    return structure.unflatten(arrays)
