"""Lengths to batches of static shape under a token budget, and token ids to padded arrays; NumPy only.
Which texts belong together for any other reason than length (training's groups, positives, negatives) is not here.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class PlannedBatch(NamedTuple):
    """Texts that are computed together: `rows` int `[≤ row_count]` indexes them; the array is `[row_count, length]`."""

    rows: np.ndarray
    row_count: int
    length: int


def bucket_length(n: int) -> int:
    """The static row length for a text of `n ≥ 1` ids: the smallest bucket that holds it.

    Each doubling holds eight buckets, multiples of 8 or more, so a row is at most 1/8 padding past 64 ids (1/16 on
    average) and 60 lengths, hence at most about 60 compiled shapes, cover 8192. Past 512 buckets are multiples of 128,
    which TPU attention kernels require and which leaves four between 512 and 1024. ValueError for n < 1.

    >>> [bucket_length(n) for n in (3, 130, 600)]
    [8, 144, 640]
    """
    if n < 1:
        raise ValueError(f"a text has at least one token id; a length of {n} came.")
    doubling = 1 << (int(n) - 1).bit_length()
    step = max(8 if n <= 512 else 128, doubling // 16)
    return -(-int(n) // step) * step


def plan_batches(lengths: Sequence[int] | np.ndarray, *, batch_tokens: int, max_rows: int = 1024) -> list[PlannedBatch]:
    """Batches of similar lengths, longest first, that hold every text once and at most `batch_tokens` ids each.

    The shape of a full batch is a function of its bucket alone: `batch_tokens // length` rows (at most `max_rows`),
    rounded down to a multiple of 8 where there are more. A batch closes early only at the end of the texts or, past
    128 ids, before a text that would be half padding; it then has the next power of two of rows, so few shapes exist.
    A text that alone exceeds the budget is a batch of one row. ValueError for a budget, `max_rows` or length below 1.

    >>> [(b.rows.tolist(), b.row_count, b.length) for b in plan_batches([5, 30, 7], batch_tokens=64)]
    [([1, 2], 2, 32), ([0], 1, 8)]
    """
    if batch_tokens < 1 or max_rows < 1:
        raise ValueError(f"batch_tokens and max_rows must be at least 1; {batch_tokens} and {max_rows} came.")
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    descending = np.asarray(lengths, np.int64)[order]
    batches = []
    start = 0
    while start < len(order):
        length = bucket_length(descending[start])
        full = _full_rows(length, batch_tokens, max_rows)
        stop = min(start + full, len(order))
        # Short rows cost little padding, while a shape of its own costs a compilation.
        if length > 128:
            stop = min(stop, int(np.searchsorted(-descending, -(length // 2))))
        count = stop - start
        batches.append(PlannedBatch(order[start:stop], min(full, 1 << (count - 1).bit_length()), length))
        start = stop
    return batches


def _full_rows(length: int, batch_tokens: int, max_rows: int) -> int:
    rows = max(1, min(batch_tokens // length, max_rows))
    return rows if rows < 8 else rows // 8 * 8


def pad(ids: Sequence[np.ndarray], rows: int, length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int32 and mask bool (True = real token), both `[rows, length]`; rows past `len(ids)` are all padding.

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
