"""Texts, a model and directories for tests of embeddings on disk: 23 short texts in shards of five.

Not here: what encode_to does with them.
"""

import jax
import jax.numpy as jnp
import pytest

import m3jax
from m3jax.config import M3Config
from m3jax.model import M3

LINE = "the quick brown fox jumps over a lazy dog and small cat sees red house near old river"
WORDS = LINE.split()
TEXTS = [" ".join(WORDS[start % 7 : start % 7 + start % 5]) for start in range(23)]
ALL = {"dense": True, "sparse": True, "colbert": True}
SMALL = {**ALL, "shard_texts": 5}  # 5 shards, the last of 3 texts


def small_model(tokenizer):
    """A random model of 38 tokens at most, whose every token has a weight > 0."""
    config = M3Config.tiny(
        vocab_size=tokenizer.vocab_size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=40, colbert_dim=6,
    )  # fmt: skip
    params = m3jax.init(config, jax.random.key(0))
    params["heads"]["sparse_linear"]["bias"] = jnp.full(1, 5.0)
    return M3(config, params, tokenizer)


def files(directory):
    """Every file of a directory and its bytes."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def raising(texts, after, error=OSError):
    """So many of the texts, and then an error."""
    yield from texts[:after]
    raise error("stopped")


def stopped(m3, directory, after, error=OSError, **more):
    """A directory whose run ended when the text `after` was asked for."""
    with pytest.raises(error, match="stopped"):
        m3jax.encode_to(directory, m3, raising(TEXTS, after, error), **SMALL | more)
    return directory
