"""What is there of a model and what m3jax.load would miss, from the headers of its files alone.

Not here: printing it (inspection.py). Tensors bear PyTorch's names throughout.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from m3jax import M3, M3Config, checkpoint
from m3jax.model import flatten, shapes
from m3jax.tokenization import Tokenizer
from m3jax.weights import (
    ANY_WEIGHTS,
    HEAD_FILES,
    LAST_WEIGHTS,
    MLM_PREFIX,
    UNUSED,
    other_modules,
    read_file,
    torch_name,
    weight_files,
)

_ADD_FILES = "add the missing files; a tokenizer.json is what transformers' AutoTokenizer writes with save_pretrained"
_ADD_HEADS = "add the two head files, or start from random heads, to train them: m3jax.load(…, heads='init')"
_FIT = "take the config.json that the weights were saved with, or the weights that belong to it"


class Stored(NamedTuple):
    """What a file says of one tensor, as PyTorch has it."""

    file: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclasses.dataclass
class Survey:
    """What was found. `problems` (each with what to do about it) is empty exactly where m3jax.load can read the model."""

    path: Path
    kind: str = ""
    config: M3Config | None = None
    tokenizer: Tokenizer | None = None
    tensors: dict[str, Stored] = dataclasses.field(default_factory=dict)
    prefixed: bool = False  # names began with that of masked-language models, which is taken off
    unused: list[str] = dataclasses.field(default_factory=list)  # tensors that are known and not read
    others: list[str] = dataclasses.field(default_factory=list)  # weights.other_modules
    problems: dict[str, str] = dataclasses.field(default_factory=dict)


def survey(path: Path) -> Survey:
    """Look at a directory, an Orbax checkpoint or a single weight file; ValueError on a broken Orbax step."""
    found = Survey(path)
    is_checkpoint = checkpoint.is_checkpoint(path)
    if path.is_file():
        found.problems["a single file"] = (
            "put it into a directory with config.json, tokenizer.json and the two head files"
        )
        _take(found, [path.name], path.parent)
        _take_off_prefix(found)
    elif is_checkpoint:
        found.config, found.tokenizer = checkpoint.describe(path)
        for name, x in checkpoint.stored_shapes(path).items():
            shape = x.shape[::-1] if name.endswith("/kernel") else x.shape
            found.tensors[_name(name)] = Stored("Orbax", shape, x.dtype)
    else:
        _read_directory(found)
    found.unused = [k for k in found.tensors if UNUSED.search(k) or (found.prefixed and k.startswith("lm_head."))]
    found.tensors = {name: tensor for name, tensor in found.tensors.items() if name not in found.unused}
    found.kind = "Orbax checkpoint of m3jax" if is_checkpoint else _kind(found)
    if found.config is not None and not is_checkpoint:
        # What a released config.json does not say; a checkpoint of ours does.
        colbert = found.tensors.get("colbert_linear.weight")
        width = colbert.shape[0] if colbert and len(colbert.shape) == 2 else found.config.colbert_dim
        has_pooler = "pooler.dense.weight" in found.tensors
        found.config = dataclasses.replace(found.config, colbert_dim=width, pooler=has_pooler)
    sizes = found.config or sizes_of(found.tensors)
    if sizes:
        _compare(found, sizes)
    if found.config and found.tokenizer:
        try:
            M3(found.config, {}, found.tokenizer)
        except ValueError as error:
            found.problems[str(error)] = "take the tokenizer.json that the weights were trained with"
    return found


def sizes_of(tensors: Mapping[str, Stored]) -> M3Config | None:
    """The sizes that the tensors' shapes tell (all but the number of attention heads, which stands as 1), where they do."""
    words, positions, types = (
        tensors.get(f"embeddings.{x}_embeddings.weight") for x in ("word", "position", "token_type")
    )
    up = tensors.get("encoder.layer.0.intermediate.dense.weight")
    colbert = tensors.get("colbert_linear.weight")
    layers = {m[1] for name in tensors if (m := re.match(r"encoder\.layer\.(\d+)\.", name))}
    if not (words and positions and types and up) or any(len(x.shape) != 2 for x in (words, positions, types, up)):
        return None
    return M3Config(
        vocab_size=words.shape[0],
        hidden_size=words.shape[1],
        num_hidden_layers=len(layers),
        num_attention_heads=1,
        intermediate_size=up.shape[0],
        max_position_embeddings=positions.shape[0],
        type_vocab_size=types.shape[0],
        colbert_dim=colbert.shape[0] if colbert and len(colbert.shape) == 2 else words.shape[1],
        pooler="pooler.dense.weight" in tensors,
    )


def _read_directory(found: Survey) -> None:
    def checked(name: str, read: Callable[[Path], Any]) -> Any:
        path = found.path / name
        if not path.is_file():
            found.problems[f"missing file: {name}"] = _ADD_FILES
            return None
        try:
            return read(path)
        except ValueError as error:
            found.problems[str(error)] = f"write or download {name} again"
            return None

    found.config = checked("config.json", M3Config.from_file)
    found.tokenizer = checked("tokenizer.json", Tokenizer.from_file)
    try:
        _take(found, weight_files(found.path), found.path)
    except ValueError as error:
        found.problems[str(error)] = "write or download the index of the shards again"
    _take_off_prefix(found)
    try:
        found.others = other_modules(found.path)
    except ValueError as error:
        found.problems[str(error)] = "write or download it again, or remove modules.json"
    for head, file in HEAD_FILES.items():
        if (found.path / file).exists():
            if f"{head}.weight" in found.tensors:
                found.problems[f"twice: {head}, in {file} and among the weights"] = "remove one of the two"
            _take(found, [file], found.path, f"{head}.")
        elif f"{head}.weight" not in found.tensors:
            found.problems[f"missing file: {file}"] = _ADD_HEADS


def _take(found: Survey, files: Sequence[str], folder: Path, prefix: str = "") -> None:
    for file in files:
        if not (folder / file).exists():
            found.problems[f"missing file: {ANY_WEIGHTS if file == LAST_WEIGHTS else file}"] = _ADD_FILES
            continue
        try:
            tensors = read_file(folder / file)
        except (ValueError, OSError) as error:
            found.problems[str(error)] = f"write or download {file} again"
        else:
            stored = {prefix + name: Stored(file, x.shape, x.dtype) for name, x in tensors.items()}
            if not prefix and (twice := sorted(stored.keys() & found.tensors.keys())):
                found.problems[f"twice: {', '.join(twice)}, in {file} too"] = "write the shards again"
            found.tensors |= stored


def _name(path: str) -> str:
    try:
        return torch_name(path)
    except KeyError:
        return path  # none of our parameters; who compares the names says so


def _take_off_prefix(found: Survey) -> None:
    """Before heads are looked for: they may be among the weights, under the prefix too."""
    found.prefixed = any(name.startswith(MLM_PREFIX) for name in found.tensors)
    found.tensors = {
        name if (short := name.removeprefix(MLM_PREFIX)) in found.tensors else short: tensor
        for name, tensor in found.tensors.items()
    }


def _kind(found: Survey) -> str:
    names = set(found.tensors)
    if found.prefixed:
        return f"masked-language model of transformers (names with the prefix {MLM_PREFIX})"
    if found.path.is_file():
        return "head of an M3 model" if names == {"weight", "bias"} else "weights"
    for_sentences = (found.path / "modules.json").exists()
    if not all(f"{head}.weight" in names for head in HEAD_FILES):
        return "sentence-transformers export, no M3 heads" if for_sentences else "encoder, no M3 heads"
    if (found.path / "training_args.bin").exists():
        return "FlagEmbedding output"
    return "released directory" + (", with the files of sentence-transformers" if for_sentences else "")


def _compare(found: Survey, sizes: M3Config) -> None:
    expected = {}
    for path, x in flatten(shapes(sizes)).items():
        expected[torch_name(path)] = x.shape[::-1] if path.endswith("/kernel") else x.shape
    # A head without its file is told by the file, and is none of a single file's.
    absent = {h for h, file in HEAD_FILES.items() if f"missing file: {file}" in found.problems or found.path.is_file()}
    for name, shape in expected.items():
        tensor = found.tensors.get(name)
        if tensor is None:
            if name.partition(".")[0] not in absent:
                found.problems[f"missing: {name}"] = _FIT
        elif not jnp.issubdtype(tensor.dtype, jnp.floating):
            found.problems[f"no floating-point numbers: {name} is {tensor.dtype}"] = _FIT
        elif tensor.shape != tuple(shape):
            found.problems[f"misshapen: {name} is {tensor.shape}, expected {tuple(shape)}"] = _FIT
    for name in found.tensors:
        if name not in expected:
            found.problems[f"left over: {name}"] = _FIT
