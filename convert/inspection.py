"""`python -m convert inspect PATH`: prints what is there of a model and what is missing, without reading a weight.

Not here: how it is found out (survey.py).
"""

import argparse
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

from convert.survey import Survey, sizes_of, survey
from m3jax import checkpoint, paths, sources
from m3jax.weights import HEAD_FILES

_OTHERS = {
    "tokenizer_config.json": "transformers, FlagEmbedding, vLLM",
    "modules.json": "sentence-transformers",
    "1_Pooling/config.json": "sentence-transformers",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the subcommand."""
    parser.add_argument(
        "path", help="a directory, an Orbax checkpoint, a weight file, a hub name or a URL (fetched as load would)"
    )


def run(given: argparse.Namespace) -> None:
    """Print what is there and what is missing; SystemExit(1) where m3jax.load could not read it."""
    file = Path(given.path)
    with nullcontext(file) if file.is_file() else sources.local(given.path) as path:
        found = survey(path)
        lines = {"path": given.path if paths.is_url(given.path) else str(path)} | described(found)
    for name, value in lines.items():
        print(f"{name:<11} {value}")
    if found.problems:
        print(f"\n{len(found.problems)} in the way of m3jax.load:", *found.problems, sep="\n  ")
        print("\nto do:", *dict.fromkeys(found.problems.values()), sep="\n  ")
        raise SystemExit(1)
    print("complete: m3jax.load reads it")


def described(found: Survey) -> dict[str, str]:
    """The lines of the report, by their names."""
    tensors, config = list(found.tensors.values()), found.config
    dtypes = Counter(str(x.dtype) for x in tensors)
    heads = {h: found.tensors.get(f"{h}.weight") for h in HEAD_FILES}
    lines = {"kind": found.kind}
    if sizes := config or sizes_of(found.tensors):
        attention = (
            f"{sizes.num_attention_heads} attention heads" if config else "attention heads unknown (config.json)"
        )
        lines["geometry"] = f"{sizes.num_hidden_layers} layers × {sizes.hidden_size}, {attention}, "
        lines["geometry"] += f"feed-forward {sizes.intermediate_size}"
        lines["positions"] = f"{sizes.max_position_embeddings:,} rows: texts of up to {sizes.max_length:,} tokens"
        lines["vocabulary"] = f"{sizes.vocab_size:,} rows"
    tokens = f"tokenizer of {found.tokenizer.vocab_size:,} ids" if found.tokenizer else "no tokenizer"
    lines["vocabulary"] = ", ".join(filter(None, [lines.get("vocabulary"), tokens]))
    parameters, size = sum(x.size for x in tensors), sum(x.size * x.dtype.itemsize for x in tensors)
    lines["tensors"] = f"{len(tensors)} tensors, {parameters:,} parameters, {size:,} bytes"
    lines["dtypes"] = ", ".join(f"{dtype} ({count} tensors)" for dtype, count in dtypes.items()) or "none"
    lines["heads"] = ", ".join(f"{k} {list(x.shape)} in {x.file}" if x else f"no {k}" for k, x in heads.items())
    lines["pooler"] = "yes (M3 does not use it)" if "pooler.dense.weight" in found.tensors else "no"
    if unread := [*found.unused, *(f"that it {other}" for other in found.others)]:
        lines["not read"] = ", ".join(unread)
    if found.path.is_dir() and not checkpoint.is_checkpoint(found.path):
        absent = [f"{file} ({who})" for file, who in _OTHERS.items() if not (found.path / file).exists()]
        lines["for others"] = f"not there: {', '.join(absent)}; m3jax.save writes it" if absent else "all there"
    return lines
