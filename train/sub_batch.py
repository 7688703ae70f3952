"""A large batch encoded in sub-batches, one after another, with the exact gradients of the whole; sharding is kept.

Not here: how many sub-batches there are (compiled.py), and what is encoded.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax

from m3jax.sharding import STACKED, constrain

T = TypeVar("T")


class SubBatches(NamedTuple):
    """In how many parts the sides of a batch are encoded: its queries and its passages, or in stage 1 its texts."""

    queries: int = 1
    passages: int = 1
    texts: int = 1


ONE_PASS = SubBatches()


def sub_batches_of(tokens: int, rows: int, length: int) -> int:
    """The smallest number of equal parts of a device's `rows` of `length` tokens that hold at most `tokens` each.

    One row is the smallest part, whatever its length.

    >>> sub_batches_of(1024, rows=12, length=256), sub_batches_of(100, rows=12, length=256)
    (3, 12)
    """
    return next(n for n in range(1, rows + 1) if rows % n == 0 and (n == rows or rows // n * length <= tokens))


def encode_in(sub_batches: int, encode: Callable[..., T], *rows: jax.Array) -> T:
    """encode(*rows), the rows going through in `sub_batches` equal parts; backward, each part is encoded again.

    rows: arrays [b, …], split over the batch axes of the mesh in context; encode gives a pytree of arrays [b, …], each row of
    them a function of the same row of its arguments. What is kept from forward to backward are these results and `rows`: the
    activations of one part exist at a time. b must divide by sub_batches × the devices of the batch axes.

    Row r goes through in part r % sub_batches, so each device takes a part of its own rows in each (a row-major split would
    give all rows of a part to few devices).
    """
    if sub_batches == 1:
        return encode(*rows)
    parts = jax.lax.map(
        lambda part: jax.checkpoint(encode, prevent_cse=False)(*part), tuple(_split(x, sub_batches) for x in rows)
    )
    return jax.tree.map(_join, parts)


def sum_in(sub_batches: int, sums: Callable[..., T], *rows: jax.Array) -> T:
    """sums(*rows), of which each number is a sum over the rows, added up over `sub_batches` equal parts as in `encode_in`."""
    if sub_batches == 1:
        return sums(*rows)
    parts = jax.lax.map(
        lambda part: jax.checkpoint(sums, prevent_cse=False)(*part), tuple(_split(x, sub_batches) for x in rows)
    )
    return jax.tree.map(lambda x: x.sum(axis=0), parts)


def _split(x: jax.Array, count: int) -> jax.Array:
    """[b, …] → [count, b / count, …], without moving a row to another device."""
    return constrain(x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), STACKED)


def _join(x: jax.Array) -> jax.Array:
    """The inverse of `_split`."""
    x = constrain(x, STACKED).swapaxes(0, 1)
    return x.reshape(-1, *x.shape[2:])
