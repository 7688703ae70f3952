"""`python -m convert merge A B --weights 0.7,0.3 OUT`: the weighted mean of the parameters of models of one geometry.

Not here: what makes a model complete (survey.py) and the formats (m3jax/weights.py, m3jax/checkpoint.py).
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes  # noqa: F401 (makes np.dtype know bfloat16)
import numpy as np
from tqdm import tqdm

from convert.survey import Survey, survey
from m3jax import M3, checkpoint, weights
from m3jax.model import flatten, shapes, unflatten

# Elements that are summed at once, in float64: 32 MiB of each model, beside a table of 256M elements that is written.
_BLOCK_ELEMENTS = 1 << 22


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the subcommand."""
    parser.add_argument("models", nargs="*", help="released directories, Orbax checkpoints or hub names")
    # OUT stands after the weights, where argparse would take a positional argument for an unknown one.
    parser.add_argument(
        "--weights",
        nargs="+",
        required=True,
        metavar=("W,W", "OUT"),
        help="the share of each model, in their order, with the sum 1; then the new directory, in the form and dtypes of the "
        "first model",
    )


def run(given: argparse.Namespace) -> M3:
    """Merge; the model that was written. ValueError where models, weights or OUT do not fit."""
    shares = parse(given.weights[0])
    *sources, out = [*given.models, *given.weights[1:]] or [""]
    if not sources or len(shares) != len(sources):
        raise ValueError(
            f"merge takes models, their weights and OUT, as in `merge A B --weights 0.7,0.3 OUT`; got {len(sources)} models "
            f"and {len(shares)} weights"
        )
    if Path(out).exists():
        raise ValueError(f"{out} must be new, but exists; choose another name or remove it")
    models = [survey(source) for source in sources]
    check(models)
    m3 = merge(models, shares)
    if checkpoint.is_checkpoint(models[0].path):
        checkpoint.write(m3, out)
    else:
        weights.write(m3, out)
    given.dst = out
    return m3


def parse(text: str) -> list[float]:
    """The shares in "0.7,0.3", scaled to the sum 1 exactly; ValueError unless each is in [0, 1] and their sum 1 ± 1e-6."""
    try:
        shares = [float(share) for share in text.split(",")]
    except ValueError:
        shares = []
    if not shares or not all(0 <= share <= 1 for share in shares) or abs(math.fsum(shares) - 1) > 1e-6:
        raise ValueError(f"weights must be numbers from 0 to 1 with the sum 1, such as 0.7,0.3; got {text!r}")
    return [share / math.fsum(shares) for share in shares]


def check(models: Sequence[Survey]) -> None:
    """ValueError that lists all that keeps models from being mixed with the first."""
    lines = [
        f"{m.path}: {len(m.problems)} in the way of loading it (`inspect` says more)" for m in models if m.problems
    ]
    first, *others = models
    for other in others:
        if first.config and other.config:
            sizes, given = dataclasses.asdict(first.config), dataclasses.asdict(other.config)
            # The pooler shows in the tensors; how it was initialised is no part of a model.
            names = [k for k in sizes if sizes[k] != given[k] and k not in ("pooler", "initializer_range")]
            lines += [f"{other.path}: {name} is {given[name]}, expected {sizes[name]}" for name in names]
        if first.tokenizer and other.tokenizer and not _same_tokens(first.tokenizer.json, other.tokenizer.json):
            lines.append(f"{other.path}: another tokenizer")
        lines += [f"{other.path}: lacks {name}" for name in first.tensors if name not in other.tensors]
        lines += [f"{first.path}: lacks {name}" for name in other.tensors if name not in first.tensors]
        both = [(k, x, other.tensors[k]) for k, x in first.tensors.items() if k in other.tensors]
        lines += [f"{other.path}: {k} is {y.shape}, expected {x.shape}" for k, x, y in both if x.shape != y.shape]
    if lines:
        raise ValueError(
            f"models must be complete and of one geometry, as their parameters are mixed one by one; {len(lines)} differences "
            f"from {first.path}:\n  " + "\n  ".join(lines)
        )


def merge(models: Sequence[Survey], shares: Sequence[float]) -> M3:
    """The model of Σ share · parameter, summed in float64, in the first one's dtypes; a share of 0 takes no part.

    One block of each model is read at a time. With a share of 1 the result is that model's, bit for bit where dtypes agree.
    """
    first = models[0]
    assert first.config and first.tokenizer
    params = {}
    for path in tqdm(flatten(shapes(first.config)), desc="merge", unit="tensor", disable=None, leave=False):
        name = weights.torch_name(path)
        one = first.tensors[name]
        out = np.empty(one.shape, np.dtype(one.dtype))
        used = [(share, model.tensors[name].open()) for share, model in zip(shares, models, strict=True) if share]
        rows = max(1, _BLOCK_ELEMENTS * len(out) // max(1, out.size))
        for start in range(0, len(out), rows):
            end = min(start + rows, len(out))  # safetensors takes no end past the last row
            blocks = [(share, source[start:end]) for share, source in used]
            if len(blocks) == 1:
                out[start:end] = blocks[0][1]
                continue
            with np.errstate(over="ignore"):  # an error of its own below
                out[start:end] = sum(share * np.asarray(block, np.float64) for share, block in blocks)
            if not np.isfinite(out[start:end]).all():
                raise ValueError(
                    f"{name}: the mixture must be finite in {one.dtype}, the first model's dtype, but is not; look at the "
                    "models, or put one of a wider dtype first"
                )
        params[path] = out.T if path.endswith("/kernel") else out
    return M3(first.config, unflatten(params), first.tokenizer)


def _same_tokens(one: str, two: str) -> bool:
    # Stored truncation and padding are settings of a program; m3jax reads neither.
    fields = [{k: v for k, v in json.loads(x).items() if k not in ("truncation", "padding")} for x in (one, two)]
    return fields[0] == fields[1]
