"""What the devices of a compiled program send each other, read from the program's text.

Not here: what a program may send (test_collectives.py, tpu/test_train.py).
"""

import functools
import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_CALL = re.compile(r"\b(body|condition|calls|to_apply)=%?([\w.-]+)|\bbranch_computations=\{([^}]*)\}")
_COLLECTIVE = re.compile(
    r" = (.+?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|ragged-all-to-all)(?:-start)?\("
)
_ARRAY = re.compile(r"\b[a-z]+\d*\w*\[([\d,]*)\]")
_SOURCE = re.compile(r'op_name="([^"]*)"')


class Collective(NamedTuple):
    """arrays: the sizes of each array that it gives, on one device. loops: how many of the program's loops it is in.
    source: the names that JAX gave to where it comes from."""

    kind: str
    arrays: tuple[tuple[int, ...], ...]
    loops: int
    source: str


def collectives(text: str) -> list[Collective]:
    """Every collective of a program; of one that begins and ends apart its beginning, which names what goes and what comes."""
    computation, callers, found = "", {}, []
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            computation = head[1]
        for how, called, branches in _CALL.findall(line):
            for name in (called or branches).split(", "):
                callers.setdefault(name.lstrip("%"), set()).add((computation, how == "body"))
        if sent := _COLLECTIVE.search(line):
            arrays = tuple(tuple(map(int, filter(None, sizes.split(",")))) for sizes in _ARRAY.findall(sent[1]))
            source = _SOURCE.search(line)
            found.append((computation, sent[2], arrays, source[1] if source else ""))

    @functools.cache
    def loops(name: str) -> int:
        return max((loops(caller) + in_loop for caller, in_loop in callers.get(name, ())), default=0)

    return [Collective(kind, arrays, loops(name), source) for name, kind, arrays, source in found]


def activations(found: Iterable[Collective], parameters: Sequence[tuple[int, ...]], least: int) -> list[Collective]:
    """Those that send `least` numbers or more of what is no part of a parameter: hidden states, where `least` is a device's
    rows of a sub-batch × length × width. What losses need of the whole batch is left out, by its name "scores" (train/step.py).

    Of a program without a tensor axis, whose devices share the hidden states of a row.
    """
    return [
        one
        for one in found
        if "scores" not in one.source and sum(math.prod(x) for x in one.arrays if not _of(x, parameters)) >= least
    ]


def gradients(found: Iterable[Collective], parameters: Sequence[tuple[int, ...]]) -> dict[int, int]:
    """How many numbers of parts of parameters are reduced over devices, by the loops that they are in."""
    numbers: dict[int, int] = {}
    for one in found:
        if one.kind in ("all-reduce", "reduce-scatter") and "scores" not in one.source:
            sent = sum(math.prod(x) for x in one.arrays if x and _of(x, parameters))
            numbers[one.loops] = numbers.get(one.loops, 0) + sent
    return {loops: sent for loops, sent in numbers.items() if sent}


def _of(array: tuple[int, ...], parameters: Sequence[tuple[int, ...]]) -> bool:
    """Whether it is an equal part of a parameter; axes of one element count for nothing."""

    def large(sizes: tuple[int, ...]) -> list[int]:
        return [size for size in sizes if size > 1]

    return any(
        len(large(array)) == len(large(whole))
        and all(size % part == 0 for size, part in zip(large(whole), large(array), strict=True))
        for whole in parameters
    )
