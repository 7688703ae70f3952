"""Which rows make batches with which: the streams, one for each dataset and length group, and the shapes of their batches.
Which rows of a stream come at which step is not here (`order`), nor what is drawn of a row (`pipeline`).
"""

import warnings
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple, Protocol

import numpy as np

from m3jax.batching import bucket_length
from train.data.builders import Dataset, Row
from train.data.rows import TYPES

# Query buckets double from here on: each is a shape to compile for, and queries are a small part of a batch's tokens.
_SHORTEST_QUERIES = 32


class Source(Protocol):
    """What batches are made of; `builders.RowSource` is one."""

    query_lengths: np.ndarray
    passage_lengths: np.ndarray
    positives: np.ndarray
    negatives: np.ndarray
    kinds: np.ndarray
    query_max_length: int

    @property
    def datasets(self) -> Sequence[Dataset]: ...

    def __len__(self) -> int: ...

    def rows(self, indices: Sequence[int] | np.ndarray) -> list[Row]: ...

    def places(self, indices: Sequence[int] | np.ndarray) -> list[str]: ...


class LengthGroup(NamedTuple):
    """Rows whose longest text (query or any passage) has at most `max_length` ids, and no shorter group takes.

    `batch_size` is global: the rows of one step on all devices together.
    """

    max_length: int
    batch_size: int


class Stream(NamedTuple):
    """Rows that make batches with each other, `members` int64 their indices, and the sizes of their batches.

    `dataset`: its path, that of the one with the most rows, or that it is all. `query_length` is the longest: a batch's is
    `query_bucket` of its own longest query, where that is less. `weight`: how often a row comes in a round of all streams.
    """

    dataset: str
    group: LengthGroup
    members: np.ndarray
    group_size: int
    query_length: int
    passage_length: int
    weight: float
    step: int

    @property
    def batches_a_round(self) -> float:
        """How many of its batches a round of all streams has."""
        return self.weight * len(self.members) / self.group.batch_size

    def queries_as_long_as(self, longest: int) -> int:
        """The padded length of the queries of a batch whose longest query has so many ids."""
        return min(_up(query_bucket(longest), self.step), self.query_length)


class Shape(NamedTuple):
    """The sizes of a batch's arrays: B, G, Lq, Lp."""

    queries: int
    group_size: int
    query_length: int
    passage_length: int


def query_bucket(n: int) -> int:
    """The padded length of queries of up to n ids: 32 or the next power of two.

    >>> [query_bucket(n) for n in (3, 33, 512)]
    [32, 64, 512]
    """
    return max(_SHORTEST_QUERIES, 1 << (int(n) - 1).bit_length())


def _up(n: int, step: int) -> int:
    """The next multiple of step; with a step of 1, n itself."""
    return -(-n // step) * step


def group_sizes(source: Source, group_size: int) -> np.ndarray:
    """The number of passages that each row brings, int64 `[rows]`, the positive included: `builders.prepare` says which type
    does what. Where other rows' positives may not stand in for negatives, a row brings no more than it has."""
    sizes = np.where(source.kinds == TYPES.index("only_1neg"), 2, group_size)
    return np.where(fills(source), sizes, np.minimum(sizes, 1 + source.negatives))


def fills(source: Source) -> np.ndarray:
    """Whether positives of other rows take the places of negatives that a row lacks, bool `[rows]`."""
    own_group = np.repeat([d.own_group for d in source.datasets], [d.rows for d in source.datasets])
    return (source.kinds != TYPES.index("symmetric_class")) & ~own_group


def make_streams(
    source: Source,
    groups: Sequence[LengthGroup],
    group_size: int,
    same_dataset: bool,
    weights: Sequence[float],
    *,
    step: int = 1,
) -> list[Stream]:
    """The streams of a source: a dataset's rows of one length group, or all of it where not `same_dataset`.

    Rows too few for a batch would have it hold a row twice. Those of a dataset share the batches of the dataset that has the
    most in their length group; where all together are too few, they go with the next longer group. Warnings say both, and what
    becomes of weights that differ. Batches
    of one length group have one length of passages, whatever the dataset, so that the number of shapes does not grow with the
    number of datasets, and both padded lengths are multiples of `step`. `weights`: one number for each dataset, () is 1 for
    all; they need `same_dataset`; rows that share batches have their mean. ValueError for rows that no group takes, too few
    rows for a batch of the last group, rows of a dataset without in-batch negatives that have no negative, and bad weights.
    """
    datasets = source.datasets if same_dataset else [Dataset("all datasets", len(source), False)]
    weights = weights_of(len(source.datasets), same_dataset, weights)
    _check_own_groups(source)
    group_of = group_of_each(np.maximum(source.query_lengths, source.passage_lengths), groups)
    sizes = group_sizes(source, group_size)
    starts = np.cumsum([0, *(dataset.rows for dataset in datasets)])
    streams = []
    for number, group in enumerate(groups):
        everyone = np.flatnonzero(group_of == number)
        if not len(everyone):
            continue
        # A bucket may lie past what texts were cut to, and past the position table.
        longest_query, longest_passage = (
            int(lengths[everyone].max()) for lengths in (source.query_lengths, source.passage_lengths)
        )
        query_length = _up(min(query_bucket(longest_query), source.query_max_length, group.max_length), step)
        passage_length = _up(min(bucket_length(longest_passage), group.max_length), step)
        of = np.searchsorted(starts, everyone, side="right") - 1
        counts = np.bincount(of, minlength=len(datasets))
        most = int(counts.argmax())
        few = np.flatnonzero((counts > 0) & (counts < group.batch_size) & (np.arange(len(datasets)) != most)).tolist()
        if few:
            named = ", ".join(f"{counts[d]} of {datasets[d].path}" for d in few)
            instead = ""
            if len(asked := sorted({weights[d] for d in (most, *few)})) > 1:
                weight = _mean_weight(weights, counts, [most, *few])
                instead = f" All of these come {weight:.3g} times a round, where their weights are {asked}."
            warnings.warn(
                f"rows of up to {group.max_length} token ids that are too few for a batch of {group.batch_size} share those "
                f"of {datasets[most].path}: {named}.{instead}",
                stacklevel=2,
            )
        stream_of = np.arange(len(datasets))
        stream_of[few] = most
        for stream in np.unique(stream_of[of]).tolist():
            sharing = np.flatnonzero(stream_of == stream).tolist()
            members = everyone[stream_of[of] == stream]
            weight = _mean_weight(weights, counts, sharing)
            lengths = query_length, passage_length
            largest = int(sizes[members].max())
            streams.append(Stream(datasets[stream].path, group, members, largest, *lengths, weight, step))
    return streams


def _mean_weight(weights: Sequence[float], counts: np.ndarray, datasets: Sequence[int]) -> float:
    """Of the rows of these datasets, of which each has so many. In fractions: of one dataset it is the weight itself, which
    `order` takes as a decimal number."""
    rows = sum(int(counts[d]) for d in datasets)
    return float(sum(Fraction(str(weights[d])) * int(counts[d]) for d in datasets) / rows)


def shapes(source: Source, streams: Sequence[Stream]) -> set[Shape]:
    """All shapes that batches may have: at most the length groups × query buckets × sizes of a row's group.

    The longest of b queries is at least as long as the b-th shortest.
    """
    return {
        Shape(stream.group.batch_size, stream.group_size, stream.queries_as_long_as(longest), stream.passage_length)
        for stream in streams
        for longest in np.unique(np.sort(source.query_lengths[stream.members])[stream.group.batch_size - 1 :]).tolist()
    }


def weights_of(datasets: int, same_dataset: bool, weights: Sequence[float]) -> list[float]:
    """The weights of so many datasets, of which batches that mix them have one; ValueError for those that mean nothing."""
    weights = list(weights) or [1.0] * datasets
    if len(weights) != datasets or not all(0 < weight < np.inf for weight in weights):
        raise ValueError(f"weights are one number above 0 for each dataset, {datasets} in all; {tuple(weights)} came.")
    if same_dataset:
        return weights
    if set(weights) != {1.0}:
        raise ValueError(
            "weights need batches of one dataset each: a mixed batch is drawn from the rows of all at once, and could hold a "
            f"row of a weight above 1 twice. Set same_dataset, or leave the weights out; {tuple(weights)} came."
        )
    return [1.0]


def _check_own_groups(source: Source) -> None:
    start = 0
    for dataset in source.datasets:
        without = int((source.negatives[start : start + dataset.rows] == 0).sum())
        start += dataset.rows
        if dataset.own_group and without:
            raise ValueError(
                f"{dataset.path}: {without} of {dataset.rows} rows have no negative, and by its name the dataset takes none "
                "from other rows of a batch, so nothing can be learnt from them. Give them negatives, or rename it."
            )


def group_of_each(longest: np.ndarray, groups: Sequence[LengthGroup]) -> np.ndarray:
    """The length group of each row by its longest text; rows too few for a batch of theirs have the next longer one.

    ValueError for groups out of order, for rows that no group takes, and for too few rows for a batch of the last group.
    """
    if not groups or list(groups) != sorted(groups) or len({g.max_length for g in groups}) < len(groups):
        raise ValueError(f"length groups must stand in increasing order of max_length; {list(groups)} came.")
    bounds = [group.max_length for group in groups]
    group_of = np.searchsorted(bounds, longest)
    if over := int((group_of == len(groups)).sum()):
        raise ValueError(
            f"{over} rows are longer than the last length group: their longest text has up to {longest.max()} token "
            f"ids, the groups end at {bounds[-1]}. Add a group, or lower query_max_length and passage_max_length."
        )
    sizes = ", ".join(
        f"up to {g.max_length}: {(group_of == i).sum()} rows, batch {g.batch_size}" for i, g in enumerate(groups)
    )
    for number, group in enumerate(groups):
        few = group_of == number
        count = int(few.sum())
        if not 0 < count < group.batch_size:
            continue
        if number + 1 == len(groups):
            raise ValueError(
                f"the length group up to {group.max_length} has {count} rows, fewer than its batch_size {group.batch_size}: a "
                "batch would hold a row twice. Lower that batch_size, add rows, or have longer texts cut by query_max_length "
                f"and passage_max_length, so that a shorter group takes them. Groups: {sizes}."
            )
        group_of[few] = number + 1
        warnings.warn(
            f"{count} rows of up to {group.max_length} token ids are too few for a batch of {group.batch_size}; they go with "
            f"those of up to {groups[number + 1].max_length}.",
            stacklevel=2,
        )
    return group_of
