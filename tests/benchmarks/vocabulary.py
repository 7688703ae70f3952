"""What memory the masked-language losses of stage 1 take beside their logits; the aim is at most a tenth.

Run it as `python tests/benchmarks/vocabulary.py [rows] [length]`. The gradient of both losses is compiled for one device at the
sizes of BAAI/bge-m3 in bfloat16, and the compiler's own account is printed; nothing is computed.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp

from m3jax.config import M3Config
from m3jax.retromae import vocabulary_loss

MASKED = 0.3  # of a text, in the encoder; PAPER §3


def main(rows: int = 8, length: int = 8192) -> None:
    config = M3Config()
    positions = length + round(MASKED * length)  # the decoder's and the encoder's
    shape = jax.ShapeDtypeStruct
    given = (
        shape((rows, positions, config.hidden_size), jnp.bfloat16),
        shape((config.vocab_size, config.hidden_size), jnp.float32),
        shape((config.vocab_size,), jnp.float32),
        shape((rows, positions), jnp.int32),
        shape((rows, positions), jnp.float32),
    )
    gradient = jax.grad(lambda *args: vocabulary_loss(*args)[0], argnums=(0, 1, 2))
    used: Any = jax.jit(gradient).lower(*given).compile().memory_analysis()
    logits = rows * positions * config.vocab_size * 4
    takes = used.temp_size_in_bytes + used.output_size_in_bytes
    print(f"{jax.devices()[0].device_kind}, {rows} texts of {length} tokens, {config.vocab_size:,} terms, bfloat16")
    print(f"logits of all positions  {logits / 1e9:6.2f} GB in float32")
    print(f"both losses, gradients   {takes / 1e9:6.2f} GB, {takes / logits:.3f} of them")
    print(f"  temporary {used.temp_size_in_bytes / 1e9:.2f} GB, gradients {used.output_size_in_bytes / 1e9:.2f} GB")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
