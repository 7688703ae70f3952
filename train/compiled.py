"""The training step compiled for each shape of batch, in sub-batches that the devices' memory holds.

Not here: the step itself (step.py), and how a batch is split (sub_batch.py).
"""

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.stages import Compiled

from train.console import say
from train.data.pipeline import Batch
from train.step import TrainState
from train.sub_batch import SubBatches, sub_batches_of

# Of a device's memory; the rest is for what the runtime keeps beside a program, and for pieces too small to use.
_SHARE = 0.92


class CompiledStep:
    """The step as a function of (state, batch), compiled on the first batch of each shape.

    make: the step for a number of sub-batches. row_groups: over how many groups of devices the rows of a batch are split.
    sub_batch_tokens: of a device, 0 for as many as fit.
    """

    def __init__(self, make: Callable[[SubBatches], Any], *, row_groups: int, sub_batch_tokens: int):
        self._make = make
        self._row_groups = row_groups
        self._tokens = sub_batch_tokens
        self._programs: dict[Any, Compiled] = {}

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        shape = tuple(batch.sides.values())
        if shape not in self._programs:
            self._programs[shape], _, _ = compile_step(self._make, state, batch, self._row_groups, self._tokens)
        return self._programs[shape](state, batch)


def compile_step(
    make: Callable[[SubBatches], Any], state: TrainState, batch: Batch, row_groups: int, sub_batch_tokens: int
) -> tuple[Compiled, SubBatches, int]:
    """The program for batches like `batch` (arrays or their shapes), its sub-batches and the bytes of a device that it uses.

    The other arguments are those of CompiledStep.
    """
    (first, (rows, length)), *others = batch.sides.items()
    said = [f"{rows} {first} of {length} tokens", *(f"{rows} {name} of {length}" for name, (rows, length) in others)]
    say(f"compiling for {' and '.join(said)} …")
    program, parts, used = fitting(
        lambda parts: make(parts).lower(state, batch).compile(),
        tokens=sub_batch_tokens,
        limit=_smallest_everywhere(_SHARE * device_memory()),
        **{name: (rows // row_groups, length) for name, (rows, length) in batch.sides.items()},
    )
    longer = [*batch.sides][-1]
    if (count := getattr(parts, longer)) > 1:
        say(f"  {longer} in {count} sub-batches, {used / 1e9:.1f} GB a device")
    return program, parts, used


def fitting(
    compile: Callable[[SubBatches], Compiled],
    *,
    tokens: int,
    limit: float,
    **sides: tuple[int, int],
) -> tuple[Compiled, SubBatches, int]:
    """The program of the fewest sub-batches that uses at most `limit` bytes a device, its sub-batches, and what it uses.

    sides: the fields of SubBatches that a batch has, with a device's rows and their length. tokens: of a sub-batch, taken as
    it is; 0 looks for it. A first program tells what does not depend on the sub-batches (parameters, moments, embeddings of
    the batch) from what does, which gives the next to try, so two or three are compiled. Where the compiler itself refuses a
    program that is larger than the memory (TPU's does), half the tokens are tried. ValueError where one row at a time is still
    too large, or what is given.
    """
    given, tokens = tokens, tokens or max(rows * length for rows, length in sides.values())
    while True:
        parts = SubBatches(**{name: sub_batches_of(tokens, *side) for name, side in sides.items()})
        try:
            program = compile(parts)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            program, takes = None, f"more than its compiler accepts ({str(error).splitlines()[0]})"
        else:
            used = bytes_of(program)
            if given or used <= limit:
                return program, parts, used
            takes = f"{used / 1e9:.1f} GB"
        if given or parts == SubBatches(**{name: rows for name, (rows, _) in sides.items()}):
            at_a_time = f"sub_batch_tokens = {given}" if given else "one row at a time"
            each = " and ".join(f"{rows} {name} × {length}" for name, (rows, length) in sides.items())
            raise ValueError(
                f"a step must fit into a device's memory, {limit / 1e9:.1f} GB of which a run may use, but {at_a_time} "
                f"of {each} a device takes {takes}; "
                f"lower {'it or ' if given else ''}the batch of this length group, set remat='all', or split parameters over "
                "mesh.fsdp"
            )
        if program is None:
            tokens //= 2
            continue
        kept = _analysis(program).argument_size_in_bytes
        ratio = (limit - kept) / (used - kept) if limit > kept else 0.0
        tokens = int(tokens * min(0.5, 0.9 * ratio))


def bytes_of(program: Compiled) -> int:
    """Bytes of a device that a program uses: arguments, results and everything between; what it takes over counts once."""
    used = _analysis(program)
    return used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes + used.temp_size_in_bytes


def _analysis(program: Compiled) -> Any:
    found = program.memory_analysis()
    if found is None:
        raise ValueError(f"{jax.default_backend()} does not say what memory a program takes; give sub_batch_tokens")
    return found


def device_memory() -> int:
    """Bytes of one device's memory: what its runtime says, else this host's memory shared by its devices."""
    device = jax.local_devices()[0]
    stats: dict[str, Any] = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()


def _smallest_everywhere(limit: float) -> float:
    """The smallest of all processes, which must compile one program. Each looks for it by itself: while one process did, those
    that wait could not help it to tune kernels, as GPUs' compilers share that work among processes."""
    return float(np.min(multihost_utils.process_allgather(np.float64(limit)))) if jax.process_count() > 1 else limit
