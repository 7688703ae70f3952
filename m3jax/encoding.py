"""Texts to dense, lexical and colbert arrays: read, tokenised, computed and taken in beside each other, delivered in order.

Not here: what users pass and get (embedder.py, corpus.py), how texts share batches (batching.py), what the device computes
(forward.py).
"""

import hashlib
import math
import re
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from threading import Event, Thread
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.errors import JaxRuntimeError
from jax.experimental import multihost_utils

from m3jax.arguments import Plan
from m3jax.batching import PackedIds, Packing, arrange, pack
from m3jax.collected import Arrays, Collected
from m3jax.forward import Results, backend, forward, mesh_of, row_groups
from m3jax.model import M3
from m3jax.tokenization import MCLS_RUN

Key = TypeVar("Key")


class Rows(NamedTuple):
    """How `pack` makes a backend's batches: tokens of one on each device, the row length that short texts share, what rows are
    multiples of, and where few shapes are to be compiled, the row lengths for longer texts."""

    batch_tokens: int
    row_length: int
    step: int
    longer_rows: Sequence[int] = ()

    def pack(self, lengths: Sequence[int], batch_tokens: int | None, groups: int) -> Iterator[Packing]:
        """The batches of texts for so many groups of devices; None is the backend's own number of tokens."""
        return pack(
            lengths,
            batch_tokens=batch_tokens or self.batch_tokens * groups,
            row_length=self.row_length,
            step=self.step,
            longer_rows=self.longer_rows,
            row_multiple=groups,
        )


# CPU: a layer's activations of 1024 tokens stay in the caches; 12 × 768 in rows of 64, microseconds a token and layer at 512,
# 1024, 2048, 4096 tokens: float32 81, 81, 96, 105, bfloat16 44, 44, 47, 61. Short rows, because attention there works through a
# row for each of its tokens. TPU: its kernels take rows of multiples of 128. Where a shape takes a second to compile, documents
# share rows of eight lengths: of 1,000 with 1,000 to 8,000 tokens, 4.2% is padding, in 7 to 10 shapes. That costs 1.21 × the
# operations of rows that they have to themselves, as attention goes over whole rows; lengths in steps of 128, which were 49
# shapes, 1.04 ×, those in steps of 2048 1.26 × (tests/test_batching.py). GPU and TPU: no times measured.
_LONGER = range(1024, 8192 + 1, 1024)
_ROWS = {"cpu": Rows(1024, 64, 8), "gpu": Rows(16384, 512, 64, _LONGER), "tpu": Rows(16384, 512, 128, _LONGER)}

# Texts are tokenised, sorted and packed some thousands at a time: enough to fill rows, few enough to begin soon.
_WINDOW_TEXTS = 8192
_WINDOW_CHARACTERS = 1 << 22
# Windows at work while the next is read: one is computed, one is tokenised.
_AT_WORK = 2
# Characters between two looks whether to go on: about 0.1 s of tokenising.
_CHARACTERS_AT_ONCE = 1 << 18
# Computations that XLA lets wait on CPU; starting one more waits for one of them, and nothing breaks that off.
_CPU_QUEUE = 32


# What JAX says where memory is short: of one program the first, of one that waited for another on CPU the second.
_OUT_OF_MEMORY = re.compile("RESOURCE_EXHAUSTED|out of memory", re.IGNORECASE)


def say_cut(cut: int, count: int, plan: Plan) -> str:
    """What the warning of texts that were cut says."""
    with_cls = ", CLS tokens of mcls included," if plan.mcls else ""
    return f"{cut} of {count} texts are longer{with_cls} than max_length = {plan.max_length} tokens and were cut to it"


def run(
    m3: M3,
    parts: Iterable[tuple[Key, Sequence[str]]],
    plan: Plan,
    *,
    deliver: Callable[[Key, Arrays, int], object],
    taken_in: Callable[[int], object],
) -> None:
    """Encode the texts of each part: `deliver(key, arrays, cut)` gets what was asked for of them and how many were cut.

    Parts come as (key, texts) and are delivered in their order, each when it is whole. Meanwhile the next batch is computed and
    the texts of at most three more parts are read. taken_in is told numbers of texts, for a progress bar. Both are called from
    the thread that starts batches and takes them in, which waits for them.

    An error of reading `parts` comes through when what came before is delivered, every other when the next part is read, or at
    once where none is awaited. Ctrl-C returns at once: no batch is started and nothing delivered after it, and a process that
    then ends does not wait for the batches at work, only for the tokens of one text.
    """
    stop = Event()
    device = _Device(m3, plan, stop, deliver, taken_in)
    tokenising, computing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
    at_work: deque[Future[None]] = deque()
    came = 0

    def tokenise(window: _Window) -> _Tokenised:
        ids: list[np.ndarray] = []
        cut = 0
        for some in _slices(window.texts, len(window.texts), _CHARACTERS_AT_ONCE):
            if stop.is_set():
                raise CancelledError
            texts = [plan.instruction + text for text in window.texts[some]]
            more, longer = m3.tokenizer.encode(texts, plan.max_length, mcls=plan.mcls)
            ids += more
            cut += longer
        return _Tokenised(ids, cut, list(device.pack([len(row) for row in ids])))

    def compute(window: _Window, tokenised: Future[_Tokenised]) -> None:
        try:
            device.compute(window, tokenised)
            if window.number == came:  # nothing waits behind it, and the next may be long in coming
                device.finish()
        except BaseException:
            stop.set()  # what waits behind it is not begun
            device.let_go()
            raise

    def settle(left: int) -> None:
        while len(at_work) > left:
            at_work.popleft().result()

    try:
        try:
            for window in _windows(parts):
                settle(_AT_WORK - 1)
                came = window.number
                at_work.append(computing.submit(compute, window, tokenising.submit(tokenise, window)))
        except Exception:
            if not stop.is_set():  # it is one of reading
                settle(0)
            raise
        settle(0)
    finally:
        stop.set()
        for executor in (tokenising, computing):
            executor.shutdown(wait=False, cancel_futures=True)


class _Window(NamedTuple):
    """Texts that share batches, the number-th of a run: of the `count` texts of a part those from `first` on."""

    number: int
    key: Any
    count: int
    first: int
    texts: Sequence[str]


def _windows(parts: Iterable[tuple[Any, Sequence[str]]]) -> Iterator[_Window]:
    """The windows of each part; a part of no texts has one of none."""
    number = 0
    for key, texts in parts:
        for some in _slices(texts, _WINDOW_TEXTS, _WINDOW_CHARACTERS):
            number += 1
            yield _Window(number, key, len(texts), some.start, texts[some])


def _slices(texts: Sequence[str], count: int, most: int) -> Iterator[slice]:
    """All texts in slices of at most `count`, which have at most so many characters, but for a single text."""
    start = characters = 0
    for index, text in enumerate(texts):
        if index > start and (index - start == count or characters + len(text) > most):
            yield slice(start, index)
            start, characters = index, 0
        characters += len(text)
    yield slice(start, len(texts))


class _Tokenised(NamedTuple):
    """The token ids of a window's texts, how many were cut, and the batches they make."""

    ids: list[np.ndarray]
    cut: int
    packings: list[Packing]


class _Batch(NamedTuple):
    """A batch on its way, of texts of `window`; an error waits in place of results until its turn."""

    window: _Window
    collected: Collected
    packing: Packing
    ids: list[np.ndarray]
    arrays: PackedIds
    results: Results | Exception


def _check_same(window: _Window, ids: list[np.ndarray]) -> None:
    """Parameters that span processes make all compute the same batches: with other texts in one, all rows would be wrong."""
    digest = hashlib.blake2b(repr((window.count, window.first, [len(row) for row in ids])).encode(), digest_size=8)
    for row in ids:
        digest.update(row.tobytes())
    digests = multihost_utils.process_allgather(np.frombuffer(digest.digest(), np.uint8))
    if differing := np.flatnonzero((digests != digests[0]).any(axis=1)).tolist():
        raise ValueError(
            "parameters on a mesh of several processes mean that all of them pass the same texts in the same order, but "
            f"among texts {window.first} to {window.first + len(ids) - 1} those of processes {differing} are not those of "
            "process 0; pass all of them the same, or give each process parameters of its own (m3jax.load)"
        )


def _arrays(batch: _Batch) -> list[Any]:  # jax.Array does not tell type checkers of is_ready
    return [] if isinstance(batch.results, Exception) else [x for x in batch.results if x is not None]


class _Device:
    """Batches to the device and back, one computed while the one before is taken in; all calls but of `pack` come from one
    thread."""

    def __init__(
        self,
        m3: M3,
        plan: Plan,
        stop: Event,
        deliver: Callable[[Any, Arrays, int], object],
        taken_in: Callable[[int], object],
    ):
        self._m3 = m3
        self._plan = plan
        self._stop = stop
        self._deliver = deliver
        self._taken_in = taken_in
        mesh = mesh_of(m3.params)
        self._several_processes = mesh is not None and mesh.is_multi_process
        self._groups = row_groups(m3.params)
        self._rows = _ROWS[backend(m3.params)]
        self._tokens = plan.batch_tokens or self._rows.batch_tokens * self._groups
        self._too_many = math.inf  # tokens, the fewest that did not fit into memory
        # A layer is a computation, so are embeddings and heads.
        self._one_by_one = backend(m3.params) == "cpu" and 2 * (m3.config.num_hidden_layers + 2) > _CPU_QUEUE
        self._collected: Collected | None = None
        self._running: _Batch | None = None  # the last that was started
        self._awaited: _Batch | None = None  # the one that is taken in

    def pack(self, lengths: Sequence[int]) -> Iterator[Packing]:
        return self._rows.pack(lengths, self._tokens, self._groups)

    def compute(self, window: _Window, tokenised: Future[_Tokenised]) -> None:
        """Start each batch of a window, and take in the one before."""
        if not tokenised.done():
            self.finish()  # the device has nothing else to do
        ids, cut, packings = tokenised.result()
        if self._several_processes:
            _check_same(window, ids)
        if window.first == 0:
            self._collected = Collected(self._m3.config, window.count, self._plan.asked, mcls=self._plan.mcls)
        collected = self._collected
        assert collected is not None
        collected.cut += cut
        for packing in packings:
            for part, own in self._that_fit(packing, [ids[text] for text in packing.texts]):
                before, self._running = self._running, self._start(window, collected, part, own)
                if before:
                    self._take_in(before)
        if not window.count:
            self.finish()
            self._whole(window, collected)

    def finish(self) -> None:
        """Take in the last batch."""
        last, self._running = self._running, None
        if last:
            self._take_in(last)

    def _start(self, window: _Window, collected: Collected, packing: Packing, ids: list[np.ndarray]) -> _Batch:
        self._go_on()
        arrays = arrange(packing, ids, self._m3.tokenizer.pad_id, MCLS_RUN + 1 if self._plan.mcls else 0)
        if self._one_by_one and self._running:
            self._wait(self._running)
        try:
            results = forward(self._m3.config, self._m3.params, arrays, self._plan.asked)
        except JaxRuntimeError as error:
            results = error
        return _Batch(window, collected, packing, ids, arrays, results)

    def _take_in(self, batch: _Batch) -> None:
        self._awaited = batch  # before anything is raised: what nothing holds is waited for when it is freed
        try:
            self._go_on()
            self._wait(batch)
            if isinstance(batch.results, Exception):
                raise batch.results
            results = Results(*jax.device_get(batch.results))
        except JaxRuntimeError as error:
            if not _OUT_OF_MEMORY.search(str(error)) or len(batch.ids) == 1:
                raise
            if self._several_processes:
                rows, length = batch.packing.shape
                # The others may have had room for it; they would wait for ever for halves that only this process computes.
                error.add_note(
                    f"a batch of {rows} x {length} tokens did not fit into the memory of this process's devices, and is not "
                    "halved, because parameters on a mesh of several processes make all compute the same batches; pass all of "
                    f"them a batch_tokens below {rows * length}"
                )
                raise
            error.__traceback__ = None  # its frames hold arrays on the device
        else:
            batch.collected.add(batch.window.first, batch.packing, batch.ids, batch.arrays, results)
            self._taken_in(len(batch.ids))
            if not batch.collected.left:
                self._whole(batch.window, batch.collected)
            return
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
            self._take_in(self._start(batch.window, batch.collected, part, own))

    def _whole(self, window: _Window, collected: Collected) -> None:
        self._go_on()
        self._deliver(window.key, collected.arrays(), collected.cut)

    def _go_on(self) -> None:
        if self._stop.is_set():
            raise CancelledError

    def _wait(self, batch: _Batch) -> None:
        """Until the device has the results: by looking, because nothing breaks off JAX's own waiting."""
        start, results = time.perf_counter(), _arrays(batch)
        while not all(x.is_ready() for x in results):
            # Late by a thirtieth of the time that it took so far, and by 5 ms at most: each look takes a core from the device
            # where that is a CPU, and looks after a hundredth took 2 ms of a query's 38.
            if self._stop.wait(min(0.03 * (time.perf_counter() - start) + 1e-4, 0.005)):
                raise CancelledError

    def let_go(self) -> None:
        """Leave the batches at work to themselves, so that a process which ends does not wait for them.

        JAX would wait when the last of its arrays is freed. They are kept by a thread that no process waits for.
        """
        left = [x for batch in (self._awaited, self._running) if batch for x in _arrays(batch)]

        def keep() -> None:
            while not all(x.is_ready() for x in left):
                time.sleep(0.05)

        Thread(target=keep, daemon=True).start()

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
