"""Skips without libtpu, and the table of what was compiled, printed at the end (RESULTS.md has it)."""

import importlib.util

import pytest

from tests.tpu import chips

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
    """chips.tpu_mesh, where libtpu is installed."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, TPU's compiler, is not installed: pip install -e '.[test,tpu]'")
    return chips.tpu_mesh


def pytest_terminal_summary(terminalreporter):
    if _TABLE:
        terminalreporter.section("compiled for TPU; run on TPU: not measured")
        for row in (_HEAD, ("---",) * len(_HEAD), *_TABLE):
            cells = (f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row)
            terminalreporter.write_line(f"| {' | '.join(cells)} |")
