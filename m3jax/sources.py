"""Where a model can come from: a released directory, an Orbax checkpoint of ours, a hub name, or a URL of one of the first two.

Not here: the formats (weights.py, checkpoint.py), the hub (hub.py) and object stores (paths.py).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from m3jax import checkpoint, hub, paths, weights
from m3jax.config import M3Config
from m3jax.model import Params
from m3jax.tokenization import Tokenizer


def read(
    source: str | Path,
    *,
    revision: str | None = None,
    heads: Literal["require", "init"] = "require",
    colbert_dim: int | None = None,
    seed: int = 0,
    sharding: Any = None,
) -> tuple[M3Config, Params, Tokenizer]:
    """Config, parameters and tokenizer of a model wherever it is, in the dtype stored.

    Parameters of a checkpoint are JAX arrays, placed by `sharding` as in checkpoint.read; those of a released directory are
    views of its mapped files (weights.read, which `heads`, `colbert_dim` and `seed` are for). Raises ValueError as these and
    hub.fetch do.
    """
    with local(source, revision=revision) as directory:
        if checkpoint.is_checkpoint(directory):
            return checkpoint.read(directory, sharding=sharding)
        return weights.read(directory, heads=heads, colbert_dim=colbert_dim, seed=seed)


def read_lm_head(directory: Path, config: M3Config) -> Params | None:
    """The head of a masked-language model in a directory of `local`, with the encoder of `config`; None where there is none.

    Raises ValueError as weights.read_lm_head does.
    """
    if checkpoint.is_checkpoint(directory):
        return checkpoint.read_lm_head(directory)
    return weights.read_lm_head(directory, config.hidden_size, config.vocab_size)


@contextmanager
def local(source: str | Path, *, revision: str | None = None) -> Iterator[Path]:
    """The directory where a model's files are while the block lasts: fetched from the hub or a store where they are there.

    ValueError where a revision is given with anything but a name on the hub.
    """
    if revision is not None and paths.is_url(source):
        raise ValueError(f"revision is for names on the hub, but {str(source)!r} is a URL; leave revision out")
    with paths.reading(source, _needed) as there:
        yield Path(there) if paths.is_url(source) else hub.fetch(there, revision=revision)


def _needed(there: Sequence[str]) -> Sequence[str]:
    """The files to copy from a store: the last step's model of checkpoints, else one form of the weights, heads and configs."""
    if needed := checkpoint.needed(there):
        return needed
    form = next((form for form in hub.WEIGHTS if form in there), None)
    shards = [name for name in there if name.endswith(".safetensors")] if form == hub.INDEX else [form]
    small = [name for name in there if name.endswith((".json", "training_args.bin"))]
    wanted = {*shards, *weights.HEAD_FILES.values(), *small}
    return [name for name in there if name in wanted and ("/" not in name or name.endswith("_Pooling/config.json"))]
