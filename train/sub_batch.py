"""A large batch encoded in sub-batches, one after another, with the exact gradients of the whole; sharding is kept.

Not here: how many sub-batches there are (compiled.py), and what is encoded.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

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


def encode_in(encode: Callable[..., T], params: Any, *sides: tuple[int, tuple[jax.Array, ...]]) -> list[T]:
    """encode(params, *rows) of each side, a pair (sub-batches, rows), whose rows go through in so many equal parts.

    rows: arrays [b, …] of ids, masks and keys, which have no gradient, split over the batch axes of the mesh in context; encode
    gives a pytree of arrays [b, …], each row of them a function of the parameters and the same row. b must divide by the
    sub-batches × the devices of the batch axes. Where no side is split, autodiff keeps what it needs; else what is kept from
    forward to backward are `params`, the results and the rows, and backward each part of every side is encoded again: the
    activations of one part exist at a time. The gradients of all parts of all sides are added up in one place, where autodiff
    would keep a sum for each side and one for all. So encode may close over no array that depends on the parameters, nor is
    this to be differentiated from outside a jit or checkpoint that holds it.

    Row r goes through in part r % sub_batches, so each device takes a part of its own rows in each (a row-major split would
    give all rows of a part to few devices). ValueError for rows of floating point.
    """
    counts, rows = zip(*sides, strict=True)
    _check(rows)
    if max(counts) == 1:
        return [encode(params, *each) for each in rows]
    stacked = _one_by_one(encode, params, [[_split(x, count) for x in each] for count, each in sides])
    return jax.tree.map(_join, stacked)


def sum_in(sub_batches: int, sums: Callable[..., T], params: Any, *rows: jax.Array) -> T:
    """sums(params, *rows), of which each number is a sum over the rows, added up over parts as in `encode_in`."""
    _check(rows)
    if sub_batches == 1:
        return sums(params, *rows)
    (parts,) = _one_by_one(sums, params, [[_split(x, sub_batches) for x in rows]])
    return jax.tree.map(lambda x: x.sum(axis=0), parts)


def _one_by_one(function: Callable[..., T], params: Any, sides: list[list[jax.Array]]) -> list[T]:
    """Of each side, function(params, *part) for the parts along the first axis of its arrays, stacked."""

    def stacked(params: Any, sides: list[list[jax.Array]]) -> list[T]:
        return [jax.lax.map(lambda part: function(params, *part), rows) for rows in sides]

    def forward(params: Any, sides: list[list[jax.Array]]) -> tuple[list[T], Any]:
        return stacked(params, sides), (params, sides)

    def backward(kept: Any, cotangents: list[T]) -> tuple[Any, None]:
        params, sides = kept

        def add(total: Any, one: tuple[list[jax.Array], list[jax.Array]]) -> tuple[Any, None]:
            part, cotangent = one
            _, pull = jax.vjp(lambda params: _inexact(function(params, *part)), params)
            return jax.tree.map(jnp.add, total, *pull(cotangent)), None

        total = jax.tree.map(jnp.zeros_like, params)
        for rows, cotangent in zip(sides, cotangents, strict=True):
            total, _ = jax.lax.scan(add, total, (rows, _inexact(cotangent)))
        return total, None

    of_params = jax.custom_vjp(stacked)
    of_params.defvjp(forward, backward)
    return of_params(params, sides)


def _check(rows: Any) -> None:
    """Whether they are split or not, or a run would be refused on one machine and not on another."""
    if wrong := {str(x.dtype) for x in _inexact(rows)}:
        raise ValueError(
            f"rows have no gradient: they must be whole numbers, bools or keys, got {', '.join(sorted(wrong))}"
        )


def _inexact(tree: Any) -> list[jax.Array]:
    """The leaves that have a gradient."""
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]


def _split(x: jax.Array, count: int) -> jax.Array:
    """[b, …] → [count, b / count, …], without moving a row to another device."""
    return constrain(x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), STACKED)


def _join(x: jax.Array) -> jax.Array:
    """The inverse of `_split`."""
    x = constrain(x, STACKED).swapaxes(0, 1)
    return x.reshape(-1, *x.shape[2:])
