"""The three heads: hidden states → Representations (PAPER §1).

Not here: scores between representations (scores.py).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from m3jax.config import M3Config
from m3jax.representations import Representations
from m3jax.xlm_roberta import Linear


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
        self.sparse_linear = Linear(config.hidden_size, 1, rngs, small, exact=True)
        self.colbert_linear = Linear(config.hidden_size, config.colbert_dim, rngs, exact=True)
        self.unused_ids = config.unused_ids

    def __call__(
        self, hidden: Float[Array, "b l d"], ids: Int[Array, "b l"], mask: Bool[Array, "b l"]
    ) -> Representations:
        """All three representations of one text a row; under jit the ones that are not used cost nothing."""
        return Representations(
            dense=normalize(hidden[:, 0]),
            token_ids=ids,
            token_weights=self.token_weights(hidden, ids, mask),
            colbert=self.colbert(hidden),
            # By place, not by id: a literal `<s>` inside a text keeps its vector, as in the reference.
            colbert_mask=mask.at[:, 0].set(False),
        )

    def token_weights(
        self, hidden: Float[Array, "b l d"], ids: Int[Array, "b l"], mask: Bool[Array, "b l"]
    ) -> Float[Array, "b l"]:
        """The lexical weight of each token; 0 at padding (mask False) and at CLS, EOS, PAD and UNK, which are no terms."""
        is_term = mask & ~jnp.isin(ids, jnp.array(self.unused_ids))
        return jnp.where(is_term, jax.nn.relu(self.sparse_linear(hidden)[..., 0]), 0.0)

    def colbert(self, hidden: Float[Array, "b l d"], width: int | None = None) -> Float[Array, "b l c"]:
        """The unit vector of each token; the first `width` numbers of it, normalised again, where a width is given."""
        return normalize(self.colbert_linear(hidden)[..., :width])


def packed_dense(
    hidden: Float[Array, "b l d"], slots: Int[Array, "b k m"], width: int | None = None
) -> Float[Array, "b k w"]:
    """The dense vectors of k texts a row: the mean of the hidden states of each one's CLS tokens, normalised (PAPER §5).

    slots: their columns, -1 where a text has fewer than m; a text of one has that CLS's vector to the bit. width: as in
    `Heads.colbert`.
    """
    there = slots >= 0
    states = jax.vmap(lambda rows, at: rows[at])(hidden[..., :width], jnp.maximum(slots, 0))  # [b, k, m, w]
    count = jnp.maximum(there.sum(axis=2), 1)
    return normalize(jnp.where(there[..., None], states, 0.0).sum(axis=2) / count[..., None])
