"""A model and a batch of texts for tests of stage 1, and how near gradients must be.

Not here: texts of whole runs (small_run.py).
"""

import jax
import jax.numpy as jnp
import numpy as np

from m3jax.config import M3Config
from m3jax.model import flatten

MODEL = M3Config.tiny(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=400,
)
MASK = 39
LENGTHS = (8, 4, 5)


def batch(length=8):
    """Three texts of different lengths, `<unk>` among their tokens, padded to `length`; and a key for each."""
    random = np.random.default_rng(3)
    ids = np.full((len(LENGTHS), length), MODEL.pad_token_id)
    for row, n in enumerate(LENGTHS):
        ids[row, :n] = [0, *random.integers(4, MASK, n - 2), 2]
    ids[0, 3] = MODEL.unk_token_id
    return (
        jnp.asarray(ids),
        jnp.asarray(np.arange(length) < np.array(LENGTHS)[:, None]),
        jax.random.split(jax.random.key(1), 3),
    )


def close(found, expected, rtol=2e-4):
    """Leaf by leaf, to a share of the leaf's largest number."""
    for path, x in flatten(expected).items():
        x = np.asarray(x)
        np.testing.assert_allclose(flatten(found)[path], x, atol=rtol * max(1e-3, np.abs(x).max()), err_msg=path)
