"""libtpu's compiler on a host without a TPU, and the table of what it compiled, printed at the end (RESULTS.md has it)."""

import functools
import importlib.util
import os

import jax
import pytest
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

# Of 8 and of 64 chips.
_SLICES = {"v5e": ("2x4", "8x8"), "v6e": ("2x4", "8x8"), "v5p": ("2x2x2", "4x4x4")}

_TABLE: list[tuple[object, ...]] = []
_HEAD = ("program", "chip", "devices", "rows × length", "compile, s", "memory a device, GB")


@pytest.fixture
def record():
    """Adds a line to the table: program, chip, devices, shape, seconds, gigabytes."""

    def add(*cells):
        _TABLE.append(cells)
        print(*cells)  # a run takes long: `-s` shows what there is

    return add


@pytest.fixture(scope="session")
def tpu_mesh():
    """(chip, devices, …sizes of make_mesh) → a mesh of TPUs that are only described: programs for it compile and do not run."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, TPU's compiler, is not installed: pip install -e '.[test,tpu]'")
    from jax.experimental import topologies

    @functools.cache  # described twice, devices are not the same
    def described(chip: str, slice: str):
        return topologies.get_topology_desc(platform="tpu", topology_name=f"{chip}:{slice}").devices

    def mesh(chip: str, devices: int, **sizes: int) -> Mesh:
        slice = _SLICES[chip][devices > 8]
        return make_mesh(**sizes, devices=described(chip, slice)[:devices])

    return mesh


def pytest_terminal_summary(terminalreporter):
    if _TABLE:
        terminalreporter.section("compiled for TPU; run on TPU: not measured")
        for row in (_HEAD, ("---",) * len(_HEAD), *_TABLE):
            cells = (f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row)
            terminalreporter.write_line(f"| {' | '.join(cells)} |")
