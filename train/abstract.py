"""A training step's state and batch as shapes with their places on a mesh: what compiling one takes, and no array.

Not here: compiling (compiled.py), and which batches a run has (plan.py).
"""

from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from m3jax.model import Params
from m3jax.sharding import BATCH, shardings
from train.data.pipeline import Batch
from train.data.streams import Shape
from train.data.texts import TextBatch
from train.step import TrainState


def abstract_state(params: Params, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """What `make_state` makes of parameters, which may be shapes themselves."""

    def placed(tree: Any) -> Any:
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, shardings(tree, mesh)
        )

    whole = NamedSharding(mesh, PartitionSpec())
    step: Any = jax.ShapeDtypeStruct((), np.int32, sharding=whole)
    return TrainState(placed(params), placed(jax.eval_shape(optimizer.init, params)), step)


def abstract_batch(shape: Shape, positives: int, mesh: Mesh) -> Batch:
    """A batch of this shape, of rows with up to so many positives."""
    rows, group, query_length, passage_length = shape
    return Batch(
        query_ids=_rows(mesh, np.int32, rows, query_length),
        query_mask=_rows(mesh, bool, rows, query_length),
        passage_ids=_rows(mesh, np.int32, rows * group, passage_length),
        passage_mask=_rows(mesh, bool, rows * group, passage_length),
        passage_identity=_rows(mesh, np.uint32, rows * group, 2),
        known_identity=_rows(mesh, np.uint32, rows, positives, 2),
        passage_present=_rows(mesh, bool, rows * group),
        own_group=_rows(mesh, bool, rows),
        teacher_scores=_rows(mesh, np.float32, rows, group),
    )


def abstract_texts(rows: int, length: int, mesh: Mesh) -> TextBatch:
    """A batch of stage 1."""
    return TextBatch(_rows(mesh, np.int32, rows, length), _rows(mesh, bool, rows, length))


def _rows(mesh: Mesh, dtype: Any, *sizes: int) -> Any:
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, BATCH))
