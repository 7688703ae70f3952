"""Which rows make which step's batch, as a pure function of (seed, step) that keeps nothing of the size of the data.
What a stream of rows is and what a batch holds is not here (`streams`, `pipeline`).
"""

import bisect
import functools
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np


def shuffled(indices: np.ndarray, count: int, seed: int) -> np.ndarray:
    """The places int64 of `indices` in the seed's permutation of `count` places, in memory that `count` does not touch.

    Each step (times an odd number, xor with the upper half) is a bijection of ⌈log2 count⌉ bits; what leaves the range is
    mapped again until it is back, under two times on average. (Grain's index_shuffle does the same on at least 16 bits:
    measured 0.8 ms an index for 60 places, 4 µs for 50,000; this one takes 0.1 µs.)

    >>> shuffled(np.arange(3), 3, seed=0).tolist()
    [2, 1, 0]
    """
    bits = (count - 1).bit_length()
    keys = np.random.SeedSequence(seed).generate_state(12, np.uint64).reshape(6, 2)
    low = np.uint64(2**bits - 1)
    half = np.uint64((bits + 1) // 2)
    places = np.asarray(indices, np.uint64)
    outside = np.ones(places.shape, bool)
    while outside.any():
        x = places[outside]
        for factor, shift in keys:
            x = (x * (factor | np.uint64(1)) + shift) & low
            x ^= x >> half
        places[outside] = x
        outside = places >= count
    return places.astype(np.int64)


class Draw(NamedTuple):
    """The rows of one step: their stream, and int64 `[batch size]` each one's place in the stream and epoch."""

    stream: int
    places: np.ndarray
    epochs: np.ndarray


class Order:
    """Which rows make which step's batch: (seed, sizes, batch sizes and weights of the streams, step) and nothing else decide.

    A stream of n rows in batches of b is endless: epoch after epoch, each a new shuffle of all n rows, cut into
    batches of b without regard to where epochs meet, so that every batch is full and no row is left out. No batch
    holds a row twice. Round r of the steps holds each stream's batches number ⌊r·w·n/b⌋ up to ⌊(r + 1)·w·n/b⌋, shuffled:
    every round is w epochs of every stream, w its weight, to within one batch. (A weight is taken as the decimal number that
    it is written as, so that no rounding adds up.)
    """

    def __init__(
        self, seed: int, sizes: Sequence[int], batch_sizes: Sequence[int], weights: Sequence[float] | None = None
    ):
        for n, b in zip(sizes, batch_sizes, strict=True):
            if b < 1 or 0 < n < b:
                raise ValueError(f"a stream of {n} rows cannot fill a batch of {b} rows, or the batch is empty.")
        if not any(sizes):
            raise ValueError("there are no rows to order.")
        self._seed = seed
        self._sizes = list(sizes)
        self._batch_sizes = list(batch_sizes)
        # Batches a round.
        self._rates = [
            Fraction(str(w)) * n / b
            for n, b, w in zip(sizes, batch_sizes, weights or [1] * len(self._sizes), strict=True)
        ]
        # One epoch's exceptions serve all its batches, and few epochs are in use at once.
        self._moved = functools.lru_cache(maxsize=64)(self._find_moved)

    def steps_in(self, rounds: int) -> int:
        """The number of steps after which so many rounds are complete."""
        return sum(int(rounds * rate) for rate in self._rates)

    def draw(self, step: int) -> Draw:
        """The stream, places and epochs of this step's rows."""
        # steps_in(r) is at most r times the exact number of steps of a round, and less than one a stream below it.
        exact = sum(self._rates)
        first = int(step / exact)
        candidates = range(first, int((step + len(self._rates)) / exact) + 2)
        r = first + bisect.bisect_right(candidates, step, key=self.steps_in) - 1
        before = self.steps_in(r)
        ordinal = int(shuffled(np.array([step - before]), self.steps_in(r + 1) - before, self._key(0, r))[0])
        for stream, (n, b, rate) in enumerate(zip(self._sizes, self._batch_sizes, self._rates, strict=True)):
            start, stop = int(r * rate), int((r + 1) * rate)
            if ordinal < stop - start:
                epochs, positions = np.divmod((start + ordinal) * b + np.arange(b), n)
                places = [self._places(stream, int(e), positions[epochs == e]) for e in np.unique(epochs)]
                return Draw(stream, np.concatenate(places), epochs)
            ordinal -= stop - start
        raise AssertionError("steps_in counts the batches of all streams")

    def _places(self, stream: int, epoch: int, positions: np.ndarray) -> np.ndarray:
        places = self._unmoved(stream, epoch, positions)
        for position, place in self._moved(stream, epoch).items():
            places[positions == position] = place
        return places

    def _unmoved(self, stream: int, epoch: int, positions: np.ndarray) -> np.ndarray:
        n, b = self._sizes[stream], self._batch_sizes[stream]
        # Under two batches of rows there is no room to move (below); one order for all epochs repeats after n ≥ b rows.
        return shuffled(positions, n, self._key(1 + stream, epoch if n >= 2 * b else 0))

    def _find_moved(self, stream: int, epoch: int) -> dict[int, int]:
        """Exceptions to the epoch's shuffle, position → place, that keep a batch across two epochs free of repeats.

        Rows at the head that the tail of the same batch (the end of the epoch before) holds already change places with
        the next rows that it does not hold. Those are among the epoch's first b positions, and with n ≥ 2b its own
        tail begins after them, so no exception depends on another epoch's.
        """
        n, b = self._sizes[stream], self._batch_sizes[stream]
        tail = epoch * n % b
        if epoch == 0 or tail == 0 or n < 2 * b:
            return {}
        taken = set(self._unmoved(stream, epoch - 1, np.arange(n - tail, n)).tolist())
        places = self._unmoved(stream, epoch, np.arange(b)).tolist()
        head = b - tail
        repeats = [position for position in range(head) if places[position] in taken]
        free = [position for position in range(head, b) if places[position] not in taken]
        moved: dict[int, int] = {}
        for position, other in zip(repeats, free[: len(repeats)], strict=True):
            moved[position], moved[other] = places[other], places[position]
        return moved

    def _key(self, *key: int) -> int:
        return int(np.random.SeedSequence((self._seed, *key)).generate_state(1, np.uint64)[0])
