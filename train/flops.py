"""The work of a training step in floating-point operations, and the rate at which the devices here multiply matrices.

Counted by hand: XLA's own cost analysis counts a loop's body once. Not here: what a run took (meter.py) or will take (plan.py).
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from m3jax.config import M3Config
from m3jax.losses import PARTS
from m3jax.xlm_roberta import Remat
from train.processes import agreed
from train.sub_batch import ONE_PASS, SubBatches


class Flops(NamedTuple):
    """The work of one step: that of the encoder, and what colbert adds (its projection and its scores of all pairs)."""

    encoder: Any
    colbert: Any


def step_flops(
    model: M3Config,
    query_lengths: Any,
    passage_lengths: Any,
    *,
    functions: Sequence[str] = PARTS,
    frozen: Sequence[str] = (),
    widths: Sequence[int] = (),
    remat: Remat = "elements",
    sub_batches: SubBatches = ONE_PASS,
) -> Flops:
    """The work of a step forward and backward, on texts of these lengths in tokens (arrays of any shape).

    L·(8·n·w² + 4·n·w·f + 4·n²·w) a text of n tokens forward, with L layers of width w and feed-forward width f: that is
    L·(24·n·w² + 4·n²·w) where f = 4·w. Colbert, where it is among the functions: 2·n·w·c a text and 2·n·m·c a pair, with
    vectors of width c, and 2·n·m·v for each of the shorter `widths` v. Backward twice that, and nothing of what is frozen and
    stands on what is. By `remat` layers or their attention are computed once more, and where a side is in
    sub-batches both once more again.
    LayerNorm, softmax and other scores are left out: a few thousandths.

    >>> import numpy as np
    >>> int(step_flops(M3Config(), np.array([512]), np.array([])).encoder) == 3 * 24 * (24 * 512 * 1024**2 + 4 * 512**2 * 1024)
    True
    """
    # In floating point: the sums pass what 32 bits can count.
    queries, passages = 1.0 * query_lengths, 1.0 * passage_lengths
    w, f, c = model.hidden_size, model.intermediate_size, model.colbert_dim
    trained, head = "encoder" not in frozen, "colbert" not in frozen
    encoder = colbert = 0.0
    again = max(sub_batches) > 1
    for n in (queries, passages):
        products, attention = (8 * w * w + 4 * w * f) * n.sum(), 4 * w * (n * n).sum()
        passes = again + (3 + (remat == "all") if trained else 1)
        encoder += passes * (products + attention) + (trained and remat == "all_but_products") * attention
        colbert += (1 + trained + head + again) * 2 * w * c * n.sum()
    colbert += (3 if trained or head else 1) * 2 * (c + sum(widths)) * queries.sum() * passages.sum()
    return Flops(model.num_hidden_layers * encoder, colbert if "colbert" in functions else 0.0)


def reconstruction_flops(model: M3Config, lengths: Any, targets: Any) -> Any:
    """The work of a step of stage 1 forward and backward, on texts of these lengths with so many tokens to be found in all:
    that of the encoder, of the decoder's layer, and of the head, 2·w·(w + v) a target with v terms.

    >>> import numpy as np
    >>> one = M3Config(num_hidden_layers=23), np.array([512])
    >>> float(reconstruction_flops(*one, 0) - step_flops(M3Config(), np.array([512]), np.array([])).encoder)
    0.0
    """
    with_decoder = dataclasses.replace(model, num_hidden_layers=model.num_hidden_layers + 1)
    layers = step_flops(with_decoder, lengths, np.zeros(0)).encoder
    return layers + 3 * 2.0 * model.hidden_size * (model.hidden_size + model.vocab_size) * targets


@functools.lru_cache(maxsize=8)
def matrix_rate(mesh: Mesh, dtype: str) -> float:
    """FLOP/s of all devices of the mesh together in products of square matrices, each device its own, as the step does them:
    inputs of `dtype`, sums float32. The best of sizes up to 8192, the larger ones only where they take no time."""
    spread = NamedSharding(mesh, PartitionSpec(mesh.axis_names))

    @jax.jit
    def products(x: jax.Array) -> jax.Array:
        def product(_: Any, left: jax.Array) -> jax.Array:
            return jnp.einsum("dij,djk->dik", left, x, preferred_element_type=jnp.float32).astype(dtype)

        return jax.lax.fori_loop(0, _PRODUCTS, product, x)

    best = 0.0
    for size in (1024, 2048, 4096, 8192):
        shape = (mesh.size, size, size)
        # Such that each product is the matrix again: numbers that overflow or vanish may be multiplied at another speed.
        made = jax.jit(functools.partial(jnp.full, shape, 1 / size, dtype), out_shardings=spread)()
        with jax.default_matmul_precision("highest"):
            jax.block_until_ready(products(made))  # compiled
            seconds = min(_seconds(products, made) for _ in range(3))
        best = max(best, 2 * size**3 * mesh.size * _PRODUCTS / seconds)
        if agreed(seconds > 0.02):  # clocks differ, and all processes must go on to the next size or none
            break
    return best


_PRODUCTS = 4


def _seconds(function: Any, argument: Any) -> float:
    began = time.perf_counter()
    jax.block_until_ready(function(argument))
    return time.perf_counter() - began
