"""Write a model as a released directory, which transformers, FlagEmbedding, sentence-transformers and vLLM load.

Not here: what the formats are (m3jax/weights.py, m3jax/checkpoint.py).
"""

import argparse

import jax.numpy as jnp
import numpy as np

from m3jax import M3, sources, weights
from m3jax.model import Params, flatten, unflatten
from m3jax.weights import torch_name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """SRC, DST and their forms."""
    parser.add_argument("src", help="a checkpoint of a run or of from-pytorch, or a released directory")
    parser.add_argument("dst", help="the directory to write")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="of every tensor; without it, as they are"
    )
    parser.add_argument(
        "--format", choices=("safetensors", "pickle"), default="safetensors", help="of the encoder's file"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DST where it holds what a save wrote")


def run(given: argparse.Namespace) -> M3:
    """Convert; the model that was written."""
    config, params, tokenizer = sources.read(given.src)
    m3 = M3(config, params if given.dtype is None else _cast(params, given.dtype), tokenizer)
    weights.write(m3, given.dst, format=given.format, replace=given.overwrite, progress=True)
    return m3


def _cast(params: Params, dtype: str) -> Params:
    """Every tensor in `dtype`, vectors too, as PyTorch's `.to(dtype)`; ValueError where a number becomes infinite."""
    with np.errstate(over="ignore"):
        cast = {path: np.asarray(x).astype(jnp.dtype(dtype)) for path, x in flatten(params).items()}
    lost = [torch_name(path) for path, x in flatten(params).items() if np.isinf(cast[path]).sum() > np.isinf(x).sum()]
    if lost:
        raise ValueError(
            f"numbers must fit {dtype}, which ends at {jnp.finfo(dtype).max}; larger ones are in {', '.join(lost)}. Take "
            "bfloat16, or keep the dtype"
        )
    return unflatten(cast)
