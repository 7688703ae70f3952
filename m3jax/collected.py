"""Results of batches, put into the order of the texts: terms with their largest weight, vectors without padding.

Not here: where batches come from and who waits for them (encoding.py).
"""

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_matrix, vstack

from m3jax.batching import PackedIds, Packing
from m3jax.config import M3Config
from m3jax.forward import Asked, Results
from m3jax.tokenization import cls_columns

# Of n texts: dense [n, width] float32, terms CSR [n, vocabulary] float32, colbert n arrays [tokens, width] float32.
Arrays = tuple[np.ndarray | None, csr_matrix | None, list[np.ndarray] | None]


class Collected:
    """What was asked for of `count` texts, put into their order: `left` of them are to come, `cut` were longer than allowed."""

    def __init__(self, config: M3Config, count: int, asked: Asked, *, mcls: bool):
        self.left = count
        self.cut = 0
        self._mcls = mcls
        self._vocab_size = config.vocab_size
        self._dense = np.zeros((count, asked.width or config.hidden_size), np.float32) if asked.dense else None
        self._colbert = [_NOTHING] * count if asked.colbert else None
        self._terms: list[csr_matrix] | None = [] if asked.sparse else None
        self._order: list[np.ndarray] = []

    def add(self, first: int, packing: Packing, ids: Sequence[np.ndarray], batch: PackedIds, results: Results) -> None:
        """The results of a batch on the host; its packing's texts are counted from `first` on."""
        if not all(part is None or np.isfinite(part.sum()) for part in results):
            raise ValueError(
                "embeddings must be finite, but the model gave NaN or infinity; look at its weights (a training run that "
                "diverged?) or, with dtype float16, take bfloat16"
            )
        self.left -= len(ids)
        texts = first + packing.texts
        if self._dense is not None:
            dense = np.asarray(results.dense)
            self._dense[texts] = dense.reshape(-1, dense.shape[-1])[batch.order]
        if self._terms is not None:
            self._order.append(texts)
            self._terms.append(self._largest(len(ids), batch, np.asarray(results.token_weights)))
        if self._colbert is not None:
            colbert = np.asarray(results.colbert)
            for text, row, start, of_text in zip(texts, packing.rows, packing.starts, ids, strict=True):
                # A copy, so that a text does not keep its whole batch alive.
                own = colbert[row, start : start + len(of_text)]
                cls = cls_columns(len(of_text), mcls=self._mcls)
                self._colbert[text] = np.delete(own, cls, axis=0) if len(cls) > 1 else own[1:].copy()

    def _largest(self, count: int, batch: PackedIds, weights: np.ndarray) -> csr_matrix:
        """The largest weight of each term of each text, a row a text of the packing."""
        text_of_slot = np.zeros(weights.shape[0] * batch.slots.shape[1], np.int64)
        text_of_slot[batch.order] = np.arange(count)
        row, column = np.nonzero(weights)
        texts = text_of_slot[row * batch.slots.shape[1] + batch.segments[row, column] - 1]
        ids, weights = batch.ids[row, column], weights[row, column]
        order = np.lexsort((ids, texts))
        texts, ids, weights = texts[order], ids[order], weights[order]
        first = np.flatnonzero(np.diff(texts, prepend=-1) | np.diff(ids, prepend=-1))
        largest = np.maximum.reduceat(weights, first) if len(first) else weights
        ends = np.searchsorted(texts[first], np.arange(count + 1))
        return csr_matrix((largest, ids[first], ends), shape=(count, self._vocab_size))

    def arrays(self) -> Arrays:
        """All of them, once nothing is left."""
        terms = None
        if self._terms is not None:
            if self._terms:
                restore = np.argsort(np.concatenate(self._order))
                terms = csr_matrix(vstack(self._terms, format="csr", dtype=np.float32))[restore]
            else:
                terms = csr_matrix((0, self._vocab_size), dtype=np.float32)
        return self._dense, terms, self._colbert


_NOTHING = np.zeros((0, 0), np.float32)
