"""Tests of m3jax.embeddings: what people read from an Embeddings, indexing, and what it refuses."""

import json

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from m3jax.embeddings import Embeddings


def three() -> Embeddings:
    dense = np.arange(6, dtype=np.float32).reshape(3, 2)
    terms = csr_matrix(np.array([[0, 0.5, 0, 0.1], [0, 0, 0, 0], [2, 0, 1, 0]], np.float32))
    return Embeddings(dense, terms, [np.full((length, 2), length, np.float32) for length in (1, 2, 3)])


def test_public_attributes_of_a_list():
    embeddings = three()
    assert len(embeddings) == 3
    assert embeddings.dense_vecs is not None and embeddings.dense_vecs.shape == (3, 2)
    assert embeddings.lexical_weights == [{"1": 0.5, "3": float(np.float32(0.1))}, {}, {"0": 2.0, "2": 1.0}]
    assert embeddings.lexical_weights is embeddings.lexical_weights
    assert json.loads(json.dumps(embeddings.lexical_weights))[2] == {"0": 2.0, "2": 1.0}
    assert embeddings.sparse is not None and embeddings.sparse.shape == (3, 4)
    assert isinstance(embeddings.colbert_vecs, list) and [len(v) for v in embeddings.colbert_vecs] == [1, 2, 3]


def test_public_attributes_of_one_str_are_unbatched():
    embeddings = three()
    one = Embeddings(embeddings.dense[2:], embeddings.terms[2:], embeddings.colbert[2:], single=True)
    assert len(one) == 1
    assert one.dense_vecs is not None and one.dense_vecs.tolist() == [4, 5]
    assert one.lexical_weights == {"0": 2.0, "2": 1.0}
    assert isinstance(one.colbert_vecs, np.ndarray) and one.colbert_vecs.shape == (3, 2)
    assert one.sparse is not None and one.sparse.shape == (1, 4)


def test_what_was_not_asked_for_is_none():
    embeddings = Embeddings(dense=np.zeros((2, 3), np.float32))
    assert embeddings.lexical_weights is embeddings.sparse is embeddings.colbert_vecs is None
    assert Embeddings(colbert=[np.ones((1, 2), np.float32)]).dense_vecs is None
    single = Embeddings(terms=csr_matrix((1, 4), dtype=np.float32), single=True)
    assert single.dense_vecs is single.colbert_vecs is None and single.lexical_weights == {}


@pytest.mark.parametrize("index", [slice(1, 3), [1, 2], np.array([1, -1]), np.array([False, True, True])])
def test_indexing_takes_the_rows_of_every_part(index):
    some = three()[index]
    assert len(some) == 2 and not some.single
    assert some.dense.tolist() == [[2, 3], [4, 5]]
    assert some.lexical_weights == [{}, {"0": 2.0, "2": 1.0}]
    assert [len(vectors) for vectors in some.colbert] == [2, 3]


def test_an_integer_gives_a_single_text_and_iteration_ends():
    assert three()[-1].lexical_weights == {"0": 2.0, "2": 1.0}
    assert [one.dense_vecs.tolist() for one in three()] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(IndexError):
        three()[3]


def test_no_texts():
    nothing = three()[:0]
    assert len(nothing) == 0 and nothing.lexical_weights == [] and nothing.colbert_vecs == []
    assert nothing.dense_vecs.shape == (0, 2) and nothing.sparse.shape == (0, 4)
    assert repr(nothing) == "Embeddings(0 texts: dense 2, sparse 4, colbert)"


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "at least one"),
        ({"dense": np.zeros((2, 3), np.float64)}, "float64 .2, 3."),
        ({"dense": np.zeros(3, np.float32)}, "dense must be a float32 array"),
        ({"dense": np.array([[0, np.nan]], np.float32)}, "dense must be finite"),
        ({"terms": csr_matrix(np.array([[0, np.inf]], np.float32))}, "terms must be finite"),
        ({"colbert": [np.ones((2, 3), np.float32), np.full((1, 3), np.nan, np.float32)]}, "colbert must be finite"),
        ({"terms": np.zeros((2, 3), np.float32)}, "got ndarray"),
        ({"terms": csr_matrix((2, 3))}, "float64"),
        ({"terms": csr_matrix(([0.5, 0.0], ([0, 1], [1, 2])), (2, 3), np.float32)}, "must be > 0, got 0"),
        ({"terms": csr_matrix((np.ones(2, np.float32), [2, 1], [0, 2]), (1, 3))}, "must ascend"),
        ({"colbert": [np.ones((2, 3), np.float32), np.ones((2, 4), np.float32)]}, r"\[2, 4\] at text 1"),
        ({"colbert": [np.ones((0, 3), np.float32)]}, "at least one vector"),
        ({"dense": np.zeros((2, 3), np.float32), "terms": csr_matrix((3, 9), dtype=np.float32)}, "'terms': 3"),
        ({"dense": np.zeros((2, 3), np.float32), "single": True}, "one text, got 2"),
    ],
)
def test_what_is_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        Embeddings(**parts)
