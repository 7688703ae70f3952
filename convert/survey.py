"""What is there of a model and what m3jax.load would miss, from the headers of its files alone.

Not here: printing it (inspection.py), and tensors' values (stored.py opens them). Tensors bear PyTorch's names throughout.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from convert import stored
from convert.stored import Stored
from m3jax import M3, M3Config, checkpoint, hub
from m3jax.model import flatten, shapes
from m3jax.tokenization import Tokenizer
from m3jax.weights import HEAD_FILES, torch_name

_PREFIX = "roberta."  # of transformers' masked-language models, whose own head is lm_head
_UNUSED = re.compile(r"(^|\.)embeddings\.position_ids$")  # a buffer of old transformers, not a weight
_ADD_FILES = "add the missing files; a tokenizer.json is what transformers' AutoTokenizer writes with save_pretrained"
_ADD_HEADS = "add the two head files, or start from random heads, to train them: m3jax.load(…, heads='init')"
_FIT = "take the config.json that the weights were saved with, or the weights that belong to it"


@dataclasses.dataclass
class Survey:
    """What was found. `problems` (each with what to do about it) is empty exactly where m3jax.load can read the model."""

    path: Path
    kind: str = ""
    config: M3Config | None = None
    tokenizer: Tokenizer | None = None
    tensors: dict[str, Stored] = dataclasses.field(default_factory=dict)
    unused: list[str] = dataclasses.field(default_factory=list)  # tensors that are known and not read
    problems: dict[str, str] = dataclasses.field(default_factory=dict)


def survey(source: str | Path) -> Survey:
    """Look at a local path or what the hub has under a name; ValueError where there is neither, or a broken Orbax step."""
    path = Path(source) if Path(source).exists() else hub.fetch(source)
    found = Survey(path)
    if path.is_file():
        found.problems["a single file"] = (
            "put it into a directory with config.json, tokenizer.json and the two head files"
        )
        _take(found, [path])
    elif checkpoint.is_checkpoint(path):
        found.config, found.tokenizer = checkpoint.describe(path)
        found.tensors = stored.read_checkpoint(path)
    else:
        _read_directory(found)
    prefixed = any(name.startswith(_PREFIX) for name in found.tensors)
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in found.tensors.items()}
    found.unused = [k for k in tensors if _UNUSED.search(k) or (prefixed and k.startswith("lm_head."))]
    found.tensors = {name: tensor for name, tensor in tensors.items() if name not in found.unused}
    found.kind = _kind(found, prefixed)
    if found.config is not None and not checkpoint.is_checkpoint(path):
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

    found.config = checked("config.json", lambda path: M3Config.from_json(path.read_text("utf-8"), source=str(path)))
    found.tokenizer = checked("tokenizer.json", Tokenizer.from_file)
    try:
        files = stored.weight_files(found.path)
    except ValueError as error:
        found.problems[str(error)] = f"write or download {stored.INDEX} again"
        files = []
    else:
        if not files:
            found.problems["missing file: model.safetensors, its shards, or pytorch_model.bin"] = _ADD_FILES
    _take(found, files)
    for head, file in HEAD_FILES.items():
        if (found.path / file).exists():
            if f"{head}.weight" in found.tensors:
                found.problems[f"twice: {head}, in {file} and among the weights"] = "remove one of the two"
            _take(found, [found.path / file], f"{head}.")
        elif f"{head}.weight" not in found.tensors:
            found.problems[f"missing file: {file}"] = _ADD_HEADS


def _take(found: Survey, files: list[Path], prefix: str = "") -> None:
    for file in files:
        if not file.exists():
            found.problems[f"missing file: {file.name}"] = _ADD_FILES
            continue
        try:
            found.tensors |= {prefix + name: tensor for name, tensor in stored.read(file).items()}
        except (ValueError, OSError) as error:
            found.problems[str(error)] = f"write or download {file.name} again"


def _kind(found: Survey, prefixed: bool) -> str:
    names = set(found.tensors)
    if checkpoint.is_checkpoint(found.path):
        return "Orbax checkpoint of m3jax"
    if prefixed:
        return f"masked-language model of transformers (names with the prefix {_PREFIX})"
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
        elif "float" not in tensor.dtype:
            found.problems[f"no floating-point numbers: {name} is {tensor.dtype}"] = _FIT
        elif tensor.shape != tuple(shape):
            found.problems[f"misshapen: {name} is {tensor.shape}, expected {tuple(shape)}"] = _FIT
    for name in found.tensors:
        if name not in expected:
            found.problems[f"left over: {name}"] = _FIT
