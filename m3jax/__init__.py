"""M3-Embedding in JAX: one encoder with dense, sparse and colbert heads.

>>> import m3jax
>>> m3jax.M3Config.bge_m3().max_length
8192
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from m3jax.config import M3Config as M3Config
    from m3jax.corpus import encode_to as encode_to
    from m3jax.embedder import encode as encode
    from m3jax.embedder import load as load
    from m3jax.embedder import save as save
    from m3jax.embeddings import Embeddings as Embeddings
    from m3jax.model import M3 as M3
    from m3jax.model import apply as apply
    from m3jax.model import init as init
    from m3jax.representations import Representations as Representations
    from m3jax.retrieval import score as score
    from m3jax.retrieval import search as search
    from m3jax.shards import open_embeddings as open_embeddings
    from m3jax.tokenization import Tokenizer as Tokenizer

# Resolved at first use (PEP 562): flax alone would make `import m3jax` 1.6 times `import jax`.
_HOME = {
    "M3": "model",
    "M3Config": "config",
    "Embeddings": "embeddings",
    "Representations": "representations",
    "Tokenizer": "tokenization",
    "apply": "model",
    "encode": "embedder",
    "encode_to": "corpus",
    "init": "model",
    "load": "embedder",
    "open_embeddings": "shards",
    "save": "embedder",
    "score": "retrieval",
    "search": "retrieval",
}

# Written out, because type checkers read it; a test holds it to the names above.
__all__ = [
    "M3",
    "Embeddings",
    "M3Config",
    "Representations",
    "Tokenizer",
    "apply",
    "encode",
    "encode_to",
    "init",
    "load",
    "open_embeddings",
    "save",
    "score",
    "search",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'm3jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"m3jax.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
