"""Representations: what the heads give for a batch of texts, as a pytree for jit, grad, vmap and sharding.

Not here: how it is computed (heads.py), compared (scores.py) or handed to a user as NumPy (embeddings.py).
"""

import dataclasses

import jax
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Representations:
    """The three representations of b texts in rows of l tokens (PAPER §1).

    dense          [b, d]     unit vectors, the CLS hidden state
    token_ids      [b, l]     the id behind each token weight
    token_weights  [b, l]     ≥ 0; exactly 0 at CLS, EOS, PAD, UNK and padding, so a 0 is "no term"
    colbert        [b, l, c]  unit vectors, defined where colbert_mask is True
    colbert_mask   [b, l]     True at every real token but CLS
    """

    dense: Float[Array, "b d"]
    token_ids: Int[Array, "b l"]
    token_weights: Float[Array, "b l"]
    colbert: Float[Array, "b l c"]
    colbert_mask: Bool[Array, "b l"]
