"""What the rows of a corpus on disk depend on: the model, recognised by a digest, and the settings of the run.

Not here: where it is written (shards.py) and when it is compared (corpus.py).
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from m3jax.arguments import Plan
from m3jax.model import M3, flatten
from m3jax.shards import FORMAT


def settings(m3: M3, plan: Plan, colbert_dtype: str, shard_texts: int) -> dict[str, Any]:
    """All that the rows and their places depend on, as JSON."""
    asked = plan.asked
    return {
        "format": FORMAT,
        "model": {
            "config": dataclasses.asdict(m3.config),
            "dtype": "+".join(sorted({str(x.dtype) for x in jax.tree.leaves(m3.params) if x.ndim > 1})),
            "weights": fingerprint(m3),
            "tokenizer": hashlib.blake2b(m3.tokenizer.json.encode(), digest_size=8).hexdigest(),
        },
        "dense": asked.dense,
        "sparse": asked.sparse,
        "colbert": asked.colbert,
        "max_length": plan.max_length,
        "instruction": plan.instruction,
        "truncate_dim": asked.width,
        "mcls": plan.mcls,
        "colbert_dtype": colbert_dtype if asked.colbert else None,
        "shard_texts": shard_texts,
    }


def fingerprint(m3: M3) -> str:
    """A digest of the parameters, computed where they are: sums modulo 2³², which have no order and so are the same on
    however many devices they lie."""
    sums = {name: _checksum(leaf) for name, leaf in flatten(m3.params).items()}
    text = repr(sorted((name, int(x)) for name, x in jax.device_get(sums).items()))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@jax.jit
def _checksum(leaf: Any) -> Any:
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    # The mixer of MurmurHash3: without it the low bits, which are zero in rounded weights, would leave the sum's zero.
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    place = jnp.uint32(0)
    for axis, size in enumerate(leaf.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)  # an odd factor loses no bit


def differences(there: Any, here: Any, name: str = "") -> Iterator[str]:
    """What two settings differ in, "name there, not here" each.

    >>> list(differences({"model": {"dtype": "float32"}, "sparse": True}, {"model": {"dtype": "bfloat16"}, "sparse": True}))
    ["model.dtype 'float32', not 'bfloat16'"]
    """
    if isinstance(there, dict) and isinstance(here, dict):
        for key in there | here:
            yield from differences(there.get(key), here.get(key), f"{name}.{key}" if name else key)
    elif there != here:
        yield f"{name} {there!r}, not {here!r}"
