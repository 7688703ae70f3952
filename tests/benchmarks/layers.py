"""What a layer costs on this machine, by tokens at once and length of rows, beside a matrix product.

Run it as `python tests/benchmarks/layers.py [--width 768] [--dtype float32 bfloat16]` on an otherwise idle machine: it
chose the sizes in encoding.py and attention.py. Twelve layers of weights of their own, as in a model, because one layer's
weights alone would stay in the caches; microseconds a token and layer, the median of some seconds of runs. Products of
[2048, width] × [width, 4 · width] run as long before and after.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np

from m3jax import attention
from m3jax.batching import arrange, pack
from m3jax.config import M3Config
from m3jax.forward import Asked, forward
from m3jax.model import cast, init

SECONDS = 3.0
SHAPES = ((512, 64), (1024, 64), (2048, 64), (4096, 64), (1024, 128), (1024, 256), (1024, 512), (4096, 4096))
BLOCKS = ((1024, 512), (2048, 512), (2048, 1024), (4096, 512))


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
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
        for tokens, length in SHAPES:
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
        q, k, v = (
            jax.random.normal(jax.random.key(i), (1, 4096, given.width // 64, 64)).astype(dtype) for i in range(3)
        )
        ours = attention._BLOCKS
        for blocks in BLOCKS:
            attention._BLOCKS = blocks
            attend = jax.jit(
                lambda *parts, blocks=blocks: attention.attention(*parts)
            )  # a function each, or jit takes the last
            took = median(attend, q, k, v, jnp.ones((1, 4096), jnp.int32))
            named = " × ".join(map(str, blocks))
            print(f"  attention alone, 4096, blocks of {named}: {took / 4096 * 1e6:6.1f} us a token", flush=True)
        attention._BLOCKS = ours
        print(f"{dtype}, {product(given.width, dtype)}", flush=True)


if __name__ == "__main__":
    main()
