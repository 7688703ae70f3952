"""The unified and the dense training step at 24 × 1024 in bfloat16, compiled for TPUs; nothing runs on a TPU here.

Not here: that the step is right (tests/test_step.py, test_sub_batch.py).
"""

import math
import time
from collections import Counter

import jax
import pytest

pytest.importorskip("optax", reason="training needs the train extra")

from configs import base
from m3jax.config import M3Config
from m3jax.model import shapes
from tests.collectives import activations, collectives
from train.abstract import abstract_batch, abstract_state
from train.compiled import bytes_of, fitting
from train.data.streams import Shape
from train.optimizer import make_optimizer
from train.step import make_step

MODEL = M3Config()
PARAMETERS = [x.shape for x in jax.tree.leaves(shapes(MODEL))]
MEMORY = {"v5e": 16, "v6e": 32, "v5p": 95}  # GB a device
MESHES = {1: {}, 8: {"data": 1, "fsdp": 8}, 64: {"data": 8, "fsdp": 8}}
# PAPER §4: longest text → global batch of stage 3 (with groups of 8) and of stage 2 (pairs), on 24 and 96 devices. Rows are
# multiples of 128 tokens, as TPU's attention takes them.
UNIFIED = {512: 1152, 1024: 768, 2048: 480, 3072: 432, 4096: 336, 5120: 336, 6144: 288, 7168: 240, 8192: 192}
DENSE = {
    512: 67200,
    1024: 54720,
    2048: 37248,
    3072: 27648,
    4096: 21504,
    5120: 17280,
    6144: 15072,
    7168: 12288,
    8192: 9984,
}
# A batch for 1 and 8 devices has the paper's rows a device; for 64 the paper's whole batch, to the next multiple of 64.
CASES = [
    *((stage, chip, devices, 512) for stage in ("unified", "dense") for chip in MEMORY for devices in MESHES),
    *((stage, chip, devices, 8192) for stage in ("unified", "dense") for chip in MEMORY for devices in MESHES),
    *(("unified", "v5e", 8, length) for length in UNIFIED if length not in (512, 8192)),
]


def queries(stage, devices, length):
    batch, of = (UNIFIED[length], 24) if stage == "unified" else (DENSE[length], 96)
    return -(-batch // 64) * 64 if devices == 64 else batch // of * devices


@pytest.mark.parametrize(("stage", "chip", "devices", "length"), CASES)
def test_a_step_compiles_and_fits(stage, chip, devices, length, tpu_mesh, record):
    config = base.get_config()
    config.dtype = "bfloat16"
    group = config.group_size if stage == "unified" else 1
    if stage == "dense":
        config.functions = ("dense",)
    mesh, optimizer = tpu_mesh(chip, devices, **MESHES[devices]), make_optimizer(config)
    state = abstract_state(shapes(MODEL), optimizer, mesh)
    b, lq = queries(stage, devices, length), min(length, 512)
    batch = abstract_batch(Shape(b, group, lq, length), 1, mesh)
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        program, parts, used = fitting(
            lambda parts: make_step(MODEL, config, optimizer, mesh, state, parts).lower(state, batch).compile(),
            queries=(b // devices, lq),
            passages=(b * group // devices, length),
            tokens=16384,
            limit=MEMORY[chip] * 1e9,
        )
    seconds, text = time.perf_counter() - start, program.as_text()
    for kernel in ("fwd", "dq", "dkv"):
        assert f"splash_mha_{kernel}_segmented" in text, kernel
    found = collectives(text)
    assert bool(found) == (devices > 1)
    # A device's part of the hidden states, of queries or of passages, whichever is less.
    rows_of_parts = (b // devices // parts.queries * lq, b * group // devices // parts.passages * length)
    for one in activations(found, PARAMETERS, min(rows_of_parts) * MODEL.hidden_size):
        # What fsdp's devices look up in the tables for each other; within the layers nothing.
        assert one.kind == "all-to-all" and one.loops <= (max(parts) > 1), one
        assert sum(map(math.prod, one.arrays)) <= max(rows_of_parts) * MODEL.hidden_size, one
    kinds = Counter(one.kind for one in found)
    record(
        f"{stage} step, passages in {parts.passages} parts; " + ", ".join(f"{n} {name}" for name, n in kinds.items()),
        chip, devices, f"{b} queries × {lq}, {b * group} passages × {length}", seconds, used / 1e9,
    )  # fmt: skip
    assert bytes_of(program) / 1e9 < MEMORY[chip]
