"""A run on several processes, each with devices of its own: joining them, what only the first does, and their rows of a batch.

Not here: anything that the mathematics would have to know; there a batch is one array, wherever its rows lie.
"""

import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from m3jax.sharding import BATCH

T = TypeVar("T")


def join(distributed: str) -> None:
    """Join the processes of a run, before any device is used (configs/base.py, `distributed`); ValueError where it cannot."""
    if not distributed:
        return
    try:
        if distributed == "auto":
            jax.distributed.initialize()
        else:
            address, count, index = distributed.split(",")
            jax.distributed.initialize(address, int(count), int(index))
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"distributed is '', 'auto' or 'HOST:PORT,COUNT,INDEX', got {distributed!r}, with which the processes did not "
            f"meet: {error}"
        ) from error


def is_first() -> bool:
    """Whether this process is the one that speaks and writes."""
    return jax.process_index() == 0


def log_file() -> str:
    """The name of the file for what libraries say, one a process."""
    return "log.txt" if is_first() else f"log-{jax.process_index()}.txt"


def agreed(value: bool) -> bool:
    """What the first process found, on all: those that decide by files or time must go one way."""
    return bool(multihost_utils.broadcast_one_to_all(np.bool_(value))) if jax.process_count() > 1 else value


def first_then_others(run: Callable[[], T], what: str) -> T:
    """run() on the first process, then, when that is done, on the others: they find what it made.

    The others say that they wait for it to `what`, after some seconds and every minute. Where it fails, so do they: ValueError
    with its message, as else they would wait for what never comes.
    """
    if jax.process_count() == 1:
        return run()
    # By the coordinator and not by devices, whose collectives on CPU give up after 30 seconds.
    from orbax.checkpoint import multihost

    shared, key = multihost.get_jax_distributed_client(), f"m3jax/first_then_others/{next(_TURNS)}"
    if is_first():
        try:
            result = run()
        except BaseException as error:
            shared.key_value_set(key, _FAILED + (str(error) or repr(error)))
            raise
        shared.key_value_set(key, "done")
        return result
    waited, turn = 0, _FIRST_SAID
    while True:
        try:
            answer = shared.blocking_key_value_get(key, turn * 1000)
            break
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            waited, turn = waited + turn, 60
            print(f"process {jax.process_index()} waits for process 0 to {what}, {waited} s so far", flush=True)
    if answer.startswith(_FAILED):
        raise ValueError(answer.removeprefix(_FAILED))
    return run()


# Each process counts its own turns, and all take the same ones.
_TURNS = itertools.count()
_FAILED = "failed: "
_FIRST_SAID = 5  # seconds


def on_host(tree: Any) -> Any:
    """A tree of arrays with all their values in this process; one process's arrays stay what they are."""
    return multihost_utils.process_allgather(tree, tiled=True) if jax.process_count() > 1 else tree


def rows_held(mesh: Mesh) -> tuple[list[int], int]:
    """Which of the equal parts of a batch, one for each group of devices that shares rows, lie in this process, of how many.

    They need not follow each other: a mesh is laid out for its network.
    """
    groups = mesh.devices.reshape(mesh.shape["data"] * mesh.shape["fsdp"], -1)
    held = [any(device.process_index == jax.process_index() for device in group) for group in groups]
    return np.flatnonzero(held).tolist(), len(groups)


def placed(batch: Any, mesh: Mesh) -> Any:
    """A batch of the rows that this process holds (`rows_held`, in that order) as global arrays, split over the mesh."""
    held, parts = rows_held(mesh)
    rows = NamedSharding(mesh, BATCH)

    def place(x: np.ndarray) -> jax.Array:
        size = len(x) // len(held)

        def part(index: Any) -> np.ndarray:
            first = int(np.searchsorted(held, (index[0].start or 0) // size)) * size
            return x[first : first + size]

        return jax.make_array_from_callback((size * parts, *x.shape[1:]), rows, part)

    return jax.tree.map(place, batch)
