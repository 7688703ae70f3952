"""Batches of packed texts through encoder and heads, without gradients: one compiled layer runs for all of them.

Not here: texts and results (encoding.py, collected.py), the model as one pure function (model.apply).
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from m3jax.batching import PackedIds
from m3jax.config import M3Config
from m3jax.heads import Heads, packed_dense
from m3jax.model import Params
from m3jax.sharding import AXES, BATCH, make_mesh
from m3jax.xlm_roberta import Embeddings, Layer


class Asked(NamedTuple):
    """What to compute of each text; width cuts dense and colbert vectors, None is their own."""

    dense: bool
    sparse: bool
    colbert: bool
    width: int | None = None


class Results(NamedTuple):
    """What was asked for, None elsewhere: unit vectors by slot, weights and unit vectors by token."""

    dense: Float[Array, "b k w"] | None
    token_weights: Float[Array, "b l"] | None
    colbert: Float[Array, "b l c"] | None


def forward(config: M3Config, params: Params, batch: PackedIds, asked: Asked) -> Results:
    """The representations of a batch, on the devices of the parameters; rows are split over a mesh's batch axes.

    It is called outside of `jit`: embeddings, layer and heads are compiled apart, and the one layer runs for all, which
    compiles a model of 24 layers in the time of one, so that batches may come in many shapes.
    """
    mesh = mesh_of(params)
    ids, positions, segments, slots = (_place(x, mesh) for x in batch[:4])
    # Products of float32 parameters are float32 on every backend; GPUs and TPUs would round them first.
    with jax.default_matmul_precision("highest"), _mesh_in_context(params):
        hidden = _embed(config, params["encoder"]["embeddings"], ids, positions)
        # Only on GPU does it matter, and a shape would be compiled twice.
        packed = backend(params) != "gpu" or slots.shape[1] > 1
        for number in range(config.num_hidden_layers):
            hidden = _layer(config, packed, params["encoder"]["layers"][number], hidden, segments)
        return _heads(config, asked, _spans_processes(mesh), params["heads"], hidden, ids, segments, slots)


def mesh_of(params: Params) -> Mesh | None:
    """The mesh that parameters lie on; None where they are on one device."""
    mesh = getattr(getattr(jax.tree.leaves(params)[0], "sharding", None), "mesh", None)  # NumPy's arrays have none
    return mesh if mesh is not None and mesh.size > 1 else None


def _mesh_in_context(params: Params) -> AbstractContextManager[Any]:
    """The mesh of the parameters, of one device too: it tells `attention` which backend computes, which need not be the
    default one."""
    mesh, one = mesh_of(params), jax.tree.leaves(params)[0]
    if mesh is None and isinstance(one, jax.Array):
        mesh = make_mesh(devices=list(one.devices()))
    return jax.set_mesh(mesh) if mesh else nullcontext()


def backend(params: Params) -> Literal["cpu", "gpu", "tpu"]:
    """Where parameters lie."""
    one = jax.tree.leaves(params)[0]
    platform = next(iter(one.devices())).platform if isinstance(one, jax.Array) else jax.default_backend()
    return platform if platform in ("cpu", "tpu") else "gpu"


def row_groups(params: Params) -> int:
    """Over how many groups of devices the rows of a batch are split: their number must divide by it.

    ValueError where parameters lie on a mesh that is none of ours.
    """
    mesh = mesh_of(params)
    if mesh is None:
        return 1
    if mesh.axis_names != AXES:
        raise ValueError(
            f"parameters on a mesh must be on one with the axes {AXES}, as m3jax.sharding.make_mesh makes, got "
            f"{mesh.axis_names}; place them on such a one"
        )
    return int(np.prod([mesh.shape[axis] for axis in _BATCH_AXES]))


_BATCH_AXES: Any = BATCH[0]


def _place(x: np.ndarray, mesh: Mesh | None) -> jax.Array | np.ndarray:
    if mesh is None:
        return x
    rows = NamedSharding(mesh, BATCH)
    # Not device_put, which compares the values of all processes.
    return jax.make_array_from_callback(x.shape, rows, lambda index: x[index])


def _spans_processes(mesh: Mesh | None) -> Mesh | None:
    return mesh if mesh is not None and mesh.is_multi_process else None


@functools.lru_cache(maxsize=64)
def _graph(module: Callable[[M3Config, nnx.Rngs], nnx.Module], config: M3Config) -> nnx.GraphDef[Any]:
    return nnx.split(nnx.eval_shape(lambda: module(config, nnx.Rngs(0))))[0]


@functools.partial(jax.jit, static_argnums=0)
def _embed(config: M3Config, params: Params, ids: Array, positions: Array) -> Array:
    return nnx.merge(_graph(Embeddings, config), params)(ids, positions)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _layer(config: M3Config, packed: bool, params: Params, hidden: Array, segments: Array) -> Array:
    return nnx.merge(_graph(Layer, config), params)(hidden, segments, 0.0, None, packed=packed)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _heads(
    config: M3Config,
    asked: Asked,
    gathered: Mesh | None,
    params: Params,
    hidden: Float[Array, "b l d"],
    ids: Int[Array, "b l"],
    segments: Int[Array, "b l"],
    slots: Int[Array, "b k m"],
) -> Results:
    """gathered: the mesh of several processes, each of which must get all rows."""
    heads = nnx.merge(_graph(Heads, config), params)
    results = Results(
        packed_dense(hidden, slots, asked.width) if asked.dense else None,
        heads.token_weights(hidden, ids, segments > 0) if asked.sparse else None,
        heads.colbert(hidden, asked.width) if asked.colbert else None,
    )
    if gathered is not None:
        whole = NamedSharding(gathered, PartitionSpec())
        results = Results(*(x if x is None else jax.lax.with_sharding_constraint(x, whole) for x in results))
    return results
