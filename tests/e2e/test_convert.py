"""`python -m convert`: a released directory to an Orbax checkpoint and back is the same, bit for bit; errors are one line.

Not here: what the two formats refuse and list (test_weights.py, test_checkpoint.py).
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

pytest.importorskip("orbax.checkpoint", reason="Orbax checkpoints need the train extra")

import m3jax
from convert.__main__ import main
from m3jax import pickles
from m3jax.config import M3Config
from m3jax.model import init

HEADS = ("sparse_linear.pt", "colbert_linear.pt")


@pytest.fixture(scope="module")
def released(tiny_tokenizer, tmp_path_factory):
    """A released directory whose tensors are float32, bfloat16 and float16, each with bits that arithmetic would lose."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = M3Config.tiny(vocab_size=tiny_tokenizer.vocab_size, colbert_dim=8, max_position_embeddings=20, **sizes)
    leaves, tree = jax.tree.flatten(jax.tree.map(np.asarray, init(config, jax.random.key(0))))
    dtypes = (np.float32, jnp.bfloat16, np.float16)
    random = np.random.default_rng(0)
    leaves = [random.normal(size=x.shape).astype(dtypes[i % 3]) for i, x in enumerate(leaves)]
    leaves[0].flat[:4] = (-0.0, np.inf, np.nan, 1e-42)
    directory = tmp_path_factory.mktemp("released") / "model"
    m3jax.save(m3jax.M3(config, jax.tree.unflatten(tree, leaves), tiny_tokenizer), directory)
    return directory


def tensors(directory):
    """Every tensor of every file, by file and name, as (dtype, shape, bytes)."""
    found = {"model.safetensors": safetensors.numpy.load_file(directory / "model.safetensors")}
    found |= {name: pickles.read(directory / name) for name in HEADS}
    return {
        (file, name): (str(x.dtype), x.shape, np.ascontiguousarray(x).tobytes())
        for file, named in found.items()
        for name, x in named.items()
    }


def files(directory):
    return {path.relative_to(directory): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def test_there_and_back(released, tmp_path, capsys):
    main(["from-pytorch", str(released), str(tmp_path / "orbax")])
    main(["to-pytorch", str(tmp_path / "orbax"), str(tmp_path / "model")])
    assert capsys.readouterr().out.count("M3(2 layers × 16") == 2
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
    assert tensors(tmp_path / "model") == tensors(directory)


def test_both_load_as_the_same_model(released, tmp_path):
    main(["from-pytorch", str(released), str(tmp_path / "orbax")])
    ours, theirs = m3jax.load(tmp_path / "orbax"), m3jax.load(released)
    assert ours.config == theirs.config
    for a, b in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
        np.testing.assert_array_equal(a, b)


def broken(released, folder, name):
    """A copy of the released directory that lacks one file."""
    directory = shutil.copytree(released, folder / f"without {name}")
    (directory / name).unlink()
    return directory


@pytest.mark.parametrize("direction", ["from-pytorch", "to-pytorch"])
def test_errors_end_in_one_line(released, tmp_path, direction):
    orbax = tmp_path / "orbax"
    main(["from-pytorch", str(released), str(orbax)])
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "thesis.txt").write_text("the only copy")
    (tmp_path / "file").write_text("")
    new = tmp_path / "new"
    wrong = {
        "from-pytorch": [
            (tmp_path / "nowhere", new, "nowhere"),
            (orbax, new, "config.json"),
            (released, occupied, "occupied"),
            (released, orbax, "orbax"),
            (released, tmp_path / "file" / "new", "file"),
            *((broken(released, tmp_path, name), new, name) for name in ("sparse_linear.pt", "tokenizer.json")),
        ],
        "to-pytorch": [
            (tmp_path / "nowhere", new, "nowhere"),
            (released, new, "Orbax checkpoint"),
            (orbax, occupied, "occupied"),
            (orbax, tmp_path / "file" / "new", "file"),
        ],
    }
    before = files(tmp_path)
    for source, destination, named in wrong[direction]:
        with pytest.raises(SystemExit) as end:
            main([direction, str(source), str(destination)])
        message = str(end.value)
        assert message.startswith("error: ") and named in message and "\n" not in message
        assert files(tmp_path) == before and not new.exists()


def test_wrong_tensors_are_all_listed_and_nothing_is_written(released, tmp_path):
    wrong = shutil.copytree(released, tmp_path / "wrong")
    kept = safetensors.numpy.load_file(wrong / "model.safetensors")
    del kept["encoder.layer.1.output.dense.bias"]
    kept["lm_head.bias"] = np.zeros(3, np.float32)
    safetensors.numpy.save_file(kept, wrong / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit, match="error: ") as end:
        main(["from-pytorch", str(wrong), str(tmp_path / "orbax")])
    assert "missing: encoder.layer.1.output.dense.bias" in str(end.value)
    assert "left over: lm_head.bias" in str(end.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["wrong"]


def test_the_program(tmp_path):
    command = [sys.executable, "-m", "convert", "to-pytorch", str(tmp_path / "nowhere"), str(tmp_path / "new")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
