"""Lengths to batches of static shape under a token budget, and token ids to arrays; NumPy only.
Which texts belong together for any other reason than length (training's groups, positives, negatives) is not here.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int


def bucket_length(n: int, step: int = 8) -> int:
    """The static row length for a text of `n ≥ 1` ids: the smallest bucket that holds it.

    Buckets are multiples of `step`, at most sixteen in each doubling, so past 16 · step less than 1/17 of a row is padding
    (1/48 on average), and few shapes are compiled: up to 8192, 112 with step 8, 48 with step 128. ValueError for n or step
    below 1.

    >>> [bucket_length(n) for n in (3, 130, 600)], bucket_length(600, step=128)
    ([8, 136, 608], 640)
    """
    if n < 1 or step < 1:
        raise ValueError(f"a text and a step have at least one token id; a length of {n} and a step of {step} came.")
    step *= max(1, (1 << (int(n) - 1).bit_length()) // (32 * step))
    return -(-int(n) // step) * step


class Packing(NamedTuple):
    """Texts that are computed together, several in a row: text `texts[i]` stands in row `rows[i]` from column `starts[i]`."""

    texts: Int[np.ndarray, " n"]
    rows: Int[np.ndarray, " n"]
    starts: Int[np.ndarray, " n"]
    shape: tuple[int, int]


def pack(
    lengths: Sequence[int] | Int[np.ndarray, " n"],
    *,
    batch_tokens: int,
    row_length: int = 1,
    step: int = 8,
    longer_rows: Sequence[int] = (),
    row_multiple: int = 1,
) -> Iterator[Packing]:
    """Batches of full rows, longest texts first, that hold every text once and at most `batch_tokens` ids each.

    A batch's rows are as long as its longest text needs (`bucket_length` in `step`s), but at least `row_length`, or what all
    texts that are left need together, so that one short query is computed alone. For a text of more, rows have one of the
    lengths `longer_rows` where these are given, that which costs the least for what it holds: few shapes are compiled. Each
    row takes the longest text that is left, then of the others always the longest that still fits (best-fit decreasing), so
    that texts of like length meet and short ones fill what is left. Its number of rows is a multiple of `row_multiple` (the
    devices that rows are split over): of the full batch `batch_tokens // length`, and at the end of the texts one of few. No
    row is longer than its longest text needs where that would exceed the budget; `row_multiple` rows of what it needs are
    computed whatever the budget is. ValueError for a number below 1.

    >>> [(p.texts.tolist(), p.starts.tolist(), p.shape) for p in pack([5, 30, 9, 26], batch_tokens=64)]
    [([1, 3, 0], [0, 0, 26], (2, 32)), ([2], [0], (1, 16))]
    """
    if min(batch_tokens, row_length, step, row_multiple, *longer_rows, *lengths, 1) < 1:
        raise ValueError(
            "batch_tokens, row_length, step, row_multiple, longer_rows and every length must be at least 1; "
            f"{batch_tokens}, {row_length}, {step}, {row_multiple}, {list(longer_rows)} and {min(lengths, default=1)} came."
        )
    count = len(lengths)
    # A number a text, which sorts as its length does, and of like length the first text last.
    left = sorted(int(length) * count + count - 1 - text for text, length in enumerate(lengths))
    while left:
        longest = left[-1] // count
        shared = min(row_length, sum(text // count for text in left))
        rows_of = longer_rows if longest > row_length else [bucket_length(max(longest, shared), step)]
        # What no text needs may not take more than the budget.
        rows_of = [n for n in rows_of if longest <= n <= batch_tokens // row_multiple] or [bucket_length(longest, step)]
        batches = [_fill(left, count, length, batch_tokens, row_multiple) for length in rows_of]
        rows, shape, left = min(batches, key=lambda batch: _cost(batch, count))
        sizes = [[text // count for text in row] for row in rows]
        yield Packing(
            np.array([count - 1 - text % count for row in rows for text in row]),
            np.repeat(np.arange(len(rows)), [len(row) for row in rows]),
            np.array([start for row in sizes for start in accumulate(row[:-1], initial=0)]),
            shape,
        )


class _Filled(NamedTuple):
    """Rows of texts, the shape of their batch, and the texts that are left, sorted; a text is a number as in `pack`."""

    rows: list[list[int]]
    shape: tuple[int, int]
    left: list[int]


def _fill(texts: list[int], count: int, length: int, batch_tokens: int, row_multiple: int) -> _Filled:
    """A batch of rows of a length."""
    full = max(1, batch_tokens // (length * row_multiple))
    left, rows = texts.copy(), []
    while left and len(rows) < full * row_multiple:
        row, room = [], length
        while at := bisect_left(left, (room + 1) * count):  # so many fit
            row.append(left.pop(at - 1))
            room -= row[-1] // count
        rows.append(row)
    groups = -(-len(rows) // row_multiple)
    used = groups if groups == full else _few(groups)
    for row in rows[used * row_multiple :]:
        left += row
    return _Filled(rows[: used * row_multiple], (used * row_multiple, length), sorted(left))


def _few(groups: int) -> int:
    """The next lower of two numbers a doubling: partial batches come in few shapes, and what is over makes another."""
    step = max(1, (1 << (groups.bit_length() - 1)) // 2)
    return groups // step * step


def _cost(batch: _Filled, count: int) -> float:
    """What a token costs, padding included, and in part the attention, which goes over whole rows."""
    rows, length = batch.shape
    return rows * length * (1 + length / _ATTENTION) / sum(text // count for row in batch.rows for text in row)


_ATTENTION = 3 * 6144


class PackedIds(NamedTuple):
    """The arrays of a batch of packed rows, and which text each token belongs to.

    ids, positions  int32 [b, l]     positions restart in each text; padding has the pad id
    segments        int32 [b, l]     1, 2, … for the texts of a row, 0 for padding
    slots           int32 [b, k, m]  columns of the CLS tokens of the k-th text of a row, -1 where there is none
    order           int64 [n]        where text i of the packing stands in slots: row · k + place in the row
    """

    ids: Int[np.ndarray, "b l"]
    positions: Int[np.ndarray, "b l"]
    segments: Int[np.ndarray, "b l"]
    slots: Int[np.ndarray, "b k m"]
    order: Int[np.ndarray, " n"]


def arrange(packing: Packing, texts: Sequence[Int[np.ndarray, " _"]], pad_id: int, cls_every: int = 0) -> PackedIds:
    """Token ids of `packing`'s texts, in its order, as the arrays of its shape.

    cls_every: the distance of the CLS tokens in a text, the first of which opens it (MCLS, PAPER §5); 0 is that one only.
    """
    shape = packing.shape
    lengths = np.array([len(text) for text in texts])
    # The place of every token in the flattened batch.
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    places = np.repeat(packing.rows * shape[1] + packing.starts, lengths) + within
    flat = np.concatenate(texts)
    # A text is the n-th of its row; texts of a row follow each other in a packing.
    nth = np.arange(len(lengths)) - np.searchsorted(packing.rows, packing.rows)
    ids = np.full(shape[0] * shape[1], pad_id, np.int32)
    positions, segments = ids.copy(), np.zeros_like(ids)
    ids[places] = flat
    segments[places] = np.repeat(nth + 1, lengths)
    # pad_id + the number of ids that are not pad_id, up to and including this one, counted within the text (PAPER §1).
    real = flat != pad_id
    counted = np.cumsum(real)
    before = np.repeat(np.concatenate([[0], counted])[np.cumsum(lengths) - lengths], lengths)
    positions[places] = (counted - before) * real + pad_id
    slots, order = _slots(packing, nth, lengths, cls_every)
    return PackedIds(ids.reshape(shape), positions.reshape(shape), segments.reshape(shape), slots, order)


def _slots(
    packing: Packing, nth: Int[np.ndarray, " n"], lengths: Int[np.ndarray, " n"], cls_every: int
) -> tuple[Int[np.ndarray, "b k m"], Int[np.ndarray, " n"]]:
    # The last token is EOS: 1 + 256 content + EOS is one run, one token more begins the second.
    counts = np.maximum(-(-(lengths - 1) // cls_every), 1) if cls_every else np.ones_like(lengths)
    widths = [1 << (int(values.max(initial=1)) - 1).bit_length() for values in (nth + 1, counts)]
    slots = np.full((packing.shape[0], *widths), -1, np.int32)
    slot = np.arange(widths[1])
    slots[packing.rows, nth] = np.where(slot < counts[:, None], packing.starts[:, None] + slot * cls_every, -1)
    return slots, packing.rows * widths[0] + nth


def pad(
    ids: Sequence[Int[np.ndarray, " _"]], rows: int, length: int, pad_id: int
) -> tuple[Int[np.ndarray, "b l"], Bool[np.ndarray, "b l"]]:
    """Token ids int32 and mask bool (True = real token), one text a row; rows past `len(ids)` are all padding.

    ValueError for more texts than rows or a text longer than `length`: nothing is cut here.

    >>> pad([np.array([0, 2])], rows=1, length=3, pad_id=1)
    (array([[0, 2, 1]], dtype=int32), array([[ True, True, False]]))
    """
    if len(ids) > rows:
        raise ValueError(f"{len(ids)} texts do not fit into {rows} rows.")
    lengths = np.zeros(rows, np.int64)
    lengths[: len(ids)] = [len(text) for text in ids]
    if rows and lengths.max() > length:
        raise ValueError(f"texts must have at most {length} ids here; text {lengths.argmax()} has {lengths.max()}.")
    mask = np.arange(length) < lengths[:, None]
    padded = np.full((rows, length), pad_id, np.int32)
    if len(ids):
        padded[mask] = np.concatenate(ids)
    return padded, mask
