"""Prepared rows to batches of NumPy arrays: drawn positives and negatives, padding, prefetch.
All of it is a pure function of (seed, step), so a run resumes at any step; which rows a step has is in `order`, which rows
make batches with which in `streams`. Devices and meshes are not known here.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from m3jax.batching import pad
from train.data.builders import Row
from train.data.order import Order, shuffled
from train.data.streams import LengthGroup, Source, Stream, fills, group_sizes, make_streams, shapes

# Passages from here on are long enough to be cut in three: about the reference's 100 characters, in tokens.
_LONG = 32


class Batch(NamedTuple):
    """One step's rows of one length group, B queries and G passages each, passages query-major.

    Row i·G of the passages is query i's positive, the next G − 1 its negatives. Masks: True = real token. Equal rows of
    `passage_identity` are equal passages (`builders.Row`). `known_identity` holds all M positives of each row, a row with
    fewer has them repeated, so that a loss takes none of them for a negative of the row's query.

    A row that brings fewer than G passages has `<s> </s>` in the places that are left, with `passage_present` False: they
    are nobody's candidates. `own_group` rows have the passages of their own group as candidates only. `teacher_scores` are
    −inf where a passage has none: all of a row that has no scores, places left, and passages of other rows.
    """

    query_ids: np.ndarray  # int32 [B, Lq]
    query_mask: np.ndarray  # bool [B, Lq]
    passage_ids: np.ndarray  # int32 [B·G, Lp]
    passage_mask: np.ndarray  # bool [B·G, Lp]
    passage_identity: np.ndarray  # uint32 [B·G, 2]
    known_identity: np.ndarray  # uint32 [B, M, 2]
    passage_present: np.ndarray  # bool [B·G]
    own_group: np.ndarray  # bool [B]
    teacher_scores: np.ndarray  # float32 [B, G]

    @property
    def sides(self) -> dict[str, tuple[int, int]]:
        """The rows and the length of what is encoded."""
        return {"queries": self.query_ids.shape, "passages": self.passage_ids.shape}


class _Passage(NamedTuple):
    ids: np.ndarray
    identity: np.ndarray
    score: float = -np.inf
    present: bool = True


class Batches:
    """Step → `Batch`, by index, the same from any start: `prefetch` reads ahead in it.

    A row belongs to the length group of its longest text, and batches are of one group and, with `same_dataset`, of one
    dataset: a stream (`make_streams`). The `streams` come in a seeded order, `weights` times as often as their number of rows
    says (`order`). A query has one positive drawn from its own and negatives of its own without repeats, `group_size` − 1 or
    what its type says (`builders.prepare`); where it has fewer, positives of random other rows of its stream fill up (which
    fit), never one equal to a positive of its own. A passage of 32 ids or more has its thirds in a random order with the
    probability `shuffle_segments`. Passages are as long as the longest of the length group needs, in `bucket_length`, queries
    as the longest of the global batch needs, in `query_bucket`, both multiples of `step`: `shapes` are all that may come. Of
    the `parts` equal parts of a batch's rows, one after another, come those numbered in `held`.

    ValueError for rows longer than the last group, for rows too few for a batch of it, for fills that do not exist, and for
    what `make_streams` refuses.
    """

    def __init__(
        self,
        source: Source,
        *,
        seed: int,
        groups: Sequence[LengthGroup],
        group_size: int,
        pad_id: int,
        same_dataset: bool = True,
        weights: Sequence[float] = (),
        shuffle_segments: float = 0.0,
        step: int = 1,
        held: Sequence[int] = (0,),
        parts: int = 1,
    ):
        if group_size < 1:
            raise ValueError(f"group_size must be at least 1 (the positive); {group_size} came.")
        for group in groups:
            if group.batch_size < 1 or group.batch_size % parts:
                raise ValueError(
                    f"the batch_size of a length group must be a positive multiple of the parts it is split into, {parts}; "
                    f"group {group.max_length} has {group.batch_size}."
                )
        self._source = source
        self._seed = seed
        self._pad_id = pad_id
        self._shuffle_segments = shuffle_segments
        self._held = list(held)
        self.parts = parts  # that a batch's rows are split into
        self._most_positives = int(source.positives.max())
        self._sizes = group_sizes(source, group_size)
        self._fills = fills(source)
        self._own_group = np.repeat([d.own_group for d in source.datasets], [d.rows for d in source.datasets])
        self.streams = make_streams(source, groups, group_size, same_dataset, weights, step=step)
        self.shapes = shapes(source, self.streams)
        self.order = Order(
            seed,
            [len(stream.members) for stream in self.streams],
            [stream.group.batch_size for stream in self.streams],
            [stream.weight for stream in self.streams],
        )
        for stream in self.streams:
            self._check_fill(stream)

    def places(self, step: int) -> tuple[LengthGroup, list[str]]:
        """The length group of a step's batch, and where its rows stand in their files, in the batch's order."""
        draw = self.order.draw(step)
        stream = self.streams[draw.stream]
        return stream.group, self._source.places(stream.members[draw.places])

    def __getitem__(self, step: int) -> Batch:
        draw = self.order.draw(step)
        stream = self.streams[draw.stream]
        everyone = stream.members[draw.places]
        # Of the global batch, so that all processes have one shape.
        query_length = stream.queries_as_long_as(self._source.query_lengths[everyone].max())
        mine = np.arange(len(everyone)).reshape(self.parts, -1)[self._held].ravel()
        indices = everyone[mine]
        rows = self._source.rows(indices)
        passages: list[_Passage] = []
        for index, epoch, row in zip(indices.tolist(), draw.epochs[mine].tolist(), rows, strict=True):
            drawn = list(self._draw_passages(index, epoch, row, stream.members))
            # Not a row of padding alone: it would have no first token to be embedded by.
            missing = stream.group_size - len(drawn)
            nothing = _Passage(row.query[[0, -1]], np.zeros(2, np.uint32), present=False)
            passages += self._with_segments_shuffled(index, epoch, drawn) + [nothing] * missing
        query_ids, query_mask = pad([row.query for row in rows], len(rows), query_length, self._pad_id)
        passage_ids, passage_mask = pad(
            [passage.ids for passage in passages], len(passages), stream.passage_length, self._pad_id
        )
        # As wide as the source needs anywhere: a batch's own maximum would be another shape to compile for.
        known = np.stack([row.identity[np.arange(self._most_positives) % row.positives] for row in rows])
        return Batch(
            query_ids,
            query_mask,
            passage_ids,
            passage_mask,
            np.stack([passage.identity for passage in passages]),
            known,
            np.array([passage.present for passage in passages]),
            self._own_group[indices],
            np.array([passage.score for passage in passages], np.float32).reshape(len(rows), -1),
        )

    def _draw_passages(self, index: int, epoch: int, row: Row, members: np.ndarray) -> Iterator[_Passage]:
        """One positive, then the negatives that the row brings; (seed, index, epoch) decide."""
        random = np.random.default_rng((self._seed, index, epoch, 1))  # 1: apart from the shuffles' keys, which have 3
        positive = int(random.integers(row.positives))
        yield _of(row, positive)
        negatives = len(row.passages) - row.positives
        own = random.permutation(negatives)[: self._sizes[index] - 1] + row.positives
        for passage in own:
            yield _of(row, int(passage))
        missing = self._sizes[index] - 1 - len(own)
        unwanted = {tuple(key) for key in row.identity[: row.positives].tolist()}
        unwanted |= {tuple(key) for key in row.identity[own].tolist()}
        seed = int(random.integers(2**32))
        tried = 0
        # One of each row, then a second: positives may be many in few rows.
        while missing and tried < len(members) * self._most_positives:
            tries = np.arange(tried, tried + missing)
            tried += missing
            for other in self._source.rows(members[shuffled(tries % len(members), len(members), seed)]):
                keys = [tuple(key) for key in other.identity[: other.positives].tolist()]
                if candidates := [passage for passage, key in enumerate(keys) if key not in unwanted]:
                    passage = int(random.choice(candidates))
                    unwanted.add(keys[passage])
                    yield _of(other, passage)._replace(score=-np.inf)  # which was for the other's query
                    missing -= 1
        assert missing == 0, "_check_fill has counted enough different positives"

    def _with_segments_shuffled(self, index: int, epoch: int, passages: list[_Passage]) -> list[_Passage]:
        """Long passages, each with the probability `shuffle_segments`, with their thirds in a random order (PAPER §3)."""
        if not self._shuffle_segments:
            return passages
        random = np.random.default_rng((self._seed, index, epoch, 2))
        return [
            # Its identity stays: it answers the same queries.
            passage._replace(ids=segments_shuffled(passage.ids, random))
            if random.random() < self._shuffle_segments and len(passage.ids) >= _LONG
            else passage
            for passage in passages
        ]

    def _check_fill(self, stream: Stream) -> None:
        """A row's positives and its other negatives are all that a fill must differ from."""
        members = stream.members
        missing = self._sizes[members] - 1 - self._source.negatives[members]
        short = members[(missing > 0) & self._fills[members]]
        if not len(short):
            return
        needed = int(self._source.positives[short].max()) + stream.group_size - 1
        found: set[tuple[int, int]] = set()
        for start in range(0, len(members), 64):
            for row in self._source.rows(members[start : start + 64]):
                found |= {tuple(key) for key in row.identity[: row.positives].tolist()}
            if len(found) >= needed:
                return
        raise ValueError(
            f"{len(short)} rows of up to {stream.passage_length} token ids have fewer than {stream.group_size - 1} negatives "
            f"of their own, and the positives of the rows that they make batches with are too few to fill them: {needed} "
            f"different ones are needed, {len(found)} exist. Lower group_size, give the rows negatives, or join length groups."
        )


def prefetch(batches: Any, start_step: int, num_steps: int) -> Iterator[Any]:
    """The batches of steps `start_step` to `num_steps` − 1 in order, a few ahead of the reader on two of Grain's threads."""
    steps = grain.MapDataset.range(start_step, num_steps).map(batches.__getitem__)
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))


def _of(row: Row, passage: int) -> _Passage:
    return _Passage(row.passages[passage], row.identity[passage], float(row.scores[passage]))


def segments_shuffled(ids: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The tokens between `<s>` and `</s>` in three segments of equal length (to a token), in a random order of the six.

    >>> segments_shuffled(np.array([0, 5, 6, 7, 8, 2]), np.random.default_rng(0))
    array([0, 8, 5, 6, 7, 2])
    """
    segments = np.array_split(ids[1:-1], 3)
    return np.concatenate([ids[:1], *(segments[place] for place in random.permutation(3)), ids[-1:]])
