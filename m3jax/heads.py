"""The three heads: hidden states → Representations (PAPER §1).

Not here: scores between representations (scores.py).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from m3jax.config import M3Config
from m3jax.representations import Representations
from m3jax.xlm_roberta import linear


def normalize(x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """x / ‖x‖ along the last axis; a zero vector stays zero, with a zero gradient instead of NaN.

    >>> normalize(jnp.array([3.0, 4.0]))
    Array([0.6, 0.8], dtype=float32)
    """
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


class Heads(nnx.Module):
    """sparse_linear gives token weights, colbert_linear token vectors; the dense vector needs no parameters."""

    def __init__(self, config: M3Config, rngs: nnx.Rngs):
        # Small: weights of the order of 1 would make every score a loud accident, and the fastest way down is to push all
        # of them below zero, where the relu gives no gradient to come back by.
        small = nnx.initializers.normal(config.initializer_range)
        self.sparse_linear = linear(config.hidden_size, 1, rngs, small)
        self.colbert_linear = linear(config.hidden_size, config.colbert_dim, rngs)
        self.unused_ids = config.unused_ids

    def __call__(
        self, hidden: Float[Array, "b l d"], ids: Int[Array, "b l"], mask: Bool[Array, "b l"]
    ) -> Representations:
        """All three representations; under jit the ones that are not used cost nothing."""
        is_term = mask & ~jnp.isin(ids, jnp.array(self.unused_ids))
        return Representations(
            dense=normalize(hidden[:, 0]),
            token_ids=ids,
            token_weights=jnp.where(is_term, jax.nn.relu(self.sparse_linear(hidden)[..., 0]), 0.0),
            colbert=normalize(self.colbert_linear(hidden)),
            # By place, not by id: a literal `<s>` inside a text keeps its vector, as in the reference.
            colbert_mask=mask.at[:, 0].set(False),
        )
