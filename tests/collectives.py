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
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CONDITION = re.compile(r"condition=%?([\w.-]+)")
_BOUND = re.compile(r" = [su]32\[\]\S* constant\((\d+)\)")
_BYTES = {"bf16": 2, "f16": 2, "u16": 2, "s16": 2, "pred": 1, "s8": 1, "u8": 1}  # of a number; of other types 4
_SOURCE = re.compile(r'op_name="([^"]*)"')
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.-]+) = [^%]*[ )]([a-z-]+)\(([^)]*)\)")
_FUSED = re.compile(r"\bcalls=%?([\w.-]+)")


class Collective(NamedTuple):
    """arrays: the sizes of each array that it gives, on one device. loops: how many of the program's loops it is in.
    source: the name that JAX gave to where it comes from, else those of what it sends: TPU's compiler makes of some
    all-gathers all-reduces of zeros and a part, without a name. received: bytes that a device receives each time, its own part
    among them; an all-reduce counts twice, as a reduce-scatter and an all-gather. times: how often it runs in a step."""

    kind: str
    arrays: tuple[tuple[int, ...], ...]
    loops: int
    source: str
    received: int
    times: int


def collectives(text: str) -> list[Collective]:
    """Every collective of a program; of one that begins and ends apart its beginning, which names what goes and what comes."""
    computation, callers, found, bounds = "", {}, [], {}
    names: dict[str, dict[str, None]] = {}  # of an instruction, or of all in a computation, in their order
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            computation = head[1]
        if bound := _BOUND.search(line):
            bounds.setdefault(computation, set()).add(int(bound[1]))
        condition = _CONDITION.search(line)
        for how, called, branches in _CALL.findall(line):
            for name in (called or branches).split(", "):
                within = condition[1] if condition and how == "body" else None
                callers.setdefault(name.lstrip("%"), set()).add((computation, within))
        if instruction := _INSTRUCTION.match(line):
            name, kind, operands = instruction.groups()
            own = _SOURCE.findall(line) if kind != "constant" else []
            sent = [*re.findall(r"%([\w.-]+)", operands), *_FUSED.findall(line)] if kind != "constant" else []
            names[name] = dict.fromkeys(own or (x for one in sent for x in names.get(one, ())))
            names.setdefault(computation, {}).update(names[name])
        if sent := _COLLECTIVE.search(line):
            named = _ARRAY.findall(sent[1])
            arrays = tuple(tuple(map(int, filter(None, sizes.split(",")))) for _, sizes in named)
            source = "; ".join(names[instruction[1]]) if instruction else ""
            comes = [(kind, size) for (kind, _), size in zip(named, arrays, strict=True) if size]
            if f"{sent[2]}-start(" in line and sent[2] != "all-reduce":
                comes = comes[len(comes) // 2 :]
            of_numbers = sum(_BYTES.get(kind, 4) * math.prod(size) for kind, size in comes)
            twice = sent[2] == "all-reduce" and "all-reduce-scatter" not in computation
            found.append((computation, sent[2], arrays, source, of_numbers * (1 + twice)))

    @functools.cache
    def loops(name: str) -> tuple[int, int]:
        """In how many loops a computation is, and how often it runs: a loop counts from 0 to its condition's one number."""
        within = [(0, 1)]
        for caller, condition in callers.get(name, ()):
            count, times = loops(caller)
            if condition:
                (bound,) = bounds[condition]
                count, times = count + 1, times * bound
            within.append((count, times))
        return max(within)

    return [
        Collective(kind, arrays, loops(name)[0], source, received, loops(name)[1])
        for name, kind, arrays, source, received in found
    ]


def activations(found: Iterable[Collective], parameters: Sequence[tuple[int, ...]], least: int) -> list[Collective]:
    """Those that send `least` numbers or more of what is no part of a parameter, with these arrays alone: hidden states, where
    `least` is a device's rows of a sub-batch × length × width. What losses need of the whole batch is left out, by its name
    "scores" (train/step.py).

    Of a program without a tensor axis, whose devices share the hidden states of a row.
    """
    others = (
        one._replace(arrays=tuple(x for x in one.arrays if not _of(x, parameters)))
        for one in found
        if "scores" not in one.source
    )
    return [one for one in others if sum(map(math.prod, one.arrays)) >= least]


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
