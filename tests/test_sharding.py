import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec

from m3jax.config import M3Config
from m3jax.model import flatten, shapes
from m3jax.sharding import AXES, BATCH, constrain, make_mesh, partition, path_name, shardings

DEVICES = jax.devices()[:1]


def test_mesh_of_one():
    mesh = make_mesh(devices=DEVICES)
    assert mesh.axis_names == AXES and dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert make_mesh(1, -1, 1, devices=DEVICES).size == 1


@pytest.mark.parametrize("sizes", [(2, 1, 1), (-1, 2, 1), (-1, -1, 1), (0, 1, 1), (-1, 0, 1), (1, 1, 3)])
def test_mesh_sizes_that_do_not_fit(sizes):
    with pytest.raises(ValueError, match=r"number of devices, 1, .* got data={}, fsdp={}, tensor={}".format(*sizes)):
        make_mesh(*sizes, devices=DEVICES)


def test_slices_of_tpus_are_split_over_data_alone():
    """Where they lie on the chips: tests/tpu/test_mesh.py."""
    two = [SimpleNamespace(platform="tpu", slice_index=number // 4) for number in range(8)]
    with pytest.raises(ValueError, match="data axis, which must divide by their number, 2; got data=1"):
        make_mesh(1, 8, devices=two)


def test_every_parameter_has_a_rule_and_divides():
    tree = shapes(M3Config(num_hidden_layers=2))
    specs = partition(tree)
    assert jax.tree.structure(specs, is_leaf=lambda x: isinstance(x, PartitionSpec)) == jax.tree.structure(tree)
    sizes = {"fsdp": 8, "tensor": 4}
    whole = set()
    for path, x in flatten(tree).items():
        spec = flatten(specs)[path]
        assert len(spec) <= x.ndim, path
        for length, axes in zip(x.shape, spec, strict=False):
            for axis in (axes,) if isinstance(axes, str) else axes or ():
                assert length % sizes[axis] == 0, path
                length //= sizes[axis]
        if not any(spec):
            whole.add(path.rpartition("/")[2] if "/layers/" in path else path)
    # Split is what is large: of the matrices only the type table, of one row, is whole.
    assert "encoder/embeddings/token_type_embeddings/embedding" in whole
    assert not {path for path in whole if "kernel" in path or "word" in path or "position" in path}


def test_pairs_of_projections_meet_on_the_tensor_axis():
    specs = flatten(partition(shapes(M3Config.tiny())))
    for first, second in (("q", "attention_out"), ("v", "attention_out"), ("up", "down")):
        out = specs[f"encoder/layers/0/{first}/kernel"][1]
        assert (
            out
            == specs[f"encoder/layers/0/{second}/kernel"][0]
            == specs[f"encoder/layers/0/{first}/bias"][0]
            == "tensor"
        )


def test_optimiser_state_is_placed_as_its_parameters():
    tree = shapes(M3Config.tiny())
    state = jax.eval_shape(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init, tree)
    specs = partition(state)
    adam, placed = state[1][0], specs[1][0]
    assert placed.mu == placed.nu == partition(tree)
    assert adam.count.shape == () and placed.count == PartitionSpec()


def test_an_unknown_parameter_is_refused():
    x = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    with pytest.raises(ValueError, match="encoder/layers/0/gate/kernel"):
        partition({"encoder": {"layers": {0: {"gate": {"kernel": x}}}}})


def test_path_names():
    leaves = jax.tree_util.tree_leaves_with_path({"layers": {0: [1, (2,)]}})
    assert [path_name(path) for path, _ in leaves] == ["layers/0/0", "layers/0/1/0"]


def test_shardings_are_on_the_mesh():
    mesh = make_mesh(devices=DEVICES)
    placed = shardings(shapes(M3Config.tiny(num_hidden_layers=1)), mesh)
    one = placed["encoder"]["layers"][0]["q"]["kernel"]
    assert one.mesh == mesh and one.spec == PartitionSpec("fsdp", "tensor")


def test_arrays_are_placed_on_a_mesh_of_ours_alone():
    def text(mesh, place=lambda x: constrain(x, BATCH)):
        with jax.set_mesh(mesh):
            return str(jax.make_jaxpr(place)(jnp.zeros((2, 3))))

    ours, other = make_mesh(devices=DEVICES), jax.make_mesh((1,), ("rows",), devices=DEVICES)
    within = jax.shard_map(lambda x: constrain(x, BATCH), mesh=ours, in_specs=BATCH, out_specs=BATCH)
    assert "sharding_constraint" in text(ours)
    assert not any("sharding_constraint" in said for said in (text(other), text(ours, within)))


EIGHT = """
import jax, jax.numpy as jnp, numpy as np
from m3jax.config import M3Config
from m3jax.losses import m3_loss
from m3jax.model import apply, shapes
from m3jax.scores import all_scores
from m3jax.sharding import BATCH, make_mesh, shardings
from jax.sharding import NamedSharding, PartitionSpec

assert jax.device_count() == 8
jax.config.update("jax_disable_most_optimizations", True)  # of the compiler: half the time, the same mathematics
config = M3Config.tiny(num_hidden_layers=1, hidden_size=32, intermediate_size=32, vocab_size=40, colbert_dim=8)
rng = np.random.default_rng(0)
params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes(config))

def rows(count, length):
    ids = rng.integers(4, 40, (count, length)).astype(np.int32)
    ids[:, 0] = 0
    return np.where(np.arange(length) < rng.integers(3, length + 1, (count, 1)), ids, 1)

queries, passages = rows(8, 6), rows(16, 10)

def loss(params, queries, passages):
    found = all_scores(*(apply(config, params, ids, ids != 1) for ids in (queries, passages)))
    return m3_loss(found, jnp.arange(8) * 2, temperature=0.1, distill=1.0)[0]

def run(mesh):
    places = NamedSharding(mesh, BATCH)
    tree = shardings(params, mesh)
    step = jax.jit(jax.value_and_grad(loss), out_shardings=(NamedSharding(mesh, PartitionSpec()), tree))
    given = jax.device_put(params, tree), jax.device_put(queries, places), jax.device_put(passages, places)
    with jax.set_mesh(mesh):
        value, grads = step(*given)
    return value, grads, given

one, one_grads, _ = run(make_mesh(devices=jax.devices()[:1]))
for sizes in ((8, 1, 1), (2, 2, 2)):
    value, grads, given = run(make_mesh(*sizes))
    kernel = given[0]["encoder"]["layers"][0]["q"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // (sizes[1] * sizes[2])
    assert given[1].addressable_shards[0].data.shape[0] == 8 // (sizes[0] * sizes[1])
    np.testing.assert_allclose(value, one, rtol=1e-5)
    scale = max(np.abs(x).max() for x in jax.tree.leaves(one_grads))
    assert scale > 0.01
    # Of tensors by themselves float32 knows less: the gradients of colbert's head are 2e-5 from those in float64 on one device.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * scale), grads, one_grads)
    got, expected = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(jax.device_get(g))]) for g in (grads, one_grads))
    assert np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(expected)
    print("equal on", sizes)
"""


def test_eight_devices_give_what_one_gives():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", EIGHT], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == ["equal on (8, 1, 1)", "equal on (2, 2, 2)"]
