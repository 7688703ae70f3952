"""What a layer costs on this machine, by tokens at once and length of rows, beside a matrix product.

Run it as `python tests/benchmarks/layers.py [--width 768] [--dtype float32 bfloat16] [--attention]` on an otherwise idle
machine: it chose the sizes in encoding.py and attention.py. Twelve layers of weights of their own, as in a model, because one
layer's weights alone would stay in the caches; microseconds a token and layer, the median of some seconds of runs. Products of
[2048, width] × [width, 4 · width] run as long before and after. Then the layers alone, in three ways: one compiled layer
that Python calls for each (what encode does), all in one program, and a loop in one program; with the seconds to compile.
Then, or with --attention only, attention alone in blocks of other sizes, which take turns, as a machine's pace changes.
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from m3jax import attention
from m3jax.batching import arrange, pack
from m3jax.config import M3Config
from m3jax.forward import Asked, forward
from m3jax.model import Params, cast, init
from m3jax.xlm_roberta import Layer

SECONDS = 3.0
ROUNDS = 4  # of attention's forms, the first of which is not counted
SHAPES = ((512, 64), (1024, 64), (2048, 64), (4096, 64), (1024, 128), (1024, 256), (1024, 512), (4096, 4096))
BLOCKS = ((2048, 512), (1024, 256), (512, 512), (256, 8192))  # of queries and keys; the last is all of them


def median(run: Callable[..., object], *given: object) -> float:
    """Seconds of one run on what is given, compiled before."""
    jax.block_until_ready(run(*given))
    taken: list[float] = []
    began = time.perf_counter()
    while time.perf_counter() - began < SECONDS or len(taken) < 3:
        start = time.perf_counter()
        jax.block_until_ready(run(*given))
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def product(width: int, dtype: str) -> str:
    x, y = (jax.random.normal(jax.random.key(0), s).astype(dtype) for s in ((2048, width), (width, 4 * width)))
    multiply = jax.jit(lambda x, y: jnp.matmul(x, y, preferred_element_type=jnp.float32))
    return f"a matrix product: {2 * 2048 * width * 4 * width / median(multiply, x, y) / 1e9:.0f} GFLOP/s"


def attending(length: int, heads: int, dtype: str) -> dict[tuple[int, int], list[float]]:
    """Seconds of attention over one row in each of BLOCKS, and of it with its gradient."""
    ours = attention._BLOCKS, attention._GRADIENT_BLOCKS
    *qkv, direction = (jax.random.normal(jax.random.key(i), (1, length, heads, 64)).astype(dtype) for i in range(4))
    segments = jnp.ones((1, length), jnp.int32)

    def attend(*qkv: jax.Array) -> jax.Array:
        return attention.attention(*qkv, segments)

    def with_gradient(*qkv: jax.Array) -> Any:
        return attend(*qkv), jax.vjp(attend, *qkv)[1](direction)

    compiled: dict[tuple[int, int], list[Callable[..., object]]] = {}
    for blocks in BLOCKS:
        attention._BLOCKS = attention._GRADIENT_BLOCKS = blocks
        jax.clear_caches()  # or jit takes what it traced with other sizes
        compiled[blocks] = [jax.jit(run).lower(*qkv).compile() for run in (attend, with_gradient)]
    attention._BLOCKS, attention._GRADIENT_BLOCKS = ours
    taken: dict[tuple[int, int], list[list[float]]] = {blocks: [[], []] for blocks in BLOCKS}
    for _ in range(ROUNDS):
        for blocks, runs in compiled.items():
            for run, times in zip(runs, taken[blocks], strict=True):
                start = time.perf_counter()
                jax.block_until_ready(run(*qkv))
                times.append(time.perf_counter() - start)
    return {blocks: [statistics.median(times[1:]) for times in both] for blocks, both in taken.items()}


def ways(config: M3Config, params: Params, hidden: jax.Array) -> dict[str, tuple[Callable[..., jax.Array], Any]]:
    """What runs the layers, and the parameters it takes, by name."""
    layers = params["encoder"]["layers"]
    layers = [layers[number] for number in range(config.num_hidden_layers)]
    graph = nnx.split(nnx.eval_shape(lambda: Layer(config, nnx.Rngs(0))))[0]
    segments = jnp.ones(hidden.shape[:2], jnp.int32)

    def layer(hidden: jax.Array, params: Params) -> jax.Array:
        return nnx.merge(graph, params)(hidden, segments, 0.0, None, packed=True)

    one = jax.jit(layer)
    loop = jax.jit(
        lambda stacked: jax.lax.scan(lambda hidden, params: (layer(hidden, params), None), hidden, stacked)[0]
    )
    return {
        "layer by layer": (lambda layers: functools.reduce(one, layers, hidden), layers),
        "all in one program": (jax.jit(lambda layers: functools.reduce(layer, layers, hidden)), layers),
        "a loop in one program": (loop, jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--attention", action="store_true", help="attention alone, without the layers")
    given = parser.parse_args()
    config = M3Config(
        vocab_size=1000,
        hidden_size=given.width,
        num_hidden_layers=given.layers,
        num_attention_heads=given.width // 64,
        intermediate_size=4 * given.width,
        colbert_dim=given.width,
    )
    drawn = init(config, jax.random.key(0))
    random = np.random.default_rng(0)
    for dtype in given.dtype:
        print(f"{dtype}, {product(given.width, dtype)}", flush=True)
        params = cast(drawn, dtype)
        for tokens, length in () if given.attention else SHAPES:
            count = tokens // length
            (packing,) = pack([length] * count, batch_tokens=tokens)
            texts = [random.integers(4, 1000, length).astype(np.int32) for _ in range(count)]
            batch = arrange(packing, texts, config.pad_token_id)
            layer = median(forward, config, params, batch, Asked(True, True, False)) / given.layers
            flops = tokens * (24 * given.width**2 + 4 * length * given.width)
            print(
                f"  {count:>3} × {length:<4} {layer / tokens * 1e6:6.1f} us {flops / layer / 1e9:5.0f} GFLOP/s",
                flush=True,
            )
        for rows, length in () if given.attention else ((16, 64), (4, 256), (1, 4096)):
            hidden = jax.random.normal(jax.random.key(0), (rows, length, given.width))
            for name, (run, layers) in ways(config, params, hidden).items():
                start = time.perf_counter()
                with jax.default_matmul_precision("highest"):
                    jax.block_until_ready(run(layers))
                    compiled = time.perf_counter() - start
                    layer = median(run, layers) / given.layers
                print(
                    f"  {rows:>3} × {length:<4} {layer / hidden[..., 0].size * 1e6:6.1f} us {name}, {compiled:.1f} s to compile"
                )
        for length in (4096, 7936):
            for blocks, both in attending(length, given.width // 64, dtype).items():
                taken = (took / length * 1e6 for took in both)
                said = "{:6.1f} us a token, {:6.1f} with its gradient".format(*taken)
                print(f"  attention alone, {length}, blocks of {blocks[0]} × {blocks[1]}: {said}", flush=True)
        print(f"{dtype}, {product(given.width, dtype)}", flush=True)


if __name__ == "__main__":
    main()
