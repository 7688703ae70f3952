"""TPUs that are only described, on a host without one: libtpu compiles programs for them, and nothing runs."""

import functools
import os
from typing import Any

import jax
from jax.sharding import Mesh

from m3jax.sharding import make_mesh

# What libtpu would ask the machine's surroundings for when it is loaded; and two may compile beside each other.
os.environ |= {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5e-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# Nothing runs on a TPU here, nor on another accelerator that the host may have.
jax.config.update("jax_platforms", "cpu")
# The compiler in a hurry takes a third of the time. Memory comes out as in full, 5% less to 7% more, RetroMAE's a third more
# (RESULTS.md); in full with 0.0.
if "JAX_EXEC_TIME_OPTIMIZATION_EFFORT" not in os.environ:
    jax.config.update("jax_exec_time_optimization_effort", -1.0)

MEMORY = {"v5e": 16, "v6e": 32, "v5p": 95}  # GB a device
# Of 8 and of 64 chips.
_SLICES = {"v5e": ("2x4", "8x8"), "v6e": ("2x4", "8x8"), "v5p": ("2x2x2", "4x4x4")}


@functools.cache  # described twice, devices are not the same
def described(chip: str, devices: int, slices: int = 1) -> list[Any]:
    """So many chips of each of so many slices, of 8 or of 64."""
    from jax.experimental import topologies

    name = f"{chip}:{_SLICES[chip][devices > 8]}"
    more = {"num_slices": slices} if slices > 1 else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **more).devices[: devices * slices]


def tpu_mesh(chip: str, devices: int, **sizes: int) -> Mesh:
    """A mesh of so many chips with these sizes of make_mesh; it needs libtpu."""
    return make_mesh(**sizes, devices=described(chip, devices))
