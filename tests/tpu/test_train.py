"""The training step of each stage at 24 × 1024 in bfloat16, compiled for TPUs; nothing runs on a TPU here.

Not here: that the step is right (tests/test_step.py, test_step_loss.py, test_sub_batch.py, test_retromae.py).
"""

import functools
import math
import time
from collections import Counter

import jax
import numpy as np
import pytest

pytest.importorskip("optax", reason="training needs the train extra")

from configs import base
from m3jax import retromae
from m3jax.config import M3Config
from m3jax.losses import PARTS
from m3jax.model import shapes
from tests.collectives import activations, collectives
from tests.tpu.chips import MEMORY
from train import reconstruction
from train.abstract import abstract_batch, abstract_state, abstract_texts
from train.compiled import fitting
from train.data.streams import Shape
from train.flops import reconstruction_flops, step_flops
from train.optimizer import make_optimizer
from train.step import make_step

MODEL = M3Config()
MASK_ID = MODEL.vocab_size - 1
MESHES = {1: {}, 8: {"data": 1, "fsdp": 8}, 64: {"data": 8, "fsdp": 8}}
# Of a sub-batch of a device: one that holds the whole model and its moments has less room for activations.
TOKENS = {1: 8192, 8: 16384, 64: 16384}
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
TEXTS = 16384  # PAPER §3: of stage 1, on 32 devices; of any length
# A batch for 1 and 8 devices has the paper's rows a device; for 64 the paper's whole batch, to the next multiple of 64.
LENGTHS = {"unified": UNIFIED, "dense": DENSE, "retromae": (512, 8192)}
CASES = [
    (stage, chip, devices, length)
    for chip in MEMORY
    for stage, lengths in LENGTHS.items()
    for length in lengths
    for devices in MESHES
]
# One v5e holds the whole model, its moments and its gradient: not with these, which are made for 80 GB. More devices do.
TOO_LARGE = {
    *(("unified", "v5e", 1, length) for length in (4096, 5120, 6144, 7168, 8192)),
    *(("retromae", "v5e", 1, length) for length in (512, 8192)),
}


def rows(stage, devices, length):
    """Of a global batch: its queries or texts."""
    batch, of = {"unified": (UNIFIED[length], 24), "dense": (DENSE[length], 96), "retromae": (TEXTS, 32)}[stage]
    return -(-batch // 64) * 64 if devices == 64 else batch // of * devices


def a_step(stage, devices, length, mesh):
    """Of a stage: its parameters, the rows and the length of the sides of its batch, and sub-batches → the step, compiled."""
    config = base.get_config()
    config.dtype = "bfloat16"
    optimizer = make_optimizer(config)
    b = rows(stage, devices, length)
    if stage == "retromae":
        params = retromae.shapes(MODEL)
        state, batch = abstract_state(params, optimizer, mesh), abstract_texts(b, length, mesh)
        make = functools.partial(reconstruction.make_step, MODEL, MASK_ID)
        sides = {"texts": (b, length)}
    else:
        group, lq = config.group_size if stage == "unified" else 1, min(length, 512)
        if stage == "dense":
            config.functions = ("dense",)
        params = shapes(MODEL)
        state, batch = abstract_state(params, optimizer, mesh), abstract_batch(Shape(b, group, lq, length), 1, mesh)
        make = functools.partial(make_step, MODEL)
        sides = {"queries": (b, lq), "passages": (b * group, length)}
    return params, sides, lambda parts: make(config, optimizer, mesh, state, parts).lower(state, batch).compile()


def flops(stage, sides, parts):
    """Of all devices, with what `remat` of configs/base.py and sub-batches compute again."""
    lengths, again = [np.full(count, length) for count, length in sides.values()], max(parts) > 1
    if stage == "retromae":
        targets = (0.3 + 1) * lengths[0].sum()  # of the encoder, and of the decoder, which is asked for all tokens
        layers = reconstruction_flops(MODEL, lengths[0], 0)
        head = reconstruction_flops(MODEL, lengths[0], targets) - layers
        return layers * (4 + again) / 3 + head * (3 + again) / 3
    functions = ("dense",) if stage == "dense" else PARTS
    return sum(step_flops(MODEL, *lengths, functions=functions, remat=base.get_config().remat, sub_batches=parts))


@pytest.mark.parametrize(("stage", "chip", "devices", "length"), CASES)
def test_a_step_compiles_and_fits(stage, chip, devices, length, tpu_mesh, record):
    mesh = tpu_mesh(chip, devices, **MESHES[devices])
    params, sides, compile = a_step(stage, devices, length, mesh)
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        program, parts, used = fitting(
            compile,
            **{name: (count // devices, length) for name, (count, length) in sides.items()},
            tokens=TOKENS[devices],
            limit=MEMORY[chip] * 1e9,
        )
    seconds, text = time.perf_counter() - start, program.as_text()
    for kernel in ("fwd", "dq", "dkv"):
        assert f"splash_mha_{kernel}_segmented" in text, kernel
    found = collectives(text)
    assert bool(found) == (devices > 1)
    # A device's part of the hidden states, of the side that has less of them.
    of_parts = [count // devices // getattr(parts, name) * length for name, (count, length) in sides.items()]
    # The dense vectors of the whole batch, which are on all devices, and the maxima of colbert's scores, with their gradients.
    # They go with the gradients of parameters, by whose name they go; in tiles of the compiler's.
    of_batch = [count * MODEL.hidden_size for count, _ in sides.values()]
    of_batch += [math.prod(sides["queries"]) * sides["passages"][0]] if stage == "unified" else []
    # Kernels of attention come split into heads too.
    of_heads = (MODEL.num_attention_heads, MODEL.hidden_size // MODEL.num_attention_heads, MODEL.hidden_size)
    parameters = [of_heads, *(x.shape for x in jax.tree.leaves(params))]
    for one in activations(found, parameters, min(of_parts) * MODEL.hidden_size):
        arrays = [x for x in one.arrays if not any(n <= math.prod(x) <= 1.1 * n for n in of_batch)]
        if stage != "retromae" and not one.loops and sum(map(math.prod, arrays)) < min(of_parts) * MODEL.hidden_size:
            continue
        # What fsdp's devices look up in the tables for each other; within the layers nothing.
        assert one.kind == "all-to-all" and one.loops <= (max(parts) > 1), one
        assert sum(map(math.prod, one.arrays)) <= max(of_parts) * MODEL.hidden_size, one
    kinds = Counter(one.kind for one in found)
    longer = [*sides][-1]
    received = sum(one.received * one.times for one in found)
    record(
        f"{stage} step, {longer} in {getattr(parts, longer)} parts, {flops(stage, sides, parts) / devices / 1e12:.0f} TFLOP "
        f"and {received / 1e9:.1f} GB received a device; " + ", ".join(f"{n} {name}" for name, n in kinds.items()),
        chip, devices, ", ".join(f"{count} {name} × {length}" for name, (count, length) in sides.items()), seconds, used / 1e9,
    )  # fmt: skip
    assert (used < MEMORY[chip] * 1e9) == ((stage, chip, devices, length) not in TOO_LARGE)
