"""A released directory for tests of the conversion.

Not here: what the program makes of it.
"""

import jax
import jax.numpy as jnp
import numpy as np

import m3jax
from m3jax.config import M3Config
from m3jax.model import init


def make_release(tokenizer, directory):
    """A released directory whose tensors are float32, bfloat16 and float16, each with bits that arithmetic would lose."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = M3Config.tiny(vocab_size=tokenizer.vocab_size, colbert_dim=8, max_position_embeddings=20, **sizes)
    leaves, tree = jax.tree.flatten(jax.tree.map(np.asarray, init(config, jax.random.key(0))))
    dtypes = (np.float32, jnp.bfloat16, np.float16)
    random = np.random.default_rng(0)
    leaves = [random.normal(size=x.shape).astype(dtypes[i % 3]) for i, x in enumerate(leaves)]
    leaves[0].flat[:4] = (-0.0, np.inf, np.nan, 1e-42)
    m3jax.save(m3jax.M3(config, jax.tree.unflatten(tree, leaves), tokenizer), directory)
    return directory


def files(directory):
    """The content of each file, by its path."""
    return {path.relative_to(directory): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}
