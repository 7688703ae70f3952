"""load, save and encode: a directory or a hub name to a model, a model to a directory, texts to Embeddings.

Not here: the mathematics (model.py), where models come from (sources.py), scoring and search (retrieval.py).
"""

import functools
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from scipy.sparse import csr_matrix, vstack
from tqdm import tqdm

from m3jax import sources, weights
from m3jax.batching import PlannedBatch, pad, plan_batches
from m3jax.config import M3Config
from m3jax.embeddings import Embeddings
from m3jax.model import M3, Params, apply, cast
from m3jax.scores import term_weights

_DTYPES = ("float32", "bfloat16", "float16")


def load(
    directory: str | Path,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    heads: Literal["require", "init"] = "require",
) -> M3:
    """A model from a released directory (PyTorch weights), an Orbax checkpoint of ours, or a hub name, on the first device.

    directory: a path, or a URL in an object store ("gs://…", "s3://…"). A str that is no directory is a name on the Hugging
    Face hub ("BAAI/bge-m3"), and revision a branch, tag or commit there (None is main); `m3jax.hub.fetch` says what is
    downloaded. On CPU the parameters may be views of the mapped files: replace a model's files, do not write into them, while
    it is in use (`save` replaces).

    dtype: "float32", "bfloat16" or "float16", in which the matrix products run; None is float32 on CPU and bfloat16 on
    GPU and TPU, whatever is stored. heads: "init" draws heads at random where the directory has none, to train them.

    Raises ValueError where files are missing (naming them), where tensors are missing, left over or misshapen (listing
    all), where tokenizer and embedding table do not fit, and where the hub does not give the files.
    """
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)} or None, got {dtype!r}")
    if heads not in ("require", "init"):
        raise ValueError(f"heads must be 'require' or 'init', got {heads!r}")
    config, params, tokenizer = sources.read(directory, revision=revision, heads=heads)
    return M3(config, cast(jax.device_put(params), dtype), tokenizer)


def save(m3: M3, directory: str | Path, *, card: str | None = None) -> None:
    """Write a model as a released directory, which `load`, transformers and FlagEmbedding read.

    directory: a path or a URL, as for `load`; it appears when it is complete. The heads are the two `.pt` files, where
    FlagEmbedding and vLLM look.

    card: the text of README.md, the model card on the hub. None makes one of what the model itself tells: its sizes, and how
    to use it. The card of a directory that the model was loaded from is not taken over: what it says of results and data may
    not hold of the model that is saved. Pass it as card where it does.

    Raises ValueError where the directory holds what no save wrote. A card that you wrote or changed counts as that, so a save
    never replaces it; one that a save made, it does.
    """
    weights.write(m3, directory, card=card)


def encode(
    m3: M3,
    texts: str | Iterable[str],
    *,
    dense: bool = True,
    sparse: bool = True,
    colbert: bool = False,
    max_length: int | None = None,
    batch_tokens: int = 16384,
    progress: bool = False,
) -> Embeddings:
    """The representations of texts, in their order; what is not asked for is None.

    max_length: tokens, `<s>` and `</s>` included; None is the model's (8192 for bge-m3). A longer text is cut to it, with
    one warning that counts such texts. One str gives unbatched values. `[]` gives Embeddings of no rows; `""` is the text
    of no tokens: a dense vector, no lexical weight, one colbert vector (that of `</s>`). batch_tokens bounds the tokens
    that the device computes at once, padding included. progress shows a bar on stderr.

    Raises ValueError where max_length exceeds the position table, nothing is asked for, or an item is not a str.
    """
    longest = m3.config.max_length
    if max_length is None:
        max_length = longest
    if not 2 <= max_length <= longest:
        raise ValueError(
            f"max_length must leave room for <s> and </s> and fit the position table, 2 to {longest}, got {max_length}"
        )
    if not (dense or sparse or colbert):
        raise ValueError("encode must give something: pass dense=True, sparse=True or colbert=True")
    single = isinstance(texts, str)
    ids, cut = m3.tokenizer.encode([texts] if isinstance(texts, str) else list(texts), max_length)
    if cut:
        warnings.warn(
            f"{cut} of {len(ids)} texts are longer than max_length = {max_length} tokens and were cut to it",
            stacklevel=2,
        )
    asked = (dense, sparse, colbert)
    collected = _Collected(m3.config, len(ids), asked)
    in_flight: tuple[PlannedBatch, list[np.ndarray], Any] | None = None
    with tqdm(total=len(ids), unit="text", disable=not progress, desc="encode") as bar:
        for batch in plan_batches([len(text) for text in ids], batch_tokens=batch_tokens):
            own = [ids[row] for row in batch.rows]
            padded, mask = pad(own, batch.row_count, min(batch.length, longest), m3.tokenizer.pad_id)
            # Products of float32 parameters are float32 on every backend; GPUs and TPUs would round them first.
            with jax.default_matmul_precision("highest"):
                result = _forward(m3.config, asked, m3.params, padded, mask)
            # The device computes this batch while the host takes in the one before.
            if in_flight:
                collected.add(*in_flight)
                bar.update(len(in_flight[1]))
            in_flight = batch, own, result
        if in_flight:
            collected.add(*in_flight)
            bar.update(len(in_flight[1]))
    return collected.embeddings(single)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(config: M3Config, asked: tuple[bool, bool, bool], params: Params, ids: jax.Array, mask: jax.Array):
    """What is asked for, of one padded batch; parts that are not asked for are not computed."""
    given = apply(config, params, ids, mask)
    parts = (given.dense, term_weights(given.token_ids, given.token_weights), given.colbert)
    return tuple(part if wanted else None for part, wanted in zip(parts, asked, strict=True))


class _Collected:
    """Results of batches, put into the order of the texts."""

    def __init__(self, config: M3Config, count: int, asked: tuple[bool, bool, bool]):
        self._vocab_size = config.vocab_size
        self._dense = np.zeros((count, config.hidden_size), np.float32) if asked[0] else None
        self._terms: list[csr_matrix] | None = [] if asked[1] else None
        self._colbert = [np.zeros((0, config.colbert_dim), np.float32)] * count if asked[2] else None
        self._order: list[np.ndarray] = []

    def add(self, batch: PlannedBatch, ids: list[np.ndarray], result: Any) -> None:
        dense, terms, colbert = jax.device_get(result)
        rows = len(batch.rows)
        for part in (dense, terms and terms[1], colbert):
            if part is not None and not np.isfinite(part[:rows]).all():
                raise ValueError(
                    "embeddings must be finite, but the model gave NaN or infinity; look at its weights (a training run that "
                    "diverged?) or, with dtype float16, take bfloat16"
                )
        self._order.append(batch.rows)
        if self._dense is not None:
            self._dense[batch.rows] = dense[:rows]
        if self._terms is not None:
            term_ids, term_values = terms[0][:rows], terms[1][:rows]
            kept = term_values > 0
            starts = np.concatenate([[0], np.cumsum(kept.sum(axis=1))])
            self._terms.append(csr_matrix((term_values[kept], term_ids[kept], starts), shape=(rows, self._vocab_size)))
        if self._colbert is not None:
            for row, text, vectors in zip(batch.rows, ids, colbert, strict=False):
                # A copy, so that a text does not keep its whole padded batch alive.
                self._colbert[row] = np.array(vectors[1 : len(text)], np.float32)

    def embeddings(self, single: bool) -> Embeddings:
        terms = None
        if self._terms is not None:
            if self._terms:
                restore = np.argsort(np.concatenate(self._order))
                terms = csr_matrix(vstack(self._terms, format="csr", dtype=np.float32))[restore]
            else:
                terms = csr_matrix((0, self._vocab_size), dtype=np.float32)
        return Embeddings(dense=self._dense, terms=terms, colbert=self._colbert, single=single)
