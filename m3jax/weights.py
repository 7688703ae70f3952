"""Released directories (the Hugging Face layout with FlagEmbedding's two head files) to parameters and back.

Not here: Orbax checkpoints (checkpoint.py), downloads, and other architectures. One two-way table names every tensor.
"""

import dataclasses
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from m3jax import pickles
from m3jax.card import CARD, is_ours, make_card
from m3jax.config import M3Config
from m3jax.model import M3, Params, check_tree, flatten, init, shapes, unflatten
from m3jax.tokenization import Tokenizer

HEAD_FILES = {"sparse_linear": "sparse_linear.pt", "colbert_linear": "colbert_linear.pt"}

# Parameter path ↔ tensor name of transformers' XLMRobertaModel; {} is the layer. A kernel is the transpose of PyTorch's
# weight, everything else is the same array.
_MODULES = (
    ("encoder/embeddings/word_embeddings", "embeddings.word_embeddings"),
    ("encoder/embeddings/position_embeddings", "embeddings.position_embeddings"),
    ("encoder/embeddings/token_type_embeddings", "embeddings.token_type_embeddings"),
    ("encoder/embeddings/layer_norm", "embeddings.LayerNorm"),
    ("encoder/layers/{}/q", "encoder.layer.{}.attention.self.query"),
    ("encoder/layers/{}/k", "encoder.layer.{}.attention.self.key"),
    ("encoder/layers/{}/v", "encoder.layer.{}.attention.self.value"),
    ("encoder/layers/{}/attention_out", "encoder.layer.{}.attention.output.dense"),
    ("encoder/layers/{}/attention_norm", "encoder.layer.{}.attention.output.LayerNorm"),
    ("encoder/layers/{}/up", "encoder.layer.{}.intermediate.dense"),
    ("encoder/layers/{}/down", "encoder.layer.{}.output.dense"),
    ("encoder/layers/{}/output_norm", "encoder.layer.{}.output.LayerNorm"),
    ("encoder/pooler", "pooler.dense"),
    ("heads/sparse_linear", "sparse_linear"),
    ("heads/colbert_linear", "colbert_linear"),
)
_LEAVES = {"embedding": "weight", "kernel": "weight", "scale": "weight", "bias": "bias"}
_IGNORED = re.compile(r"(^|\.)embeddings\.position_ids$")  # a buffer of old transformers, not a weight


def torch_name(path: str) -> str:
    """The PyTorch name of a parameter.

    >>> torch_name("encoder/layers/3/q/kernel")
    'encoder.layer.3.attention.self.query.weight'
    """
    module, _, leaf = path.rpartition("/")
    layer = re.search(r"/layers/(\d+)/", path)
    index = layer[1] if layer else ""
    table = {ours.format(index): theirs.format(index) for ours, theirs in _MODULES}
    return f"{table[module]}.{_LEAVES[leaf]}"


def read(directory: str | Path, *, heads: Literal["require", "init"] = "require") -> tuple[M3Config, Params, Tokenizer]:
    """Config, parameters (NumPy arrays, in the dtype stored) and tokenizer of a released directory.

    Reads `config.json`, `tokenizer.json`, and `model.safetensors` (sharded too) or `pytorch_model.bin`; the heads from
    `sparse_linear.pt` and `colbert_linear.pt`, or from the safetensors where they are there under `sparse_linear.*` and
    `colbert_linear.*`. heads="init" draws heads that are missing at random (the same each time).

    Raises ValueError on a file that is missing or broken, and one that lists every tensor missing, left over or misshapen.
    """
    directory = Path(directory)
    described = _file(directory, "config.json")
    config = M3Config.from_json(described.read_text(encoding="utf-8"), source=str(described))
    tensors = _read_tensors(directory)
    absent = []
    for head, file in HEAD_FILES.items():
        if (directory / file).exists():
            if f"{head}.weight" in tensors:
                raise ValueError(f"{directory}: {head} is both in {file} and among the weights; remove one of the two")
            tensors |= {f"{head}.{k}": v for k, v in pickles.read(directory / file).items()}
        elif f"{head}.weight" not in tensors:
            absent.append(head)
    if absent and heads == "require":
        files = " and ".join(HEAD_FILES[head] for head in absent)
        raise ValueError(
            f"{directory}: an M3 model needs its heads, {files}: not found, nor in the weights. Add the files, or pass "
            "heads='init' to start from random heads (to train them; random heads do not retrieve)"
        )
    colbert = tensors.get("colbert_linear.weight")
    if colbert is not None and colbert.ndim == 2:
        config = dataclasses.replace(config, colbert_dim=colbert.shape[0])
    config = dataclasses.replace(config, pooler="pooler.dense.weight" in tensors)
    expected = {torch_name(path): path for path in flatten(shapes(config))}
    params: dict[str, np.ndarray] = {}
    extra = []
    for name, tensor in tensors.items():
        path = expected.get(name)
        if path is not None and not jnp.issubdtype(tensor.dtype, jnp.floating):
            extra.append(f"{name} (of dtype {tensor.dtype}; weights are floating point)")
        elif path is not None:
            params[path] = tensor.T if path.endswith("/kernel") else tensor
        elif not _IGNORED.search(name):
            extra.append(name)
    check_tree(
        {path: x.shape for path, x in params.items()},
        {path: x.shape for path, x in flatten(shapes(config)).items() if not any(f"/{h}/" in path for h in absent)},
        source=directory,
        extra=extra,
        name=torch_name,
    )
    if absent:
        drawn = flatten(init(dataclasses.replace(config, vocab_size=4, num_hidden_layers=1), jax.random.key(0)))
        params |= {p: np.asarray(x) for p, x in drawn.items() if any(f"/{head}/" in p for head in absent)}
    tokenizer = Tokenizer.from_file(_file(directory, "tokenizer.json"))
    return config, unflatten(params), tokenizer


def write(m3: M3, directory: str | Path, *, card: str | None = None) -> None:
    """Write a released directory that `read`, transformers and FlagEmbedding read, laid out for sentence-transformers too.

    The encoder goes to `model.safetensors`; the heads go to the two `.pt` files, where FlagEmbedding and vLLM look.
    Parameters keep their dtype. card: the text of README.md; None says what the model itself tells. The directory appears
    under its name when it is complete; an existing one is replaced only if it holds nothing but what a save wrote, else
    ValueError: a README.md that a person wrote, or changed since, is not what a save wrote.
    """
    directory = Path(directory)
    if directory.exists():
        there = directory.rglob("*") if directory.is_dir() else [directory]
        foreign = sorted(p.name for p in there if p.is_file() and p.relative_to(directory).as_posix() not in _WRITTEN)
        own = directory / CARD
        if own.is_file() and not is_ours(own.read_text(encoding="utf-8", errors="replace")):
            foreign.insert(0, f"a {CARD} of your own")
        if foreign:
            raise ValueError(
                f"{directory} must be new or hold what an earlier save wrote, but there is {', '.join(foreign[:5])}; choose "
                "another name, or move that elsewhere"
            )
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {}
    for path, x in flatten(m3.params).items():
        array = np.asarray(x)
        # A transposed view would be written in its memory order, without a word, by safetensors.
        tensors[torch_name(path)] = np.ascontiguousarray(array.T if path.endswith("/kernel") else array)
    for head, file in HEAD_FILES.items():
        pickles.write(partial / file, {k: tensors.pop(f"{head}.{k}") for k in ("weight", "bias")})
    safetensors.numpy.save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    dtype = str(np.asarray(m3.params["encoder"]["embeddings"]["word_embeddings"]["embedding"]).dtype)
    config = json.loads(m3.config.to_json()) | {"dtype": dtype}
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (partial / "tokenizer.json").write_text(m3.tokenizer.json, encoding="utf-8", newline="")
    (partial / "tokenizer_config.json").write_text(_tokenizer_config(m3), encoding="utf-8")
    for name, content in _SENTENCE_TRANSFORMERS.items():
        (partial / name).parent.mkdir(exist_ok=True)
        (partial / name).write_text(json.dumps(content(m3.config), indent=2) + "\n", encoding="utf-8")
    if card is None:
        card = make_card(m3.config, sum(x.size for x in jax.tree.leaves(m3.params)))
    (partial / CARD).write_text(card, encoding="utf-8")
    # The old model keeps its name until the new one is complete, and is never half removed under it.
    older = directory.with_name(directory.name + ".older")
    shutil.rmtree(older, ignore_errors=True)
    if directory.exists():
        directory.rename(older)
    partial.rename(directory)
    shutil.rmtree(older, ignore_errors=True)


# What sentence-transformers reads: the CLS hidden state, normalised (the dense function).
_SENTENCE_TRANSFORMERS = {
    "modules.json": lambda config: [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate([("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")])
    ],
    "sentence_bert_config.json": lambda config: {"max_seq_length": config.max_length, "do_lower_case": False},
    "1_Pooling/config.json": lambda config: {
        "word_embedding_dimension": config.hidden_size,
        "pooling_mode_cls_token": True,
        "pooling_mode_mean_tokens": False,
    },
}

_WRITTEN = {
    *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", CARD),
    *HEAD_FILES.values(),
    *_SENTENCE_TRANSFORMERS,
}


def _tokenizer_config(m3: M3) -> str:
    special = {"bos": "<s>", "cls": "<s>", "eos": "</s>", "sep": "</s>", "unk": "<unk>", "pad": "<pad>"}
    if m3.tokenizer.mask_id is not None:
        special["mask"] = "<mask>"
    content = {f"{name}_token": token for name, token in special.items()}
    content |= {"tokenizer_class": "XLMRobertaTokenizer", "model_max_length": m3.config.max_length}
    return json.dumps(content, indent=2) + "\n"


def _file(directory: Path, name: str) -> Path:
    path = directory / name
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in directory.iterdir())) if directory.is_dir() else "no such directory"
        raise ValueError(f"{directory}: expected {name} of a released model; found: {there}")
    return path


def _read_tensors(directory: Path) -> dict[str, np.ndarray]:
    index = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").exists():
        return _read_safetensors(directory / "model.safetensors")
    if index.exists():
        try:
            shards: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{index}: expected JSON {{"weight_map": {{tensor: file}}}}; write it again') from error
        tensors: dict[str, np.ndarray] = {}
        for file in sorted(set(shards.values())):
            tensors |= _read_safetensors(_file(directory, Path(file).name))
        return tensors
    return dict(pickles.read(_file(directory, "pytorch_model.bin")))


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        return safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error}); download or write it again") from error
