"""`python -m convert merge A B --weights 0.7,0.3 OUT`: the weighted mean of the parameters of models of one geometry.

Not here: the formats (m3jax/weights.py, m3jax/checkpoint.py).
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from m3jax import M3, sources, weights
from m3jax.model import flatten, unflatten
from m3jax.weights import torch_name

# Elements that are summed at once, in float64: 32 MiB of each model, beside a table of 256M elements that is written.
_BLOCK_ELEMENTS = 1 << 22


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the subcommand."""
    parser.add_argument("models", nargs="*", help="released directories, Orbax checkpoints, hub names or URLs")
    # OUT stands after the weights, where argparse would take a positional argument for an unknown one.
    parser.add_argument(
        "--weights",
        nargs="+",
        required=True,
        metavar=("W,W", "OUT"),
        help="the share of each model, in their order, with the sum 1; then the released directory to write, in the dtypes of "
        "the first model",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT where it holds what a save wrote")


def run(given: argparse.Namespace) -> M3:
    """Merge; the model that was written. ValueError where models, weights or OUT do not fit."""
    shares = parse(given.weights[0])
    *names, given.dst = [*given.models, *given.weights[1:]] or [""]
    if not names or len(shares) != len(names):
        raise ValueError(
            f"merge takes models, their weights and OUT, as in `merge A B --weights 0.7,0.3 OUT`; got {len(names)} models "
            f"and {len(shares)} weights"
        )
    models = [M3(*sources.read(name)) for name in names]
    check(names, models)
    merged = merge(models, shares)
    weights.write(merged, given.dst, replace=given.overwrite, progress=True)
    return merged


def parse(text: str) -> list[float]:
    """The shares in "0.7,0.3", scaled to the sum 1 exactly; ValueError unless each is in [0, 1] and their sum 1 ± 1e-6."""
    try:
        shares = [float(share) for share in text.split(",")]
    except ValueError:
        shares = []
    if not shares or not all(0 <= share <= 1 for share in shares) or abs(math.fsum(shares) - 1) > 1e-6:
        raise ValueError(f"weights must be numbers from 0 to 1 with the sum 1, such as 0.7,0.3; got {text!r}")
    return [share / math.fsum(shares) for share in shares]


def check(names: Sequence[str], models: Sequence[M3]) -> None:
    """ValueError that lists all that keeps models from being mixed with the first."""
    first, lines = models[0], []
    sizes, tokenizer = dataclasses.asdict(first.config), _content(first)
    for name, other in zip(names[1:], models[1:], strict=True):
        # How a model was initialised is no part of it.
        given = dataclasses.asdict(other.config) | {"initializer_range": first.config.initializer_range}
        lines += [f"{name}: {key} is {given[key]}, expected {sizes[key]}" for key in sizes if sizes[key] != given[key]]
        if tokenizer != _content(other):
            lines.append(f"{name}: another tokenizer")
    if lines:
        raise ValueError(
            f"models must be of one geometry, as their parameters are mixed one by one; {len(lines)} differences from "
            f"{names[0]}:\n  " + "\n  ".join(lines)
        )


def merge(models: Sequence[M3], shares: Sequence[float]) -> M3:
    """The model of Σ share · parameter, summed in float64, in the first one's dtypes; a share of 0 takes no part.

    With a share of 1 the result is that model's, bit for bit where dtypes agree.
    """
    first = models[0]
    used = [(share, flatten(model.params)) for share, model in zip(shares, models, strict=True) if share]
    params = {}
    for path, one in tqdm(flatten(first.params).items(), desc="merge", unit="tensor", disable=None, leave=False):
        out = np.empty_like(one)
        # Kernels are transposed views of what is stored, which is read, and later written, row by row.
        views = [(share, _rows(path, x[path])) for share, x in used]
        target = _rows(path, out)
        rows = max(1, _BLOCK_ELEMENTS * len(target) // max(1, target.size))
        for start in range(0, len(target), rows):
            blocks = [(share, view[start : start + rows]) for share, view in views]
            if len(blocks) == 1:
                target[start : start + rows] = blocks[0][1]
                continue
            with np.errstate(over="ignore"):  # an error of its own below
                parts = [share * np.asarray(block, np.float64) for share, block in blocks]
                mixed = np.sum(parts, axis=0).astype(out.dtype)
            if not np.isfinite(mixed).all():
                raise ValueError(
                    f"{torch_name(path)}: the mixture must be finite in {out.dtype}, the first model's dtype, but is not; look "
                    "at the models, or put one of a wider dtype first"
                )
            target[start : start + rows] = mixed
        params[path] = out
    return M3(first.config, unflatten(params), first.tokenizer)


def _rows(path: str, x: np.ndarray) -> np.ndarray:
    return x.T if path.endswith("/kernel") else x


def _content(model: M3) -> dict:
    # Stored truncation and padding are settings of a program; m3jax reads neither.
    return {k: v for k, v in json.loads(model.tokenizer.json).items() if k not in ("truncation", "padding")}
