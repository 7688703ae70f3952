"""Prepared rows to batches of NumPy arrays: the order of rows, length groups, drawn positives and negatives, prefetch.
All of it is a pure function of (seed, step), so a run resumes at any step; devices and meshes are not known here.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import grain
import numpy as np

from m3jax.batching import bucket_length, pad
from train.data.builders import Row


class Batch(NamedTuple):
    """One step's rows of one length group, B queries and G passages each, passages query-major.

    Row i·G of the passages is query i's positive, the next G − 1 its negatives. Masks: True = real token. Equal rows of
    `passage_identity` are equal passages (`builders.Row`). `known_identity` holds all M positives of each row, a row with
    fewer has them repeated, so that a loss takes none of them for a negative of the row's query.
    """

    query_ids: np.ndarray  # int32 [B, Lq]
    query_mask: np.ndarray  # bool [B, Lq]
    passage_ids: np.ndarray  # int32 [B·G, Lp]
    passage_mask: np.ndarray  # bool [B·G, Lp]
    passage_identity: np.ndarray  # uint32 [B·G, 2]
    known_identity: np.ndarray  # uint32 [B, M, 2]


class LengthGroup(NamedTuple):
    """Rows whose longest text (query or any passage) has at most `max_length` ids, and no shorter group takes.

    `batch_size` is global: the rows of one step on all processes together.
    """

    max_length: int
    batch_size: int


class Source(Protocol):
    """What the pipeline reads; `builders.RowSource` is one."""

    query_lengths: np.ndarray
    passage_lengths: np.ndarray
    positives: np.ndarray
    negatives: np.ndarray
    query_max_length: int

    def __len__(self) -> int: ...

    def rows(self, indices: Sequence[int] | np.ndarray) -> list[Row]: ...

    def places(self, indices: Sequence[int] | np.ndarray) -> list[str]: ...


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
    """The rows of one step: their length group, and int64 `[batch size]` each one's place in the group and epoch."""

    group: int
    places: np.ndarray
    epochs: np.ndarray


class Order:
    """Which rows make which step's batch: (seed, group sizes, batch sizes, step) and nothing else decide.

    A group of n rows in batches of b is an endless stream: epoch after epoch, each a new shuffle of all n rows, cut into
    batches of b without regard to where epochs meet, so that every batch is full and no row is left out. No batch
    holds a row twice. Round r of the steps holds each group's batches number ⌊r·n/b⌋ up to ⌊(r + 1)·n/b⌋, shuffled: every
    round is one epoch of every group, to within one batch.
    """

    def __init__(self, seed: int, sizes: Sequence[int], batch_sizes: Sequence[int]):
        for n, b in zip(sizes, batch_sizes, strict=True):
            if b < 1 or 0 < n < b:
                raise ValueError(f"a group of {n} rows cannot fill a batch of {b} rows, or the batch is empty.")
        if not any(sizes):
            raise ValueError("there are no rows to order.")
        self._seed = seed
        self._sizes = list(sizes)
        self._batch_sizes = list(batch_sizes)
        # One epoch's exceptions serve all its batches, and few epochs are in use at once.
        self._moved = functools.lru_cache(maxsize=64)(self._find_moved)

    def steps_in(self, epochs: int) -> int:
        """The number of steps after which `epochs` rounds are complete."""
        return sum(epochs * n // b for n, b in zip(self._sizes, self._batch_sizes, strict=True))

    def draw(self, step: int) -> Draw:
        """The group, places and epochs of this step's rows."""
        # steps_in(r) lies within len(sizes) of r times the exact number of steps of a round.
        r = int(step / sum(n / b for n, b in zip(self._sizes, self._batch_sizes, strict=True)))
        while self.steps_in(r) > step:
            r -= 1
        while self.steps_in(r + 1) <= step:
            r += 1
        first = self.steps_in(r)
        ordinal = int(shuffled(np.array([step - first]), self.steps_in(r + 1) - first, self._key(0, r))[0])
        for group, (n, b) in enumerate(zip(self._sizes, self._batch_sizes, strict=True)):
            start, stop = r * n // b, (r + 1) * n // b
            if ordinal < stop - start:
                epochs, positions = np.divmod((start + ordinal) * b + np.arange(b), n)
                places = [self._places(group, int(e), positions[epochs == e]) for e in np.unique(epochs)]
                return Draw(group, np.concatenate(places), epochs)
            ordinal -= stop - start
        raise AssertionError("steps_in counts the batches of all groups")

    def _places(self, group: int, epoch: int, positions: np.ndarray) -> np.ndarray:
        places = self._unmoved(group, epoch, positions)
        for position, place in self._moved(group, epoch).items():
            places[positions == position] = place
        return places

    def _unmoved(self, group: int, epoch: int, positions: np.ndarray) -> np.ndarray:
        n, b = self._sizes[group], self._batch_sizes[group]
        # Under two batches of rows there is no room to move (below); one order for all epochs repeats after n ≥ b rows.
        return shuffled(positions, n, self._key(1 + group, epoch if n >= 2 * b else 0))

    def _find_moved(self, group: int, epoch: int) -> dict[int, int]:
        """Exceptions to the epoch's shuffle, position → place, that keep a batch across two epochs free of repeats.

        Rows at the head that the tail of the same batch (the end of the epoch before) holds already change places with
        the next rows that it does not hold. Those are among the epoch's first b positions, and with n ≥ 2b its own
        tail begins after them, so no exception depends on another epoch's.
        """
        n, b = self._sizes[group], self._batch_sizes[group]
        tail = epoch * n % b
        if epoch == 0 or tail == 0 or n < 2 * b:
            return {}
        taken = set(self._unmoved(group, epoch - 1, np.arange(n - tail, n)).tolist())
        places = self._unmoved(group, epoch, np.arange(b)).tolist()
        head = b - tail
        repeats = [position for position in range(head) if places[position] in taken]
        free = [position for position in range(head, b) if places[position] not in taken]
        moved: dict[int, int] = {}
        for position, other in zip(repeats, free[: len(repeats)], strict=True):
            moved[position], moved[other] = places[other], places[position]
        return moved

    def _key(self, *key: int) -> int:
        return int(np.random.SeedSequence((self._seed, *key)).generate_state(1, np.uint64)[0])


class Batches:
    """Step → `Batch`, by index: what `make_batches` prefetches; its arguments are explained there.

    `order` is the steps' order; `sizes` are each group's rows, `shapes` its static (Lq, Lp), None where it has none.
    """

    def __init__(
        self,
        source: Source,
        *,
        seed: int,
        groups: Sequence[LengthGroup],
        group_size: int,
        pad_id: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if group_size < 1:
            raise ValueError(f"group_size must be at least 1 (the positive); {group_size} came.")
        if not groups or list(groups) != sorted(groups) or len({g.max_length for g in groups}) < len(groups):
            raise ValueError(f"length groups must stand in increasing order of max_length; {list(groups)} came.")
        for group in groups:
            if group.batch_size < 1 or group.batch_size % process_count:
                raise ValueError(
                    f"the batch_size of a length group must be a positive multiple of the number of processes, "
                    f"{process_count}; group {group.max_length} has {group.batch_size}."
                )
        self._source = source
        self._seed = seed
        self._groups = list(groups)
        self._group_size = group_size
        self._pad_id = pad_id
        self._process_index = process_index
        self._process_count = process_count
        self._members = _members(source, groups)
        self.sizes = [len(members) for members in self._members]
        self._most_positives = int(source.positives.max())
        self.order = Order(seed, self.sizes, [g.batch_size for g in groups])
        self.shapes: list[tuple[int, int] | None] = [
            # A bucket may lie past what texts were cut to, and past the position table.
            (
                min(bucket_length(source.query_lengths[m].max()), source.query_max_length, group.max_length),
                min(bucket_length(source.passage_lengths[m].max()), group.max_length),
            )
            if len(m)
            else None
            for m, group in zip(self._members, groups, strict=True)
        ]
        for group, members in zip(groups, self._members, strict=True):
            self._check_fill(group, members)

    def places(self, step: int) -> tuple[LengthGroup, list[str]]:
        """The length group of a step's batch, and where its rows stand in their files, in the batch's order."""
        draw = self.order.draw(step)
        return self._groups[draw.group], self._source.places(self._members[draw.group][draw.places])

    def __getitem__(self, step: int) -> Batch:
        draw = self.order.draw(step)
        members = self._members[draw.group]
        share = len(draw.places) // self._process_count
        mine = slice(self._process_index * share, (self._process_index + 1) * share)
        indices = members[draw.places[mine]]
        rows = self._source.rows(indices)
        passages: list[np.ndarray] = []
        identity: list[np.ndarray] = []
        for index, epoch, row in zip(indices, draw.epochs[mine], rows, strict=True):
            for ids, key in self._draw_passages(int(index), epoch, row, members):
                passages.append(ids)
                identity.append(key)
        shape = self.shapes[draw.group]
        assert shape is not None
        query_length, passage_length = shape
        query_ids, query_mask = pad([row.query for row in rows], share, query_length, self._pad_id)
        passage_ids, passage_mask = pad(passages, share * self._group_size, passage_length, self._pad_id)
        # As wide as the source needs anywhere: a batch's own maximum would be another shape to compile for.
        known = np.stack([row.identity[np.arange(self._most_positives) % row.positives] for row in rows])
        return Batch(query_ids, query_mask, passage_ids, passage_mask, np.stack(identity), known)

    def _draw_passages(
        self, index: int, epoch: int, row: Row, members: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """One positive, then `group_size` − 1 negatives, as (ids, identity); (seed, index, epoch) decide."""
        random = np.random.default_rng((self._seed, index, epoch, 1))  # 1: apart from the shuffles' keys, which have 3
        yield _passage(row, int(random.integers(row.positives)))
        negatives = len(row.passages) - row.positives
        own = random.permutation(negatives)[: self._group_size - 1] + row.positives
        for passage in own:
            yield _passage(row, int(passage))
        missing = self._group_size - 1 - len(own)
        unwanted = {tuple(key) for key in row.identity[: row.positives].tolist()}
        unwanted |= {tuple(key) for key in row.identity[own].tolist()}
        seed = int(random.integers(2**32))
        tried = 0
        while missing and tried < len(members):
            tries = np.arange(tried, min(tried + missing, len(members)))
            tried += len(tries)
            for other in self._source.rows(members[shuffled(tries, len(members), seed)]):
                keys = [tuple(key) for key in other.identity[: other.positives].tolist()]
                if candidates := [passage for passage, key in enumerate(keys) if key not in unwanted]:
                    passage = int(random.choice(candidates))
                    unwanted.add(keys[passage])
                    yield _passage(other, passage)
                    missing -= 1
        assert missing == 0, "_check_fill has counted enough different positives"

    def _check_fill(self, group: LengthGroup, members: np.ndarray) -> None:
        """A row's positives and its other negatives are all that a fill must differ from."""
        short = members[self._source.negatives[members] < self._group_size - 1]
        if not len(short):
            return
        needed = int(self._source.positives[short].max()) + self._group_size - 1
        found: set[tuple[int, int]] = set()
        for start in range(0, len(members), 64):
            for row in self._source.rows(members[start : start + 64]):
                found |= {tuple(key) for key in row.identity[: row.positives].tolist()}
            if len(found) >= needed:
                return
        raise ValueError(
            f"{len(short)} rows of the length group up to {group.max_length} have fewer than {self._group_size - 1} "
            f"negatives of their own, and the positives of its other rows are too few to fill them: {needed} different "
            f"ones are needed, {len(found)} exist. Lower group_size, give the rows negatives, or join length groups."
        )


def make_batches(
    source: Source,
    *,
    seed: int,
    groups: Sequence[LengthGroup],
    group_size: int,
    start_step: int,
    num_steps: int,
    pad_id: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """The batches of steps `start_step` to `num_steps` − 1, prefetched by Grain's threads; step s is the same from any start.

    A row belongs to the length group of its longest text; the groups come in a seeded order in proportion to their
    rows (`Order`). A query has one positive drawn from its own and `group_size` − 1 of its negatives without
    repeats; where it has fewer, positives of random other rows of its length group fill up (of the same group, so that
    they fit), never one equal to a positive of its own. Rows are as long as a group's longest query and longest
    passage need, in `bucket_length`, the same at each step. Each process has the `process_index`-th contiguous slice
    of each batch's rows. ValueError, before the first batch, for rows longer than the last group, for groups with
    fewer rows than a batch and for fills that do not exist.
    """
    batches = Batches(
        source,
        seed=seed,
        groups=groups,
        group_size=group_size,
        pad_id=pad_id,
        process_index=process_index,
        process_count=process_count,
    )
    return prefetch(batches, start_step, num_steps)


def prefetch(batches: Batches, start_step: int, num_steps: int) -> Iterator[Batch]:
    """The batches of steps `start_step` to `num_steps` − 1 in order, a few ahead of the reader on two threads."""
    steps = grain.MapDataset.range(start_step, num_steps).map(batches.__getitem__)
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))


def _passage(row: Row, passage: int) -> tuple[np.ndarray, np.ndarray]:
    return row.passages[passage], row.identity[passage]


def _members(source: Source, groups: Sequence[LengthGroup]) -> list[np.ndarray]:
    """Each group's rows in the source's order; ValueError for rows that no group takes, or too few for a batch."""
    longest = np.maximum(source.query_lengths, source.passage_lengths)
    bounds = [group.max_length for group in groups]
    group_of = np.searchsorted(bounds, longest)
    if over := int((group_of == len(groups)).sum()):
        raise ValueError(
            f"{over} rows are longer than the last length group: their longest text has up to {longest.max()} token "
            f"ids, the groups end at {bounds[-1]}. Add a group, or lower query_max_length and passage_max_length."
        )
    members = [np.flatnonzero(group_of == g) for g in range(len(groups))]
    for group, rows in zip(groups, members, strict=True):
        if 0 < len(rows) < group.batch_size:
            sizes = ", ".join(
                f"up to {g.max_length}: {len(m)} rows, batch {g.batch_size}"
                for g, m in zip(groups, members, strict=True)
            )
            raise ValueError(
                f"the length group up to {group.max_length} has {len(rows)} rows, fewer than its batch_size "
                f"{group.batch_size}: a batch would hold a row twice. Lower that batch_size or remove the group's "
                f"bound, so that the next longer one takes its rows. Groups: {sizes}."
            )
    return members
