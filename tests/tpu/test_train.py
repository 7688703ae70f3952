"""The unified training step of two layers of 1024 in bfloat16, compiled for eight TPUs; nothing runs on a TPU here.

Not here: all 24 layers (the step unrolls them, which takes libtpu more than five minutes), other length groups and meshes,
sub-batches, and a check of the collectives.
"""

import time

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

pytest.importorskip("optax", reason="training needs the train extra")

from configs import base
from m3jax.config import M3Config
from m3jax.model import shapes
from m3jax.sharding import BATCH, shardings
from train.data.pipeline import Batch
from train.optimizer import make_optimizer
from train.step import TrainState, make_step

MODEL = M3Config(num_hidden_layers=2)
MEMORY = {"v5e": 16, "v6e": 32}  # GB a device
ROWS, GROUP, LENGTH, POSITIVES = 8, 8, 512, 1


def placed(tree, places):
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)


@pytest.mark.parametrize("chip", MEMORY)
def test_a_step_compiles_with_the_kernels_forward_and_backward(chip, tpu_mesh, record):
    config = base.get_config()
    config.dtype = "bfloat16"
    mesh, optimizer = tpu_mesh(chip, 8, data=1, fsdp=8), make_optimizer(config)
    params = placed(shapes(MODEL), shardings(shapes(MODEL), mesh))
    moments = jax.eval_shape(optimizer.init, params)
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    state = TrainState(params, placed(moments, shardings(moments, mesh)), count)

    def rows(*shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, BATCH))

    batch = Batch(
        rows(ROWS, LENGTH, dtype=jnp.int32),
        rows(ROWS, LENGTH, dtype=jnp.bool_),
        rows(ROWS * GROUP, LENGTH, dtype=jnp.int32),
        rows(ROWS * GROUP, LENGTH, dtype=jnp.bool_),
        rows(ROWS * GROUP, 2, dtype=jnp.uint32),
        rows(ROWS, POSITIVES, 2, dtype=jnp.uint32),
        rows(ROWS * GROUP, dtype=jnp.bool_),
        rows(ROWS, dtype=jnp.bool_),
        rows(ROWS, GROUP, dtype=jnp.float32),
    )
    step = make_step(MODEL, config, optimizer, mesh, state)  # makes its PRNG key, which a mesh without devices cannot
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        program = step.lower(state, batch).compile()
    seconds, text = time.perf_counter() - start, program.as_text()
    for kernel in ("fwd", "dq", "dkv"):
        assert f"splash_mha_{kernel}_segmented" in text, kernel
    used = program.memory_analysis()
    # The state is donated: what comes out lies where it lay.
    memory = (
        used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes + used.temp_size_in_bytes
    )
    record(
        "unified step, 2 layers", chip, 8, f"{ROWS} queries, {ROWS * GROUP} passages × {LENGTH}", seconds, memory / 1e9
    )
    assert memory / 1e9 < MEMORY[chip]
