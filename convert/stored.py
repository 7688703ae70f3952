"""What is stored in a model's files: name, shape and dtype of every tensor, and its values only when asked for.

Not here: what a model needs of it (inspection.py), and whole models (m3jax/weights.py, m3jax/checkpoint.py).
"""

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors

from m3jax import checkpoint, pickles
from m3jax.weights import torch_name

INDEX = "model.safetensors.index.json"
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_DTYPES |= {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}
_ITEM_BYTES = {
    "float64": 8,
    "int64": 8,
    "float32": 4,
    "int32": 4,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}  # the others have 2


@dataclass(frozen=True)
class Stored:
    """One tensor as PyTorch has it. dtype is NumPy's name; `open` gives what `[start:stop]` reads rows of."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    open: Callable[[], Any]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Of the values."""
        return self.size * _ITEM_BYTES.get(self.dtype, 2)


def read(file: Path) -> dict[str, Stored]:
    """The tensors of one `.safetensors` file, or of one zip pickle of PyTorch, by name; ValueError where it is neither."""
    if file.suffix != ".safetensors":
        views = pickles.read(file)  # of the mapped file
        return {
            name: Stored(file.name, x.shape, x.dtype.name, functools.partial(_same, x)) for name, x in views.items()
        }
    try:
        # The slices keep the file open; it is mapped, and rows are read when they are asked for.
        opened = safetensors.safe_open(file, framework="numpy")
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (it is no mapping)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file}: not a readable safetensors file ({error}); download or write it again") from error
    return {
        name: Stored(file.name, tuple(x.get_shape()), _dtype(x), functools.partial(_same, x))
        for name, x in slices.items()
    }


def weight_files(directory: Path) -> list[Path]:
    """The files of a released directory's encoder, in the order in which m3jax.load looks; [] where there are none.

    Files that the index of shards names are listed whether they exist or not. ValueError on an index that is broken.
    """
    if (directory / "model.safetensors").exists():
        return [directory / "model.safetensors"]
    index = directory / INDEX
    if index.exists():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            return [directory / Path(name).name for name in sorted(names)]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f'{index}: expected JSON {{"weight_map": {{tensor: file}}}}; write it again') from error
    return [file for file in [directory / "pytorch_model.bin"] if file.exists()]


def read_checkpoint(directory: Path) -> dict[str, Stored]:
    """The tensors of an Orbax checkpoint of ours, under PyTorch's names and in its layout."""
    found = {}
    for path, (one, restore) in checkpoint.parts(directory).items():
        kernel = path.endswith("/kernel")
        try:
            name = torch_name(path)
        except KeyError:
            name = path  # none of our parameters; who compares the names says so
        values = functools.partial(_transposed, restore) if kernel else restore
        found[name] = Stored("Orbax", one.shape[::-1] if kernel else one.shape, one.dtype.name, values)
    return found


def _same(x: Any) -> Any:
    return x


def _transposed(restore: Callable[[], Any]) -> Any:
    return restore().T


def _dtype(one: Any) -> str:
    code = str(one.get_dtype())
    return _DTYPES.get(code, code)
