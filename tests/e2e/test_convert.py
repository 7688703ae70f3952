"""`python -m convert`: a released directory to an Orbax checkpoint and back is the same, bit for bit.

Not here: what it refuses, and what stops it (test_convert_refusals.py).
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

pytest.importorskip("orbax.checkpoint", reason="Orbax checkpoints need the train extra")

import m3jax
from convert.__main__ import main
from m3jax import checkpoint, pickles, safetensor_files, sources
from tests.small_release import files, make_release

ROOT = Path(__file__).parents[2]
HEADS = ("sparse_linear.pt", "colbert_linear.pt")


@pytest.fixture(scope="module")
def released(tiny_tokenizer, tmp_path_factory):
    return make_release(tiny_tokenizer, tmp_path_factory.mktemp("released") / "model")


def tensors(directory):
    """Every tensor of every file, by file and name, as (dtype, shape, bytes)."""
    pickled = [name for name in (*HEADS, "pytorch_model.bin") if (directory / name).exists()]
    found = {name: pickles.read(directory / name) for name in pickled}
    if "pytorch_model.bin" not in found:
        found["model.safetensors"] = safetensors.numpy.load_file(directory / "model.safetensors")
    return {
        (file, name): (str(x.dtype), x.shape, np.ascontiguousarray(x).tobytes())
        for file, named in found.items()
        for name, x in named.items()
    }


def test_there_and_back(released, tmp_path, capsys):
    main(["from-pytorch", str(released), str(tmp_path / "orbax")])
    main(["to-pytorch", str(tmp_path / "orbax"), str(tmp_path / "model")])
    assert capsys.readouterr().out.count(" tensors, ") == 2
    assert {dtype for dtype, *_ in tensors(released).values()} == {"float32", "bfloat16", "float16"}
    assert tensors(tmp_path / "model") == tensors(released)
    assert json.loads((tmp_path / "model" / "config.json").read_text()) == json.loads(
        (released / "config.json").read_text()
    )
    assert files(tmp_path / "model").keys() == files(released).keys()
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == (released / "tokenizer.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "orbax"]


def test_a_model_without_a_pooler(released, tmp_path):
    directory = shutil.copytree(released, tmp_path / "released")
    kept = safetensors.numpy.load_file(directory / "model.safetensors")
    kept = {name: x for name, x in kept.items() if not name.startswith("pooler.")}
    safetensors.numpy.save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
    main(["from-pytorch", str(directory), str(tmp_path / "orbax")])
    main(["to-pytorch", str(tmp_path / "orbax"), str(tmp_path / "model")])
    written, before = tensors(tmp_path / "model"), tensors(directory)
    added = {name for name in written if name not in before}
    assert {name: written[name] for name in before} == before
    assert added == {("model.safetensors", f"pooler.dense.{x}") for x in ("weight", "bias")}
    assert not any(
        any(written[name][2]) for name in added
    )  # zeros: a pooler that transformers draws at random it warns of
    assert sources.read(tmp_path / "model")[0] == sources.read(tmp_path / "orbax")[0] == sources.read(directory)[0]


def test_both_load_as_the_same_model(released, tmp_path):
    main(["from-pytorch", str(released), str(tmp_path / "orbax")])
    ours, theirs = m3jax.load(tmp_path / "orbax"), m3jax.load(released)
    assert ours.config == theirs.config
    for a, b in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
        np.testing.assert_array_equal(a, b)


def finite(released, folder):
    """A copy of the released directory without NaN, infinity and numbers that float16 does not have."""
    directory = shutil.copytree(released, folder / "finite")
    for file in ("model.safetensors", *HEADS):
        module = safetensor_files if file == "model.safetensors" else pickles
        kept = {name: np.nan_to_num(x, posinf=1, neginf=-1) for name, x in module.read(directory / file).items()}
        (directory / file).unlink()
        module.write(directory / file, kept)
    return directory


@pytest.fixture
def store(request):
    """A folder of fsspec's memory file system, which has no rename of folders."""
    folder = f"memory://{request.node.name}"
    yield folder
    fsspec.filesystem("memory").rm(folder, recursive=True)


ON_EIGHT = """
import sys, jax, numpy as np, optax
from configs import base
from m3jax import checkpoint, weights
from m3jax.model import flatten
from m3jax.sharding import make_mesh, shardings
from train.start import start_model
from train.step import make_state
released, converted = sys.argv[1:]
_, expected, _ = weights.read(released)
config = base.get_config()
config.data.train, config.init_from = "rows.jsonl", converted
config.query_max_length = config.passage_max_length = 16
params = start_model(config).params
for sizes in ((8, 1, 1), (1, 8, 1), (2, 2, 2)):
    mesh = make_mesh(*sizes)
    trained = make_state(params, optax.adamw(1e-3), mesh).params
    _, restored, _ = checkpoint.read(converted, sharding=lambda tree: shardings(tree, mesh))
    assert jax.tree.structure(trained) == jax.tree.structure(restored) == jax.tree.structure(expected)
    for path, x in flatten(expected).items():
        ours, theirs = flatten(trained)[path], flatten(restored)[path]
        assert ours.sharding == theirs.sharding and len(theirs.sharding.device_set) == 8, path
        assert ours.dtype == np.float32 and theirs.dtype == x.dtype, path
        np.testing.assert_array_equal(ours, np.float32(x), err_msg=path)
        np.testing.assert_array_equal(theirs, x, err_msg=path)
print(len(flatten(expected)), "parameters, three meshes")
"""


def test_training_starts_from_a_conversion_on_any_mesh(released, tmp_path):
    """As `init_from`, in float32, and restored straight onto the devices, in the dtypes stored (a whole run of one device:
    test_train.py)."""
    for package in ("optax", "tensorflow_datasets"):
        pytest.importorskip(package, reason="training needs the train extra")
    directory = finite(released, tmp_path)
    main(["from-pytorch", str(directory), str(tmp_path / "orbax")])
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", ON_EIGHT, str(directory), str(tmp_path / "orbax")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.endswith(" parameters, three meshes\n"), done.stderr


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("form", ["safetensors", "pickle"])
def test_round_trip_of_each_dtype_and_format(released, tmp_path, dtype, form, capsys):
    one, orbax, two = (str(tmp_path / name) for name in ("one", "orbax", "two"))
    main(["to-pytorch", str(finite(released, tmp_path)), one, "--dtype", dtype, "--format", form])
    main(["from-pytorch", one, orbax])
    main(["to-pytorch", orbax, two, "--format", form])
    encoder = "model.safetensors" if form == "safetensors" else "pytorch_model.bin"
    assert {path.name for path in Path(one).iterdir() if path.suffix in (".bin", ".safetensors")} == {encoder}
    assert {dtype_ for dtype_, *_ in tensors(Path(one)).values()} == {dtype}
    assert tensors(Path(two)) == tensors(Path(one))
    assert json.loads(Path(two, "config.json").read_text())["dtype"] == dtype
    assert files(Path(one)) == files(Path(two))  # the same tensors are the same bytes
    count = sum(x.size for x in jax.tree.leaves(sources.read(one)[1]))
    size = count * jnp.dtype(dtype).itemsize
    assert capsys.readouterr().out.count(f" tensors, {count:,} parameters, {size:,} bytes, ") == 3


def test_a_number_that_does_not_fit_the_dtype(released, tmp_path):
    directory = finite(released, tmp_path)
    kept = safetensor_files.read(directory / "model.safetensors")
    large = {"pooler.dense.bias": np.full(16, 1e5, np.float32)}
    (directory / "model.safetensors").unlink()
    safetensor_files.write(directory / "model.safetensors", {**kept, **large})
    with pytest.raises(SystemExit, match=r"must fit float16, which ends at 65504.0; .* in pooler\.dense\.bias\. Take"):
        main(["to-pytorch", str(directory), str(tmp_path / "new"), "--dtype", "float16"])
    main(["to-pytorch", str(directory), str(tmp_path / "new"), "--dtype", "bfloat16"])


def test_a_masked_language_model(released, tmp_path, capsys):
    """The form of xlm-roberta-base and -large: a prefix, a head of its own, no pooler, no M3 heads, short positions."""
    directory = finite(released, tmp_path)
    kept = safetensor_files.read(directory / "model.safetensors")
    renamed = {f"roberta.{name}": x for name, x in kept.items() if not name.startswith("pooler.")}
    terms, width = kept["embeddings.word_embeddings.weight"].shape
    vectors = dict.fromkeys(("dense.bias", "layer_norm.weight", "layer_norm.bias"), (width,))
    sizes = {"dense.weight": (width, width), **vectors, "bias": (terms,), "decoder.bias": (terms,)}
    head = {f"lm_head.{name}": np.random.default_rng(0).normal(size=size) for name, size in sizes.items()}
    renamed |= {name: x.astype(np.float16) for name, x in head.items()} | {
        "roberta.embeddings.position_ids": np.arange(20)[None]
    }
    pickles.write(directory / "pytorch_model.bin", renamed)
    for name in ("model.safetensors", *HEADS):
        (directory / name).unlink()
    orbax = str(tmp_path / "orbax")
    with pytest.raises(SystemExit, match=r"error: .*sparse_linear\.pt and colbert_linear\.pt"):
        main(["from-pytorch", str(directory), orbax])
    capsys.readouterr()
    main(["from-pytorch", str(directory), orbax, "--heads", "init", "--extend-positions", "70"])
    said = capsys.readouterr().err
    assert f"warning: {directory}: the language-model head is no part of an M3 model: lm_head.bias, " in said
    beside = checkpoint.read_lm_head(orbax)  # for stage 1
    np.testing.assert_array_equal(beside["dense"]["kernel"], head["lm_head.dense.weight"].astype(np.float16).T)
    np.testing.assert_array_equal(beside["bias"], head["lm_head.bias"].astype(np.float16))
    m3 = m3jax.load(orbax)
    assert m3.config.max_length == 68 and not m3.config.pooler
    table = np.asarray(m3.params["encoder"]["embeddings"]["position_embeddings"]["embedding"])
    trained = kept["embeddings.position_embeddings.weight"].astype(np.float32)
    np.testing.assert_array_equal(table, np.concatenate([trained[:2], *[trained[2:]] * 4])[:70])
    m3jax.encode(m3, "x " * 30)
    with pytest.raises(SystemExit, match="expected at least its 20 rows, got 8"):
        main(["from-pytorch", str(directory), str(tmp_path / "new"), "--heads", "init", "--extend-positions", "8"])


def test_through_an_object_store(released, tmp_path, store):
    main(["from-pytorch", str(released), f"{store}/orbax"])
    main(["to-pytorch", f"{store}/orbax", f"{store}/model"])
    main(["to-pytorch", f"{store}/model", str(tmp_path / "model")])
    assert tensors(tmp_path / "model") == tensors(released)
    with pytest.raises(SystemExit, match=r"error: memory://.*/model must be new"):
        main(["to-pytorch", f"{store}/orbax", f"{store}/model"])
    main(["to-pytorch", f"{store}/orbax", f"{store}/model", "--overwrite"])
    for whole, last in (("orbax", "m3/metadata"), ("model", "config.json")):
        fsspec.filesystem("memory").rm_file(f"{store}/{whole}/{last}")
        with pytest.raises(SystemExit, match="error: "):
            main(["to-pytorch", f"{store}/{whole}", str(tmp_path / "unfinished")])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


WITHOUT_TORCH = """
import sys
sys.modules |= dict.fromkeys(("torch", "transformers", "sentence_transformers", "FlagEmbedding"))  # importing one fails
from convert.__main__ import main
source, folder = sys.argv[1:]
main(["from-pytorch", source, f"{folder}/orbax"])
main(["to-pytorch", f"{folder}/orbax", f"{folder}/model", "--format", "pickle"])
main(["merge", source, f"{folder}/orbax", "--weights", "0.5,0.5", f"{folder}/merged"])
main(["inspect", f"{folder}/model"])
main(["verify", f"{folder}/merged", f"{folder}/model"])
"""


def test_without_torch(released, tmp_path):
    """`verify` too, where m3jax runs both sides."""
    command = [sys.executable, "-c", WITHOUT_TORCH, str(finite(released, tmp_path)), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "alike within tolerance" in done.stdout, done.stderr
