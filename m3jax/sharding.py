"""One mesh with data, fsdp and tensor axes, and the rules that place parameters, optimiser state and batches on it.

Not here: any collective. The mathematics is written for the global arrays; XLA splits it by these placements.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")

# Rows of a batch go over data and fsdp: every device works on its own rows. Of stacked parts of a batch, the second axis.
BATCH = PartitionSpec(("data", "fsdp"))
STACKED = PartitionSpec(None, *BATCH)
# Rows of tables, looked up for tokens [b, l]: each device has its part of their width, as of the tables'.
LOOKED_UP = PartitionSpec("data", None, ("fsdp", "tensor"))

# Parameter path (joined by "/") → PartitionSpec; the first match holds. A kernel is [inputs, outputs]. Pairs of
# projections split their shared width over `tensor`, so one all-reduce a pair suffices. A table splits its width: 250,002
# rows divide by neither 4 nor 8.
_RULES = (
    (r"(word|position)_embeddings/embedding$", PartitionSpec(None, ("fsdp", "tensor"))),
    (r"token_type_embeddings/embedding$", PartitionSpec()),
    (r"/(q|k|v|up)/kernel$", PartitionSpec("fsdp", "tensor")),
    (r"/(q|k|v|up)/bias$", PartitionSpec("tensor")),
    (r"/(attention_out|down)/kernel$", PartitionSpec("tensor", "fsdp")),
    (r"(pooler|colbert_linear|lm_head/dense)/kernel$", PartitionSpec("fsdp", "tensor")),
    (r"sparse_linear/kernel$", PartitionSpec("fsdp")),
    (r"/(bias|scale)$", PartitionSpec()),
)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of all devices with the axes data × fsdp × tensor; one size may be -1, the rest of the devices.

    Slices of TPUs, which a slower network joins, are split over data. Raises ValueError where the sizes do not give the number
    of devices, or data does not divide by the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    known = 1
    for size in sizes:
        known *= 1 if size == -1 else size
    if sizes.count(-1) == 1 and known > 0 and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if -1 in sizes or sizes[0] * sizes[1] * sizes[2] != len(devices):
        raise ValueError(
            f"mesh sizes must multiply to the number of devices, {len(devices)}, with at most one -1 for the rest; got "
            f"data={data}, fsdp={fsdp}, tensor={tensor}"
        )
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if sizes[0] % slices:
        raise ValueError(
            f"slices of TPUs are split over the data axis, which must divide by their number, {slices}; got data={sizes[0]}"
        )
    # Not jax.make_mesh: it refuses 8 × 8 on the 4 × 4 × 4 chips of a v5p slice, and more than one slice.
    if slices > 1:
        within, between = (sizes[0] // slices, *sizes[1:]), (slices, 1, 1)
        arranged = create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
    else:
        arranged = create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    # Auto axes: with Explicit ones, every operation of the mathematics would need sharding types.
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def platform() -> str:
    """What the program in hand is for: the platform of the mesh in context, whose devices this host need not have (a program
    can be compiled for another machine), else that of the default device."""
    config: Any = jax.config  # its attributes have no types
    device = jax.sharding.get_abstract_mesh().abstract_device or config.jax_default_device
    return getattr(device, "platform", device) or jax.default_backend()


def batch_groups() -> int:
    """Over how many groups of devices the mesh in context splits the rows of a batch; 1 without a mesh."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return sizes.get("data", 1) * sizes.get("fsdp", 1)


def constrain(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """x, placed so on the mesh in context; x itself without a mesh, on one without AXES, and within a shard_map over them."""
    mesh = jax.sharding.get_abstract_mesh()
    ours = {*AXES} <= {*mesh.axis_names} - {*mesh.manual_axes}
    return jax.lax.with_sharding_constraint(x, spec) if ours else x


def path_name(path: tuple[Any, ...]) -> str:
    """A key path of jax.tree_util as "encoder/layers/0/q/kernel"."""
    return "/".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)


def partition(tree: Any) -> Any:
    """The PartitionSpec of each leaf of a tree of parameters, or of optimiser state that holds trees like it.

    A leaf without axes (a step count) is whole on every device. Raises ValueError on a path that no rule knows.
    """

    def spec(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        if not leaf.shape:
            return PartitionSpec()
        name = path_name(path)
        for pattern, placed in _RULES:
            if re.search(pattern, name):
                return placed
        raise ValueError(f"every parameter needs a placement rule, got {name!r}; add one to m3jax/sharding.py")

    return jax.tree_util.tree_map_with_path(spec, tree)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """`partition` on a mesh: the NamedSharding of each leaf."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), partition(tree), is_leaf=lambda x: isinstance(x, PartitionSpec)
    )
