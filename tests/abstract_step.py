"""A training step's state and batch as shapes with their places on a mesh: what compiling one takes.

Not here: which models and batches (test_collectives.py, tpu/test_train.py).
"""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from m3jax.model import shapes
from m3jax.sharding import BATCH, shardings
from train.data.pipeline import Batch
from train.step import TrainState


def placed(tree, places):
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)


def abstract_state(model, optimizer, mesh):
    params = placed(shapes(model), shardings(shapes(model), mesh))
    moments = jax.eval_shape(optimizer.init, params)
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    return TrainState(params, placed(moments, shardings(moments, mesh)), count)


def abstract_batch(mesh, *, queries, query_length, group, passage_length):
    def rows(*shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, BATCH))

    return Batch(
        rows(queries, query_length, dtype=jnp.int32),
        rows(queries, query_length, dtype=jnp.bool_),
        rows(queries * group, passage_length, dtype=jnp.int32),
        rows(queries * group, passage_length, dtype=jnp.bool_),
        rows(queries * group, 2, dtype=jnp.uint32),
        rows(queries, 1, 2, dtype=jnp.uint32),
        rows(queries * group, dtype=jnp.bool_),
        rows(queries, dtype=jnp.bool_),
        rows(queries, group, dtype=jnp.float32),
    )
