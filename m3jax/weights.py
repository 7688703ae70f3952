"""Released directories (the Hugging Face layout with FlagEmbedding's two head files) to parameters and back.

Not here: Orbax checkpoints (checkpoint.py), downloads, and other architectures. One two-way table names every tensor.
"""

import dataclasses
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from m3jax import paths, pickles, safetensor_files
from m3jax.card import CARD, is_ours, make_card
from m3jax.config import M3Config
from m3jax.model import M3, Params, check_tree, flatten, init, shapes, unflatten
from m3jax.tokenization import Tokenizer

LAST_WEIGHTS = "pytorch_model.bin"  # of the forms that are looked for
ANY_WEIGHTS = f"model.safetensors, its shards, or {LAST_WEIGHTS}"
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
# A buffer of old transformers, and the prefix of its masked-language models, whose own head is lm_head.
UNUSED, MLM_PREFIX = re.compile(r"(^|\.)embeddings\.position_ids$"), "roberta."


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


def read(
    directory: str | Path,
    *,
    heads: Literal["require", "init"] = "require",
    colbert_dim: int | None = None,
    seed: int = 0,
) -> tuple[M3Config, Params, Tokenizer]:
    """Config, parameters and tokenizer of a local released directory.

    The parameters are NumPy arrays in the dtype stored, read-only views of the mapped files: nothing is read until it is used.

    Reads `config.json`, `tokenizer.json`, and `model.safetensors` (sharded too) or `pytorch_model.bin`; the heads from
    `sparse_linear.pt` and `colbert_linear.pt`, or from the safetensors where they are there under `sparse_linear.*` and
    `colbert_linear.*`. Of a masked-language-model file the encoder is taken, and a warning names the head that is not
    (`read_lm_head`); a warning also names what a sentence-transformers export does that M3's dense function, the normalised
    CLS state, does not (a mean over tokens, a further layer). heads="init" draws heads that are missing at random (from
    `seed`), a colbert head of width `colbert_dim` where that is given.

    Raises ValueError on a file that is missing or broken, and one that lists every tensor missing, left over or misshapen.
    """
    directory = Path(directory)
    config = M3Config.from_file(_file(directory, "config.json"))
    tensors: dict[str, np.ndarray] = {}
    for file in weight_files(directory):
        shard = read_file(_file(directory, file))
        if twice := sorted(shard.keys() & tensors.keys()):
            raise ValueError(
                f"{directory}: a tensor is in one shard; {', '.join(twice)} in {file} too; write them again"
            )
        tensors |= shard
    tensors = _without_lm_head(tensors, directory)
    if others := other_modules(directory):
        warnings.warn(
            f"{directory}: M3's dense vector is the normalised CLS state, but this export {' and '.join(others)}, which is "
            "not read: vectors will not be those of sentence-transformers; train before you search with them",
            stacklevel=2,
        )
    absent = []
    for head, file in HEAD_FILES.items():
        if (directory / file).exists():
            if f"{head}.weight" in tensors:
                raise ValueError(f"{directory}: {head} is both in {file} and among the weights; remove one of the two")
            tensors |= {f"{head}.{k}": v for k, v in read_file(directory / file).items()}
        elif f"{head}.weight" not in tensors:
            absent.append(head)
    colbert = tensors.get("colbert_linear.weight")
    if colbert is not None and colbert.ndim == 2:
        config = dataclasses.replace(config, colbert_dim=colbert.shape[0])
    elif colbert is None and colbert_dim:
        config = dataclasses.replace(config, colbert_dim=colbert_dim)
    pooler = {name: x for name, x in tensors.items() if name.startswith("pooler.")}
    if len(pooler) == 2 and not any(x.any() for x in pooler.values()):  # what `write` puts where there is none
        tensors = {name: x for name, x in tensors.items() if name not in pooler}
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
        elif not UNUSED.search(name):
            extra.append(name)
    without = ""
    if absent and heads == "require":
        files = " and ".join(HEAD_FILES[head] for head in absent)
        without = (
            f"an M3 model needs its heads, {files}: not found, nor in the weights. Add the files, or pass heads='init' to "
            "start from random heads (to train them; random heads do not retrieve)"
        )
    try:
        check_tree(
            {path: x.shape for path, x in params.items()},
            {path: x.shape for path, x in flatten(shapes(config)).items() if not any(f"/{h}/" in path for h in absent)},
            source=directory,
            extra=extra,
            name=torch_name,
        )
    except ValueError as error:
        raise ValueError(f"{error}\n  {without}" if without else str(error)) from None
    if without:
        raise ValueError(f"{directory}: {without}")
    if absent:
        drawn = flatten(init(dataclasses.replace(config, vocab_size=4, num_hidden_layers=1), jax.random.key(seed)))
        params |= {p: np.asarray(x) for p, x in drawn.items() if any(f"/{head}/" in p for head in absent)}
    tokenizer = Tokenizer.from_file(_file(directory, "tokenizer.json"))
    return config, unflatten(params), tokenizer


def read_lm_head(directory: str | Path, width: int, terms: int) -> Params | None:
    """The head of a masked-language model's file as `retromae` has it, in the dtype stored; None where there is none.

    width, terms: of the encoder that it stands on. ValueError where the head is not whole or not of these sizes.
    """
    found: dict[str, np.ndarray] = {}
    for file in weight_files(Path(directory)):
        found |= {k: v for k, v in read_file(_file(Path(directory), file)).items() if k.startswith("lm_head.")}
    # The head's matrix is the word embeddings, whatever a file repeats of them and of the bias under lm_head.decoder.
    given = {path: found[name] for path, name in _LM_HEAD.items() if name in found}
    if not given:
        return None
    given = {path: x.T if path.endswith("/kernel") else x for path, x in given.items()}
    vectors = dict.fromkeys(("dense/bias", "layer_norm/scale", "layer_norm/bias"), (width,))
    check_tree(
        {path: x.shape for path, x in given.items()},
        {"dense/kernel": (width, width), **vectors, "bias": (terms,)},
        source=f"{directory}, its language-model head",
        name=_LM_HEAD.__getitem__,
    )
    return unflatten(given)


_LM_HEAD = {
    "dense/kernel": "lm_head.dense.weight",
    "dense/bias": "lm_head.dense.bias",
    "layer_norm/scale": "lm_head.layer_norm.weight",
    "layer_norm/bias": "lm_head.layer_norm.bias",
    "bias": "lm_head.bias",
}


def write(
    m3: M3,
    directory: str | Path,
    *,
    format: Literal["safetensors", "pickle"] = "safetensors",
    replace: bool = True,
    card: str | None = None,
    progress: bool = False,
) -> None:
    """Write a released directory that `read`, transformers, FlagEmbedding and sentence-transformers read.

    A model whose parameters have no heads, an encoder to train, gets no files of them. The encoder goes to
    `model.safetensors`, with format="pickle" to `pytorch_model.bin`; the heads always go to the two `.pt`
    files, where FlagEmbedding and vLLM look. Parameters keep their dtype. A model without a pooler gets one of zeros.

    card: the text of README.md; None says what the model itself tells. The directory (or URL) appears under its name when it
    is complete. ValueError where it exists, unless `replace` and it holds nothing but what a save wrote: a README.md that a
    person wrote, or changed since, is not that. progress shows a bar on stderr.
    """
    if format not in ("safetensors", "pickle"):
        raise ValueError(f"format must be 'safetensors' or 'pickle', got {format!r}")
    foreign = [name for name in paths.files(directory) if name not in _WRITTEN]
    if CARD in paths.files(directory) and not is_ours(paths.read_text(directory, CARD)):
        foreign.insert(0, f"a {CARD} of your own")
    if foreign or (paths.exists(directory) and not replace):
        came = f"there is {', '.join(foreign[:5])}" if replace else "it exists"
        raise ValueError(
            f"{directory} must be new{' or hold what an earlier save wrote' * replace}, but {came}; choose another name, "
            "or move that elsewhere"
        )
    # Views: of two transposed matrices one is copied at a time, while it is written.
    arrays = {path: np.asarray(x) for path, x in flatten(m3.params).items()}
    tensors = {torch_name(path): x.T if path.endswith("/kernel") else x for path, x in arrays.items()}
    dtype = arrays["encoder/embeddings/word_embeddings/embedding"].dtype
    if not m3.config.pooler:
        # transformers draws one at random where there is none, and warns. Nothing reads it; zeros are read back as none.
        width = m3.config.hidden_size
        tensors |= {"pooler.dense.weight": np.zeros((width, width), dtype), "pooler.dense.bias": np.zeros(width, dtype)}
    size = sum(x.nbytes for x in tensors.values())
    with paths.writing(directory, last="config.json", size=size, progress=progress) as folder:
        for head, file in HEAD_FILES.items():
            if f"{head}.weight" in tensors:
                pickles.write(folder / file, {k: tensors.pop(f"{head}.{k}") for k in ("weight", "bias")})
        if format == "pickle":
            pickles.write(folder / "pytorch_model.bin", tensors)
        else:
            safetensor_files.write(folder / "model.safetensors", tensors)
        texts = {
            name: json.dumps(content(m3.config), indent=2) + "\n" for name, content in _SENTENCE_TRANSFORMERS.items()
        }
        texts["config.json"] = json.dumps(json.loads(m3.config.to_json()) | {"dtype": str(dtype)}, indent=2) + "\n"
        texts["tokenizer.json"] = m3.tokenizer.json
        texts["tokenizer_config.json"] = _tokenizer_config(m3)
        texts[CARD] = make_card(m3.config, sum(x.size for x in arrays.values())) if card is None else card
        for name, text in texts.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8", newline="")


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
    *("config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.json", "tokenizer_config.json", CARD),
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
        expected = ANY_WEIGHTS if name == LAST_WEIGHTS else name
        shards = f"; shards of {LAST_WEIGHTS} are not read, save the model as safetensors"
        told = shards if name == LAST_WEIGHTS and (directory / f"{name}.index.json").exists() else ""
        raise ValueError(f"{directory}: expected {expected} of a released model; found: {there}{told}")
    return path


def _without_lm_head(tensors: dict[str, np.ndarray], directory: Path) -> dict[str, np.ndarray]:
    """The encoder of a masked-language-model file (xlm-roberta-base, -large) under an encoder's names; others unchanged."""
    if not any(name.startswith(MLM_PREFIX) for name in tensors):
        return tensors
    head = [name for name in tensors if name.startswith("lm_head.")]
    if head:
        warnings.warn(
            f"{directory}: the language-model head is no part of an M3 model: {', '.join(sorted(head))}", stacklevel=3
        )
    encoder = {name: x for name, x in tensors.items() if name not in head}
    # A name that is there with the prefix and without keeps it, and is left over.
    return {k if (short := k.removeprefix(MLM_PREFIX)) in encoder else short: x for k, x in encoder.items()}


def other_modules(directory: Path) -> list[str]:
    """What sentence-transformers does in a directory that M3's dense function, the normalised CLS state, does not.

    Such as ["pools by mean", "has a Dense module"]; empty where there is no modules.json. ValueError on one that is broken.
    """
    path = directory / "modules.json"
    if not path.exists():
        return []
    others = []
    try:
        for module in json.loads(path.read_text(encoding="utf-8")):
            kind = module["type"].rpartition(".")[2]
            if kind == "Pooling":
                path = directory / module["path"] / "config.json"
                modes = (
                    _pooling(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else [f"a missing {path}"]
                )
                others += [] if modes == ["cls"] else [f"pools by {', '.join(modes)}"]
            elif kind not in ("Transformer", "Normalize"):
                others.append(f"has a {kind} module")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: expected what sentence-transformers writes, got {error!r}; write or remove it"
        ) from error
    return others


def _pooling(config: Mapping[str, Any]) -> list[str]:
    """The modes of a Pooling module: one key in newer files, a key for each mode in older ones."""
    if mode := config.get("pooling_mode"):
        return [mode] if isinstance(mode, str) else list(mode)
    flags = [key.removeprefix("pooling_mode_") for key, on in config.items() if key.startswith("pooling_mode_") and on]
    return [flag.removesuffix("_token").removesuffix("_tokens") for flag in flags]


def weight_files(directory: Path) -> list[str]:
    """The names of the files of a directory's encoder, the first form that is there; shards are those that their index names.

    Where there is none, `pytorch_model.bin`, the last one looked for. ValueError on an index that is broken.
    """
    if (directory / "model.safetensors").exists():
        return ["model.safetensors"]
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return [LAST_WEIGHTS]
    try:
        shards: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return sorted({Path(file).name for file in shards.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{index}: expected JSON {{"weight_map": {{tensor: file}}}}; write it again') from error


def read_file(file: Path) -> dict[str, np.ndarray]:
    """The tensors of one file, `.safetensors` or PyTorch's pickle, as views of the mapped file; ValueError where broken."""
    return safetensor_files.read(file) if file.suffix == ".safetensors" else dict(pickles.read(file))
