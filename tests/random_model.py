"""Models of random weights of which no part hides; not here: PyTorch's, which tests/parity/conftest.py draws alike."""

from typing import Any

import numpy as np

from m3jax.config import M3Config
from m3jax.model import M3, flatten, shapes, unflatten
from m3jax.tokenization import Tokenizer

_GAINS = {"q": 2.5, "k": 2.5, "sparse_linear": 0.25}


def random_model(tokenizer: Tokenizer, seed: int = 0, **sizes: Any) -> M3:
    """A model in float32, in NumPy arrays, of M3Config's sizes but for those.

    Attention is sharp, biases and scales are random, and what a layer adds to its input shrinks with their number: with fresh
    weights the tokens of a text, and all texts, get nearly the same vector, and vectors that agree would prove nothing.
    """
    config = M3Config(vocab_size=tokenizer.vocab_size, **sizes)
    random = np.random.default_rng(seed)
    added = 0.9 / config.num_hidden_layers**0.5

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = random.standard_normal(shape, np.float32)
        *_, module, kind = path.split("/")
        if kind == "scale":
            return 1 + np.float32(0.2) * noise
        if module == "sparse_linear" and kind == "bias":
            return np.full(shape, 0.25, np.float32)  # relu lets most weights through
        if kind == "bias":
            return np.float32(0.2) * noise
        if kind == "embedding":
            return np.float32(0.5) * noise
        gain = (_GAINS | {"attention_out": added, "down": added}).get(module, 1.5)
        return np.float32(gain / shape[0] ** 0.5) * noise

    return M3(config, unflatten({path: draw(path, x.shape) for path, x in flatten(shapes(config)).items()}), tokenizer)
