"""Texts to dense, lexical and colbert arrays: tokenised, computed and taken in beside each other, returned in order.

Not here: what users pass and get (embedder.py), how texts share batches (batching.py), what the device computes (forward.py).
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from jax.errors import JaxRuntimeError
from scipy.sparse import csr_matrix, vstack
from tqdm import tqdm

from m3jax.batching import PackedIds, Packing, arrange, pack
from m3jax.config import M3Config
from m3jax.forward import Asked, Results, backend, forward, row_groups
from m3jax.model import M3
from m3jax.tokenization import MCLS_RUN, cls_columns


class Rows(NamedTuple):
    """Numbers of a backend: tokens of a batch on each device, the row length that short texts share, what rows are multiples
    of."""

    batch_tokens: int
    row_length: int
    step: int


# CPU: a layer's activations of 1024 tokens stay in the caches; 12 × 768 in rows of 64, microseconds a token and layer at 512,
# 1024, 2048, 4096 tokens: float32 81, 81, 96, 105, bfloat16 44, 44, 47, 61. Short rows, because attention there works through a
# row for each of its tokens. TPU: its kernels take rows of multiples of 128. GPU and TPU: not measured.
_ROWS = {"cpu": Rows(1024, 64, 8), "gpu": Rows(16384, 512, 64), "tpu": Rows(16384, 512, 128)}

# Texts are tokenised, sorted and packed some thousands at a time: enough to fill rows, few enough to begin soon.
_WINDOW_TEXTS = 8192
_WINDOW_CHARACTERS = 1 << 22
# Batches that wait for the device: one is computed, one is ready.
_AHEAD = 2


class Plan(NamedTuple):
    """What `run` is to do with every text."""

    asked: Asked
    max_length: int
    instruction: str
    mcls: bool
    batch_tokens: int | None


def make_plan(
    config: M3Config,
    *,
    dense: bool,
    sparse: bool,
    colbert: bool,
    max_length: int | None,
    instruction: str,
    truncate_dim: int | None,
    mcls: bool,
    batch_tokens: int | None,
) -> Plan:
    """The plan of `encode`'s arguments; ValueError where they cannot be followed."""
    if max_length is None:
        max_length = config.max_length
    if not 2 <= max_length <= config.max_length:
        raise ValueError(
            "max_length must leave room for <s> and </s> and fit the position table, "
            f"2 to {config.max_length}, got {max_length}"
        )
    if not (dense or sparse or colbert):
        raise ValueError("encode must give something: pass dense=True, sparse=True or colbert=True")
    widths = [config.hidden_size] * dense + [config.colbert_dim] * colbert
    if truncate_dim is not None and not (widths and 1 <= truncate_dim <= min(widths)):
        raise ValueError(
            f"truncate_dim must be between 1 and the width of the vectors that are asked for, {min(widths)}, got {truncate_dim}"
            if widths
            else f"truncate_dim cuts dense and colbert vectors, and neither is asked for; got {truncate_dim}"
        )
    if not isinstance(instruction, str):
        raise ValueError(f"instruction must be a str, got {type(instruction).__name__}: {instruction!r:.80}")
    if batch_tokens is not None and batch_tokens < 1:
        raise ValueError(f"batch_tokens must be at least 1, got {batch_tokens}")
    return Plan(Asked(dense, sparse, colbert, truncate_dim), max_length, instruction, mcls, batch_tokens)


def say_cut(cut: int, count: int, max_length: int) -> str:
    """What the warning of texts that were cut says."""
    return f"{cut} of {count} texts are longer than max_length = {max_length} tokens and were cut to it"


def run(
    m3: M3, texts: Sequence[str], plan: Plan, *, progress: bool | None
) -> tuple[tuple[np.ndarray | None, csr_matrix | None, list[np.ndarray] | None], int]:
    """Dense [n, width], terms (CSR [n, vocabulary]) and colbert (n arrays) of n texts, and how many were cut.

    Ctrl-C returns at once: what runs on the threads is given up (a process that ends waits for the batch at work).
    """
    for index, text in enumerate(texts):  # here too: a corpus is not to fail halfway
        if not isinstance(text, str):
            raise ValueError(f"texts[{index}] must be a str; {type(text).__name__} came: {text!r:.80}")
    device = _Device(m3, len(texts), plan)
    cut = 0
    tokenising, computing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
    try:
        # A bar that is asked for shows at once; else on a terminal, and only if the work takes a while.
        bar = tqdm(total=len(texts), unit="text", desc="encode", disable=_hidden(progress), delay=0 if progress else 3)
        with bar:
            waiting: list[Future[int]] = []

            def settle(left: int) -> None:
                while len(waiting) > left:
                    bar.update(waiting.pop(0).result())

            def tokenise(window: slice) -> tuple[list[np.ndarray], int]:
                some = [plan.instruction + text for text in texts[window]] if plan.instruction else texts[window]
                return m3.tokenizer.encode(some, plan.max_length, mcls=plan.mcls, first=window.start)

            windows = _windows(texts)
            following = next(windows, None)
            ahead = following and tokenising.submit(tokenise, following)
            while following and ahead:
                window, (ids, shorter) = following, ahead.result()
                following = next(windows, None)
                ahead = following and tokenising.submit(tokenise, following)
                cut += shorter
                for packing in device.pack([len(row) for row in ids]):
                    settle(_AHEAD)
                    own = [ids[text] for text in packing.texts]
                    waiting.append(computing.submit(device.compute, packing, own, window.start))
            waiting.append(computing.submit(device.finish))
            settle(0)
    finally:
        for executor in (tokenising, computing):
            executor.shutdown(wait=False, cancel_futures=True)
    return device.collected.arrays(), cut


def _hidden(progress: bool | None) -> bool | None:
    return None if progress is None else not progress  # tqdm's None: hidden unless on a terminal


def _windows(texts: Sequence[str]) -> Iterator[slice]:
    start = characters = 0
    for index, text in enumerate(texts):
        if index > start and (index - start == _WINDOW_TEXTS or characters + len(text) > _WINDOW_CHARACTERS):
            yield slice(start, index)
            start, characters = index, 0
        characters += len(text)
    if start < len(texts):
        yield slice(start, len(texts))


class _Batch(NamedTuple):
    """A batch on its way: its texts are numbered from `first` on; an error waits in place of results until its turn."""

    packing: Packing
    ids: list[np.ndarray]
    first: int
    arrays: PackedIds
    results: Results | Exception


class _Device:
    """Batches to the device and back, one computed while the one before is taken in; all calls come from one thread."""

    def __init__(self, m3: M3, count: int, plan: Plan):
        self._m3 = m3
        self._plan = plan
        self._groups = row_groups(m3.params)
        self._rows = _ROWS[backend(m3.params)]
        self._tokens = plan.batch_tokens or self._rows.batch_tokens * self._groups
        self._too_many = math.inf  # tokens, the fewest that did not fit into memory
        self._running: _Batch | None = None
        self.collected = _Collected(m3, count, plan)

    def pack(self, lengths: Sequence[int]) -> Iterator[Packing]:
        rows = self._rows
        return pack(
            lengths,
            batch_tokens=self._tokens,
            row_length=rows.row_length,
            step=rows.step,
            row_multiple=self._groups,
        )

    def compute(self, packing: Packing, ids: list[np.ndarray], first: int) -> int:
        """Start a batch and take in the one before; gives the number of texts taken in."""
        taken = 0
        for part, own in self._that_fit(packing, ids):
            before, self._running = self._running, self._start(part, own, first)
            taken += self._take_in(before) if before else 0
        return taken

    def finish(self) -> int:
        """Take in the last batch."""
        return self._take_in(self._running) if self._running else 0

    def _start(self, packing: Packing, ids: list[np.ndarray], first: int) -> _Batch:
        arrays = arrange(packing, ids, self._m3.tokenizer.pad_id, MCLS_RUN + 1 if self._plan.mcls else 0)
        try:
            results = forward(self._m3.config, self._m3.params, arrays, self._plan.asked)
        except JaxRuntimeError as error:
            results = error
        return _Batch(packing, ids, first, arrays, results)

    def _take_in(self, batch: _Batch) -> int:
        try:
            if isinstance(batch.results, Exception):
                raise batch.results
            results = Results(*jax.device_get(batch.results))
        except JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or len(batch.ids) == 1:
                raise
            error.__traceback__ = None  # its frames hold arrays on the device
        else:
            self.collected.add(batch, results)
            return len(batch.ids)
        rows, length = batch.packing.shape
        if rows * length < self._too_many:
            warnings.warn(
                f"a batch of {rows} x {length} tokens did not fit into the device's memory; it and others as large are "
                f"computed in halves; pass a batch_tokens below {rows * length} to have smaller ones from the start",
                stacklevel=2,
            )
            self._too_many = rows * length
            self._tokens = min(self._tokens, max(1, self._too_many // 2))
        for part, own in self._that_fit(batch.packing, batch.ids):
            self._take_in(self._start(part, own, batch.first))
        return len(batch.ids)

    def _that_fit(self, packing: Packing, ids: list[np.ndarray]) -> Iterator[tuple[Packing, list[np.ndarray]]]:
        """The batch itself, or halves of halves of its texts that are smaller than what is known not to fit."""
        if math.prod(packing.shape) < self._too_many or len(ids) == 1:
            yield packing, ids
            return
        half = len(ids) // 2
        for some in (slice(half), slice(half, None)):
            texts, lengths = packing.texts[some], [len(text) for text in ids[some]]
            for part in self.pack(lengths):
                own = [ids[some][text] for text in part.texts]
                yield from self._that_fit(part._replace(texts=texts[part.texts]), own)


class _Collected:
    """Results of batches, put into the order of the texts."""

    def __init__(self, m3: M3, count: int, plan: Plan):
        asked, config = plan.asked, m3.config
        self._mcls = plan.mcls
        self._vocab_size = config.vocab_size
        self._dense = np.zeros((count, asked.width or config.hidden_size), np.float32) if asked.dense else None
        self._colbert = [_NOTHING] * count if asked.colbert else None
        self._terms: list[csr_matrix] | None = [] if asked.sparse else None
        self._order: list[np.ndarray] = []

    def add(self, batch: _Batch, results: Results) -> None:
        if not all(part is None or np.isfinite(part.sum()) for part in results):
            raise ValueError(
                "embeddings must be finite, but the model gave NaN or infinity; look at its weights (a training run that "
                "diverged?) or, with dtype float16, take bfloat16"
            )
        texts = batch.first + batch.packing.texts
        if self._dense is not None:
            dense = np.asarray(results.dense)
            self._dense[texts] = dense.reshape(-1, dense.shape[-1])[batch.arrays.order]
        if self._terms is not None:
            self._order.append(texts)
            self._terms.append(self._largest(batch, np.asarray(results.token_weights)))
        if self._colbert is not None:
            colbert = np.asarray(results.colbert)
            for text, row, start, ids in zip(texts, batch.packing.rows, batch.packing.starts, batch.ids, strict=True):
                own = np.delete(np.arange(len(ids)), cls_columns(len(ids), mcls=self._mcls))
                # A copy, so that a text does not keep its whole batch alive.
                self._colbert[text] = colbert[row, start + own]

    def _largest(self, batch: _Batch, weights: np.ndarray) -> csr_matrix:
        """The largest weight of each term of each text, a row a text of the packing."""
        arrays, count = batch.arrays, len(batch.ids)
        text_of_slot = np.zeros(weights.shape[0] * arrays.slots.shape[1], np.int64)
        text_of_slot[arrays.order] = np.arange(count)
        row, column = np.nonzero(weights)
        texts = text_of_slot[row * arrays.slots.shape[1] + arrays.segments[row, column] - 1]
        ids, weights = arrays.ids[row, column], weights[row, column]
        order = np.lexsort((ids, texts))
        texts, ids, weights = texts[order], ids[order], weights[order]
        first = np.flatnonzero(np.diff(texts, prepend=-1) | np.diff(ids, prepend=-1))
        largest = np.maximum.reduceat(weights, first) if len(first) else weights
        ends = np.searchsorted(texts[first], np.arange(count + 1))
        return csr_matrix((largest, ids[first], ends), shape=(count, self._vocab_size))

    def arrays(self) -> tuple[np.ndarray | None, csr_matrix | None, list[np.ndarray] | None]:
        terms = None
        if self._terms is not None:
            if self._terms:
                restore = np.argsort(np.concatenate(self._order))
                terms = csr_matrix(vstack(self._terms, format="csr", dtype=np.float32))[restore]
            else:
                terms = csr_matrix((0, self._vocab_size), dtype=np.float32)
        return self._dense, terms, self._colbert


_NOTHING = np.zeros((0, 0), np.float32)
