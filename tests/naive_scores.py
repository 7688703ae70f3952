"""Second, naive implementations of the four scores, and the random representations that tests compare them on."""

import math

import jax.numpy as jnp
import numpy as np

from m3jax.representations import Representations

VOCABULARY = 12  # few ids, so that terms repeat within a text and are shared between texts
NAMES = ("dense", "sparse", "colbert", "hybrid")


def both(seed):
    """4 queries and 5 passages of one shape in all tests, so that one compilation serves them."""
    return representations(4, 7, seed), representations(5, 9, seed + 100)


def representations(texts, length, seed, width=6):
    """Random representations of texts of 2 to `length` tokens; some weights are 0, as the relu leaves them."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, length + 1, texts)
    lengths[0] = length
    mask = np.arange(length) < lengths[:, None]
    weights = np.maximum(rng.normal(0.4, 0.5, (texts, length)), 0) * mask
    vectors = rng.normal(size=(texts, length, width))
    dense = rng.normal(size=(texts, width))
    return Representations(
        dense=np.float32(dense / np.linalg.norm(dense, axis=1, keepdims=True)),
        token_ids=np.where(mask, rng.integers(4, VOCABULARY, (texts, length)), 1).astype(np.int32),
        token_weights=weights.astype(np.float32),
        colbert=np.float32(vectors / np.linalg.norm(vectors, axis=2, keepdims=True)),
        colbert_mask=mask & (np.arange(length) > 0),
    )


def naive_scores(queries, passages, weights=(1.0, 0.3, 1.0)):
    """The four scores, one pair after another in float64: dot products, dictionaries of terms, sets of real tokens."""
    out = {name: np.zeros((len(queries.dense), len(passages.dense))) for name in NAMES}

    def terms(text, row):
        best = {}
        for term, weight in zip(text.token_ids[row].tolist(), text.token_weights[row].tolist(), strict=True):
            best[term] = max(weight, best.get(term, 0.0))
        return best

    for q, p in np.ndindex(out["dense"].shape):
        out["dense"][q, p] = math.fsum(a * b for a, b in zip(queries.dense[q], passages.dense[p], strict=True))
        own, other = terms(queries, q), terms(passages, p)
        out["sparse"][q, p] = math.fsum(own[term] * other[term] for term in own.keys() & other.keys())
        mine = queries.colbert[q][queries.colbert_mask[q]].astype(np.float64)
        theirs = passages.colbert[p][passages.colbert_mask[p]].astype(np.float64)
        if len(mine) and len(theirs):
            out["colbert"][q, p] = np.mean([max(vector @ other for other in theirs) for vector in mine])
        out["hybrid"][q, p] = sum(
            w * out[name][q, p] for w, name in zip(weights, ("dense", "sparse", "colbert"), strict=True)
        )
    return out


def full_array_scores(queries, passages):
    """The same with everything at once: a vocabulary axis per token, and [q, i, p, j] of all pairs."""

    def vocabulary(text):
        present = text.token_ids[..., None] == jnp.arange(VOCABULARY)
        best = jnp.where(present, text.token_weights[..., None], -1.0).max(axis=1)
        return jnp.where(present.any(axis=1), best, 0.0)

    similar = jnp.einsum("qic,pjc->qipj", queries.colbert, passages.colbert)
    best = jnp.where(passages.colbert_mask, similar, -1e9).max(axis=3)
    counted = queries.colbert_mask[:, :, None]
    dense = queries.dense @ passages.dense.T
    sparse = vocabulary(queries) @ vocabulary(passages).T
    colbert = jnp.where(counted, best, 0.0).sum(axis=1) / counted.sum(axis=1)
    return {"dense": dense, "sparse": sparse, "colbert": colbert, "hybrid": dense + 0.3 * sparse + colbert}


def differentiable(text):
    """The parts that have a gradient, as a dict; `place` puts them back."""
    return {"dense": text.dense, "token_weights": text.token_weights, "colbert": text.colbert}


def place(text, parts):
    return Representations(token_ids=text.token_ids, colbert_mask=text.colbert_mask, **parts)
