import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from m3jax import checkpoint
from m3jax.config import M3Config
from m3jax.embedder import load
from m3jax.model import M3, cast, flatten, shapes
from m3jax.sharding import make_mesh, shardings


def model(tokenizer, seed=0, **sizes):
    config = M3Config.tiny(
        **{"vocab_size": tokenizer.vocab_size, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        | {"intermediate_size": 24, "max_position_embeddings": 20, "colbert_dim": 6}
        | sizes
    )
    rng = np.random.default_rng(seed)
    return M3(config, jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes(config)), tokenizer)


@pytest.fixture(scope="module")
def m3(tiny_tokenizer):
    return model(tiny_tokenizer)


@pytest.fixture(scope="module")
def step(m3, tmp_path_factory):
    """A checkpoint of m3; tests only read it."""
    directory = tmp_path_factory.mktemp("checkpoint") / "step"
    checkpoint.write(m3, directory)
    return directory


def assert_same_model(got, m3):
    config, params, tokenizer = got
    assert (config, tokenizer.json) == (m3.config, m3.tokenizer.json)
    assert jax.tree.structure(params) == jax.tree.structure(m3.params)  # layer numbers are numbers again
    for path, x in flatten(m3.params).items():
        assert flatten(params)[path].dtype == x.dtype, path
        np.testing.assert_array_equal(flatten(params)[path], x, err_msg=path)


def test_round_trip(m3, step):
    assert checkpoint.is_checkpoint(step)
    assert_same_model(checkpoint.read(step), m3)
    loaded = load(step)
    assert_same_model((loaded.config, loaded.params, loaded.tokenizer), m3)


def test_more_than_ten_layers_keep_their_order(tiny_tokenizer, tmp_path):
    deep = model(tiny_tokenizer, num_hidden_layers=11, hidden_size=4, num_attention_heads=1, intermediate_size=4)
    checkpoint.write(deep, tmp_path / "deep")
    assert_same_model(checkpoint.read(tmp_path / "deep"), deep)


def test_the_dtype_stored_is_the_dtype_read(m3, tmp_path):
    half = M3(m3.config, cast(m3.params, jnp.bfloat16), m3.tokenizer)
    checkpoint.write(half, tmp_path / "half")
    assert_same_model(checkpoint.read(tmp_path / "half"), half)
    assert {x.dtype.name for x in jax.tree.leaves(load(tmp_path / "half").params)} == {"float32"}  # on CPU


def test_onto_a_mesh(m3, step):
    mesh = make_mesh(devices=jax.devices()[:1])
    _, params, _ = checkpoint.read(step, sharding=lambda tree: shardings(tree, mesh))
    kernel = params["encoder"]["layers"][0]["q"]["kernel"]
    assert kernel.sharding == NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    assert_same_model((m3.config, params, m3.tokenizer), m3)


def test_the_last_of_a_folder_of_steps(tiny_tokenizer, tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    assert not checkpoint.is_checkpoint(folder)
    steps = {number: model(tiny_tokenizer, seed=number) for number in (9, 10)}
    for number, one in steps.items():
        checkpoint.write(one, folder / str(number))
    (folder / "11").mkdir()  # not a finished step
    (folder / "12.orbax-checkpoint-tmp-3").mkdir()
    (folder / "notes").mkdir()
    assert checkpoint.is_checkpoint(folder)
    loaded = load(folder)
    assert_same_model((loaded.config, loaded.params, loaded.tokenizer), steps[10])
    assert_same_model(checkpoint.read(folder / "9"), steps[9])


def test_one_error_lists_everything_that_does_not_fit_the_config(m3, tmp_path):
    checkpoint.write(m3, tmp_path / "step")
    described = json.loads((tmp_path / "step" / "m3" / "metadata").read_text())
    described["config"] |= {"pooler": False, "num_hidden_layers": 2, "intermediate_size": 12}
    (tmp_path / "step" / "m3" / "metadata").write_text(json.dumps(described))
    with pytest.raises(ValueError) as caught:
        checkpoint.read(tmp_path / "step")
    for part in (
        str(tmp_path / "step"), "missing: encoder/layers/1/q/kernel", "left over: encoder/pooler/bias",
        "misshapen: encoder/layers/0/up/kernel is (16, 24), expected (16, 12)",
    ):  # fmt: skip
        assert part in str(caught.value)
    assert "layers/0/q" not in str(caught.value)


def test_an_existing_directory_is_refused(m3, step, tmp_path):
    with pytest.raises(ValueError, match="must be new"):
        checkpoint.write(m3, step)
    assert_same_model(checkpoint.read(step), m3)
    with pytest.raises(ValueError, match="must be new"):
        checkpoint.write(m3, tmp_path)


def test_only_what_a_conversion_wrote_is_replaced(m3, tmp_path):
    checkpoint.write(m3, tmp_path / "run" / "8")  # a run's folder of steps; another file beside a step
    checkpoint.write(m3, tmp_path / "step")
    (tmp_path / "step" / "notes.txt").write_text("the only copy")
    for folder, named in (("run", "8/"), ("step", r"notes\.txt")):
        with pytest.raises(
            ValueError, match=rf"must be new or hold what an earlier conversion wrote, but there is {named}"
        ):
            checkpoint.write(m3, tmp_path / folder, replace=True)
    assert_same_model(checkpoint.read(tmp_path / "run"), m3)
    (tmp_path / "step" / "notes.txt").unlink()
    (tmp_path / "step" / "m3" / "metadata").unlink()  # as an upload that broke off leaves it in a store
    checkpoint.write(m3, tmp_path / "step", replace=True)
    assert_same_model(checkpoint.read(tmp_path / "step"), m3)


EIGHT = """
import sys, jax, numpy as np
from m3jax import checkpoint
from m3jax.model import flatten
from m3jax.sharding import make_mesh, shardings
_, whole, _ = checkpoint.read(sys.argv[1])
for sizes in ((8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 2)):
    devices = jax.devices()[: np.prod(sizes)]
    mesh = make_mesh(*sizes, devices=devices)
    _, params, _ = checkpoint.read(sys.argv[1], sharding=lambda tree: shardings(tree, mesh))
    for path, x in flatten(params).items():
        assert x.sharding.device_set == set(devices) and x.dtype == flatten(whole)[path].dtype, path
        np.testing.assert_array_equal(x, flatten(whole)[path], err_msg=path)
    split = [path for path, x in flatten(params).items() if x.addressable_shards[0].data.shape != x.shape]
    assert bool(split) == (sizes != (8, 1, 1)), sizes
"""


def test_onto_meshes_of_several_devices(m3, tmp_path):
    half = M3(m3.config, cast(m3.params, jnp.bfloat16), m3.tokenizer)
    checkpoint.write(half, tmp_path / "half")
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = str(Path(checkpoint.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", EIGHT, str(tmp_path / "half")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_what_is_no_checkpoint(tmp_path):
    assert not checkpoint.is_checkpoint(tmp_path / "nothing")
    with pytest.raises(ValueError, match="must be an Orbax checkpoint of m3jax"):
        checkpoint.read(tmp_path)
