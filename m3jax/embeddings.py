"""Embeddings: the dense vectors, lexical weights and colbert vectors of some texts, as `encode` returns them.

Scoring and searching them is m3jax.retrieval's, making them m3jax.embedder's, files m3jax.shards'; no JAX here.
"""

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float32
from scipy.sparse import csr_matrix


class Stored(abc.ABC):
    """A part that stays in files and is read by rows (shards.py): an int gives the part's row of one text, a slice or an
    array of ints those of several. Embeddings does not read it to check it: it was checked when it was written."""

    shape: tuple[int, int]  # texts, width

    def __len__(self) -> int:
        return self.shape[0]

    @abc.abstractmethod
    def __getitem__(self, index: Any) -> Any:
        """The rows of an index, in memory."""


@dataclass(frozen=True, eq=False, repr=False)
class Embeddings:
    """The representations of n texts, in host memory or in files; a function that was not asked for is None.

    The four fields always hold rows. What people read are the properties `dense_vecs`, `lexical_weights`, `sparse` and
    `colbert_vecs`, the first, second and fourth of which are unbatched where `single` says that one str was encoded. Those
    of `open_embeddings` hold a `Stored` in place of each array, which reads the rows that are asked of it.

    Args:
      dense: [n, D] float32, one L2-normalised vector per text.
      terms: [n, vocabulary] float32 CSR, one weight > 0 per (text, token id), ids ascending within a row.
      colbert: n arrays [tokens - 1, C] float32, one L2-normalised vector per token but the CLS.
      single: whether one str was encoded, and not a list of them.

    Raises:
      ValueError: where nothing is given, the parts differ in number of texts, or a part has a wrong shape or type or a
        number that is not finite.

    >>> vectors = np.array([[1, 0, 0], [0, 1, 0]], np.float32)
    >>> weights = csr_matrix(np.array([[0, 0.5, 0], [0.25, 0, 1]], np.float32))
    >>> embeddings = Embeddings(dense=vectors, terms=weights)
    >>> embeddings.lexical_weights
    [{'1': 0.5}, {'0': 0.25, '2': 1.0}]
    >>> embeddings[1:]
    Embeddings(1 text: dense 3, sparse 3)
    """

    # Any is a Stored; named, it would have everyone who holds arrays in memory prove to a type checker that they are.
    dense: Float32[np.ndarray, "n d"] | Any | None = None
    terms: csr_matrix | Any | None = None
    colbert: Sequence[Float32[np.ndarray, "_ c"]] | None = None
    single: bool = False

    def __post_init__(self) -> None:
        lengths = {}
        if isinstance(self.dense, Stored):
            lengths["dense"] = len(self.dense)
        elif self.dense is not None:
            if self.dense.ndim != 2 or self.dense.dtype != np.float32:
                raise ValueError(
                    f"Embeddings: dense must be a float32 array [texts, width], got {self.dense.dtype}"
                    f" {list(self.dense.shape)}; use np.asarray(dense, np.float32) and give one row per text."
                )
            _check_finite("dense", [self.dense])
            lengths["dense"] = self.dense.shape[0]
        if self.terms is not None:
            if not isinstance(self.terms, Stored):
                _check_terms(self.terms)
            lengths["terms"] = _shape(self.terms)[0]
        if self.colbert is not None:
            if not isinstance(self.colbert, Stored):
                _check_colbert(self.colbert)
            lengths["colbert"] = len(self.colbert)
        if not lengths:
            raise ValueError("Embeddings: at least one of dense, terms and colbert must be given, got none.")
        if len(set(lengths.values())) > 1:
            raise ValueError(f"Embeddings: all parts must have one row per text, got rows {lengths}.")
        if self.single and len(self) != 1:
            raise ValueError(f"Embeddings: single=True means one text, got {len(self)}; leave single out.")

    def __len__(self) -> int:
        """The number of texts; 1 for a single one."""
        if self.dense is not None:
            return self.dense.shape[0]
        if self.terms is not None:
            return _shape(self.terms)[0]
        assert self.colbert is not None
        return len(self.colbert)

    def __getitem__(self, index: Any) -> "Embeddings":
        """The texts that a slice, an integer, an array of integers or a boolean mask picks, as in NumPy. They are
        copied, but for the colbert arrays, which are shared; one integer gives a single text. IndexError past the end."""
        if isinstance(index, slice):
            rows = np.arange(*index.indices(len(self)))
        elif isinstance(index, int | np.integer):
            rows = np.array(range(len(self))[int(index)])  # no array of all rows for one of them
        else:
            rows = np.arange(len(self))[index]
        single = rows.ndim == 0
        rows = np.atleast_1d(rows)
        return Embeddings(
            dense=None if self.dense is None else self.dense[rows],
            terms=None if self.terms is None else self.terms[rows],
            colbert=None if self.colbert is None else [self.colbert[row] for row in rows],
            single=single,
        )

    def __repr__(self) -> str:
        parts = []
        if self.dense is not None:
            parts.append(f"dense {self.dense.shape[1]}")
        if self.terms is not None:
            parts.append(f"sparse {_shape(self.terms)[1]}")
        if self.colbert is not None:
            parts.append(f"colbert {self.colbert[0].shape[1]}" if len(self) else "colbert")
        return f"Embeddings({len(self)} text{'' if len(self) == 1 else 's'}: {', '.join(parts)})"

    @property
    def dense_vecs(self) -> np.ndarray | Any | None:
        """[n, D] float32 ([D] for a single text), L2-normalised; None if not asked for."""
        return self.dense[0] if self.single and self.dense is not None else self.dense

    @property
    def sparse(self) -> csr_matrix | Any | None:
        """The lexical weights, float32 CSR [n, vocabulary], [1, vocabulary] for a single text; None if not asked for."""
        return self.terms

    @property
    def colbert_vecs(self) -> Sequence[np.ndarray] | np.ndarray | None:
        """n arrays [tokens - 1, C] float32 (one array for a single text), L2-normalised; None if not asked for."""
        if self.colbert is None:
            return None
        if self.single:
            return self.colbert[0]
        return self.colbert if isinstance(self.colbert, Stored) else list(self.colbert)

    @cached_property
    def lexical_weights(self) -> list[dict[str, float]] | dict[str, float] | None:
        """{str(token id): weight > 0} per text (one dict for a single text), plain floats that json.dumps takes; None
        if not asked for. Made from `sparse` when first read, and kept: of a corpus on disk, take some texts first."""
        if self.terms is None:
            return None
        terms: csr_matrix = self.terms[:] if isinstance(self.terms, Stored) else self.terms
        ids = list(map(str, terms.indices.tolist()))
        weights = terms.data.tolist()
        rows = [
            dict(zip(ids[start:end], weights[start:end], strict=True))
            for start, end in pairwise(np.asarray(terms.indptr))
        ]
        return rows[0] if self.single else rows


def _shape(terms: csr_matrix | Stored) -> tuple[int, int]:
    # scipy has no types of its own, and what a checker infers of `shape` is wrong.
    return tuple(terms.shape)  # pyright: ignore


def _check_finite(name: str, arrays: Sequence[np.ndarray]) -> None:
    # A sum has no temporary array, and is NaN or infinite where an element is.
    if not all(np.isfinite(array.sum()) for array in arrays):
        raise ValueError(
            f"Embeddings: {name} must be finite, got NaN or infinity, which no ranking could place; look at the model that"
            " made it."
        )


def _check_terms(terms: csr_matrix) -> None:
    if not isinstance(terms, csr_matrix) or terms.dtype != np.float32:
        raise ValueError(
            f"Embeddings: terms must be a float32 scipy.sparse.csr_matrix [texts, vocabulary], got"
            f" {type(terms).__name__} {getattr(terms, 'dtype', '')}; use csr_matrix(terms, dtype=np.float32)."
        )
    if not terms.has_canonical_format:
        raise ValueError(
            "Embeddings: the token ids of each row of terms must ascend without repetition; call terms.sum_duplicates()"
            " (which adds repeated weights) or keep each term's maximum."
        )
    _check_finite("terms", [terms.data])
    if terms.nnz and not terms.data.min() > 0:
        raise ValueError(
            f"Embeddings: stored weights of terms must be > 0, got {terms.data.min()}; drop zeros with"
            " terms.eliminate_zeros()."
        )


def _check_colbert(colbert: Sequence[np.ndarray]) -> None:
    width = colbert[0].shape[-1] if len(colbert) and colbert[0].ndim else 0
    for row, vectors in enumerate(colbert):
        if vectors.ndim != 2 or vectors.dtype != np.float32 or vectors.shape[1] != width or not len(vectors):
            raise ValueError(
                f"Embeddings: colbert must hold float32 arrays [tokens - 1, width] of one width, with at least one"
                f" vector each (every text has its EOS), got {vectors.dtype} {list(vectors.shape)} at text {row}"
                f" beside width {width} at text 0."
            )
    _check_finite("colbert", colbert)
