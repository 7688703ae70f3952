"""Texts, a model, and what the model gives of each text alone, as one pure function: what encode is compared with.

Not here: how encode is asked (test_encoding.py) and how it runs (test_encoding_run.py).
"""

import functools
from typing import NamedTuple

import jax
import numpy as np
import pytest

from m3jax.batching import pad
from m3jax.model import M3, apply
from tests.conftest import LINES
from tests.random_model import random_model

ALL = {"dense": True, "sparse": True, "colbert": True}
_ODD = ["", "a <pad> b <s> c </s> d", "☃", "the the the the", "  ", "<mask> fox"]


def model_of_1024(tokenizer):
    """Of 1,024 tokens at most, so that attention runs both whole and in blocks."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    one = random_model(tokenizer, **sizes, colbert_dim=12, max_position_embeddings=1026)
    return M3(one.config, jax.device_put(one.params), tokenizer)


@functools.cache
def words(count, seed=0):
    """A text of so many words."""
    return " ".join(np.random.default_rng(seed).choice(" ".join(LINES).split(), count))


TEXTS = [*_ODD, *LINES, *(words(n % 12 + 1, n) for n in range(30)), *(words(n) for n in (110, 200))]
TEXTS = [TEXTS[i] for i in np.random.default_rng(0).permutation(len(TEXTS))]


class One(NamedTuple):
    """A text's representations; of its tokens and their weights, the terms with their largest."""

    dense: np.ndarray
    terms: dict[str, float]
    colbert: np.ndarray


_one_row = jax.jit(apply, static_argnums=0)


def naive_terms(ids, weights):
    terms = {}
    for id, weight in zip(ids, weights, strict=True):
        if id not in (0, 1, 2, 3) and weight > 0:
            terms[str(id)] = max(weight, terms.get(str(id), 0.0))
    return terms


def own_row(m3, ids):
    """A row that a text has to itself, filled up to one of three lengths so that little is compiled, and its mask."""
    length = next(length for length in (64, 520, 1024) if length >= len(ids))
    return pad([np.array(ids)], 1, length, m3.config.pad_token_id)


def alone(m3, text):
    """What the model as one pure function gives."""
    ids = m3.tokenizer.encode([text])[0][0].tolist()
    given = jax.tree.map(lambda x: np.asarray(x[0]), _one_row(m3.config, m3.params, *own_row(m3, ids)))
    terms = naive_terms(ids, given.token_weights[: len(ids)].tolist())
    return One(given.dense, terms, given.colbert[given.colbert_mask])


def assert_same(got, expected, within=1e-5):
    assert len(got) == len(expected)
    for row, one in enumerate(expected):
        np.testing.assert_allclose(got.dense_vecs[row], one.dense, atol=within, rtol=0)
        assert got.lexical_weights[row] == pytest.approx(one.terms, abs=within)
        np.testing.assert_allclose(got.colbert_vecs[row], one.colbert, atol=within, rtol=0)
