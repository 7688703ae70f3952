"""What a call of encode asks for: its arguments, checked before any text is read.

Not here: what is done with them (encoding.py), and the further ones of encode_to (corpus.py).
"""

import operator
from typing import Any, NamedTuple

import numpy as np

from m3jax.config import M3Config
from m3jax.forward import Asked
from m3jax.tokenization import utf8


class Plan(NamedTuple):
    """What `run` is to do with every text."""

    asked: Asked
    max_length: int
    instruction: str
    mcls: bool
    batch_tokens: int | None


def make_plan(
    config: M3Config,
    *,
    dense: bool,
    sparse: bool,
    colbert: bool,
    max_length: int | None,
    instruction: str,
    truncate_dim: int | None,
    mcls: bool,
    batch_tokens: int | None,
) -> Plan:
    """The plan of `encode`'s arguments; ValueError where they cannot be followed."""
    dense, sparse, colbert = yes_or_no("dense", dense), yes_or_no("sparse", sparse), yes_or_no("colbert", colbert)
    mcls = yes_or_no("mcls", mcls)
    max_length = config.max_length if max_length is None else whole_number("max_length", max_length)
    truncate_dim = None if truncate_dim is None else whole_number("truncate_dim", truncate_dim)
    batch_tokens = None if batch_tokens is None else whole_number("batch_tokens", batch_tokens)
    if not 2 <= max_length <= config.max_length:
        raise ValueError(
            "max_length must leave room for <s> and </s> and fit the position table, "
            f"2 to {config.max_length}, got {max_length}"
        )
    if not (dense or sparse or colbert):
        raise ValueError("encode must give something: pass dense=True, sparse=True or colbert=True")
    widths = [config.hidden_size] * dense + [config.colbert_dim] * colbert
    if truncate_dim is not None and not (widths and 1 <= truncate_dim <= min(widths)):
        raise ValueError(
            f"truncate_dim must be between 1 and the width of the vectors that are asked for, {min(widths)}, got {truncate_dim}"
            if widths
            else f"truncate_dim cuts dense and colbert vectors, and neither is asked for; got {truncate_dim}"
        )
    utf8(instruction, "instruction")
    if batch_tokens is not None and batch_tokens < 1:
        raise ValueError(f"batch_tokens must be at least 1, got {batch_tokens}")
    return Plan(Asked(dense, sparse, colbert, truncate_dim), max_length, instruction, mcls, batch_tokens)


def bar_hidden(progress: Any) -> bool | None:
    """What tqdm's `disable` is for the argument progress: None shows a bar on a terminal alone. ValueError for no bool."""
    return None if progress is None else not yes_or_no("progress", progress)


def yes_or_no(name: str, value: Any) -> bool:
    """An argument as a bool, NumPy's too; ValueError where it is none."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def whole_number(name: str, value: Any) -> int:
    """An argument as an int; ValueError where it is no whole number, as True is none."""
    try:
        if not isinstance(value, bool | np.bool_):
            return operator.index(value)
    except TypeError:
        pass
    raise ValueError(f"{name} must be a whole number, got {value!r}")
