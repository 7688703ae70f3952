import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import m3jax

HEAVY = (
    "torch",
    "transformers",
    "tensorflow_datasets",
    "tensorflow",
    "orbax",
    "grain",
    "optax",
    "absl",
    "ml_collections",
)


def modules_after(code):
    """Top-level modules that a fresh interpreter has loaded after running `code`."""
    code += "\nimport sys, json; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_names_users_are_promised():
    promised = {"load", "save", "encode", "score", "search", "apply", "M3", "M3Config", "Embeddings", "Representations"}
    promised |= {"encode_to", "open_embeddings"}
    assert promised <= set(m3jax.__all__) and set(dir(m3jax)) == set(m3jax.__all__)
    for name in m3jax.__all__:
        value = getattr(m3jax, name)
        assert callable(value) and value.__name__ == name and value.__module__.startswith("m3jax.")
        assert value.__doc__
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = m3jax.lode
    with pytest.raises(ImportError):
        exec("from m3jax import lode")


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(m3jax.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    assert seen == {name: f"m3jax.{home}" for name, home in m3jax._HOME.items()}
    assert sorted(m3jax.__all__) == sorted(m3jax._HOME)


@pytest.mark.parametrize(
    ("name", "positional", "keywords"),
    [
        ("load", ["directory"], {"revision", "dtype", "heads"}),
        ("save", ["m3", "directory"], {"card"}),
        ("encode", ["m3", "texts"], {"dense", "sparse", "colbert", "max_length"}),
        ("encode_to", ["directory", "m3", "texts"], {"dense", "sparse", "colbert", "colbert_dtype", "max_length"}),
        ("open_embeddings", ["directory"], set()),
        ("score", ["queries", "passages"], {"weights", "pairwise"}),
        ("search", ["queries", "passages"], {"by", "k"}),
        ("apply", ["config", "params", "ids", "mask"], {"dropout", "key", "remat"}),
    ],
)
def test_keyword_only_past_the_first_arguments(name, positional, keywords):
    parameters = inspect.signature(getattr(m3jax, name)).parameters.values()
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == positional
    assert keywords <= {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert not [p for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]  # unknown arguments are refused


def test_import_is_light():
    loaded = modules_after("import m3jax")
    assert "m3jax" in loaded and not loaded & {*HEAVY, "flax"}


def test_the_whole_api_is_without_torch_and_training():
    loaded = modules_after("import m3jax\nfor name in m3jax.__all__: getattr(m3jax, name)")
    assert "flax" in loaded and not loaded & {
        "torch",
        "transformers",
        "tensorflow_datasets",
        "tensorflow",
        "grain",
        "orbax",
    }
