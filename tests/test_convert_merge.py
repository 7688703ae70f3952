"""`python -m convert merge`: the mean is the mean, a share of 1 is the model itself, and what cannot be mixed is all listed."""

import dataclasses
import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from convert import merge as program
from convert.__main__ import main
from m3jax import checkpoint, weights
from m3jax.config import M3Config
from m3jax.model import M3, flatten, shapes
from m3jax.tokenization import Tokenizer

SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 20}


def model(tokenizer, seed, dtype=np.float32, **changes):
    sizes = {"vocab_size": tokenizer.vocab_size, "colbert_dim": 6} | SIZES | changes
    config = M3Config.tiny(**sizes)
    rng = np.random.default_rng(seed)
    return M3(config, jax.tree.map(lambda x: rng.normal(size=x.shape).astype(dtype), shapes(config)), tokenizer)


@pytest.fixture(scope="module")
def models(tiny_tokenizer):
    return [model(tiny_tokenizer, seed) for seed in range(3)]


@pytest.fixture
def folder(models, tmp_path, monkeypatch):
    """The working directory, in which a, b and c are released directories."""
    for name, one in zip("abc", models, strict=True):
        weights.write(one, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def failed(*arguments):
    with pytest.raises(SystemExit) as end:
        main(["merge", *arguments])
    message = str(end.value)
    assert message.startswith("error: ")
    return message


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_mean(models, folder, capsys):
    main(["merge", "a", "b", "c", "--weights", "0.5,0.3,0.2", "out"])
    config, params, tokenizer = weights.read("out")
    assert config == models[0].config and tokenizer.json == models[0].tokenizer.json
    a, b, c = (flatten(one.params) for one in models)
    for path, x in flatten(params).items():
        expected = 0.5 * np.float64(a[path]) + 0.3 * np.float64(b[path]) + 0.2 * np.float64(c[path])
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x, expected.astype(np.float32), err_msg=path)
    out = capsys.readouterr().out
    assert out.startswith(f"out: {len(a)} tensors, {sum(x.size for x in a.values()):,} parameters")


@pytest.mark.parametrize(
    "arguments", ["a b out --weights 0.7,0.3", "--weights 0.7,0.3 a b out", "a --weights 0.7,0.3 b out"]
)
def test_the_order_of_arguments(folder, arguments):
    main(["merge", *arguments.split()])
    main(["merge", "a", "b", "--weights", "0.7,0.3", "expected"])
    for name in ("model.safetensors", "sparse_linear.pt", "colbert_linear.pt"):
        assert (folder / "out" / name).read_bytes() == (folder / "expected" / name).read_bytes()


def test_a_share_of_1_is_the_model_bit_for_bit(tiny_tokenizer, models, folder):
    odd = model(tiny_tokenizer, 7)
    dtypes = (np.float32, ml_dtypes.bfloat16, np.float16)
    leaves, tree = jax.tree.flatten(odd.params)
    leaves = [x.astype(dtypes[i % 3]) for i, x in enumerate(leaves)]
    leaves[0].flat[:4] = (-0.0, np.inf, np.nan, 1e-42)
    weights.write(M3(odd.config, jax.tree.unflatten(tree, leaves), tiny_tokenizer), "odd")
    main(["merge", "odd", "b", "--weights", "1,0", "out"])
    assert {p.relative_to(folder / "out"): x for p, x in files(folder / "out").items()} == {
        p.relative_to(folder / "odd"): x for p, x in files(folder / "odd").items()
    }
    main(["merge", "a", "b", "--weights", "0,1", "other"])
    assert (folder / "other" / "model.safetensors").read_bytes() == (folder / "b" / "model.safetensors").read_bytes()


def test_blocks_change_nothing(folder, monkeypatch):
    main(["merge", "a", "b", "--weights", "0.7,0.3", "whole"])
    monkeypatch.setattr(program, "_BLOCK_ELEMENTS", 40)
    main(["merge", "a", "b", "--weights", "0.7,0.3", "blocks"])
    assert (folder / "whole" / "model.safetensors").read_bytes() == (
        folder / "blocks" / "model.safetensors"
    ).read_bytes()


def test_the_dtype_is_the_first_models(tiny_tokenizer, models, folder):
    half = model(tiny_tokenizer, 5, ml_dtypes.bfloat16)
    weights.write(half, "half")
    main(["merge", "half", "a", "--weights", "0.5,0.5", "out"])
    b, written = flatten(models[0].params), flatten(weights.read("out")[1])
    for path, x in flatten(half.params).items():
        expected = (0.5 * x.astype(np.float64) + 0.5 * np.float64(b[path])).astype(ml_dtypes.bfloat16)
        assert written[path].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(written[path], expected)


def test_what_a_dtype_cannot_hold(tiny_tokenizer, models, folder):
    small = model(tiny_tokenizer, 5, np.float16)
    weights.write(small, "small")
    weights.write(M3(small.config, jax.tree.map(lambda x: x * 1e6, models[0].params), tiny_tokenizer), "large")
    assert "the mixture must be finite in float16" in failed("small", "large", "--weights", "0.5,0.5", "out")
    assert not Path("out").exists()


def test_orbax_checkpoints(models, folder):
    pytest.importorskip("orbax.checkpoint", reason="Orbax checkpoints need the train extra")
    for name, one in zip("ab", models, strict=False):
        checkpoint.write(one, folder / f"orbax-{name}")
    main(["merge", "a", "b", "--weights", "0.7,0.3", "expected"])
    main(["merge", "orbax-a", "orbax-b", "--weights", "0.7,0.3", "orbax"])
    main(["merge", "a", "orbax-b", "--weights", "0.7,0.3", "mixed"])
    expected = flatten(weights.read("expected")[1])
    for got in (weights.read("orbax")[1], weights.read("mixed")[1]):
        for path, x in flatten(got).items():
            np.testing.assert_array_equal(np.asarray(x), expected[path], err_msg=path)


@pytest.mark.parametrize("given", ["0.7,0.2", "0.7,0.4", "1.5,-0.5", "0.7;0.3", "nan,1", "", "0.5,0.5,"])
def test_weights_that_are_no_shares(folder, given):
    assert "with the sum 1" in failed("a", "b", "--weights", given, "out")
    assert not Path("out").exists()


def test_weights_of_the_wrong_number(folder):
    assert "2 models and 3 weights" in failed("a", "b", "--weights", "0.5,0.3,0.2", "out")
    assert "0 models and 1 weights" in failed("--weights", "1")
    assert program.parse("0.3333333,0.3333333,0.3333333") == pytest.approx([1 / 3] * 3)


def test_an_existing_out_is_refused(folder):
    before = files(folder)
    assert "b must be new" in failed("a", "b", "--weights", "0.5,0.5", "b")
    assert files(folder) == before
    main(["merge", "a", "b", "--weights", "0.7,0.3", "expected"])
    main(
        ["merge", "a", "b", "--weights", "0.7,0.3", "b", "--overwrite"]
    )  # b's mapped file is read while its place is taken
    assert (folder / "b" / "model.safetensors").read_bytes() == (folder / "expected" / "model.safetensors").read_bytes()


def test_all_differences_are_listed(tiny_tokenizer, tiny_tokenizer_json, folder):
    content = json.loads(tiny_tokenizer_json)
    content["model"]["vocab"][10][1] -= 1.0
    other = Tokenizer.from_json(json.dumps(content))
    weights.write(model(other, 1, colbert_dim=8, intermediate_size=32, num_attention_heads=4), "other")
    without = model(tiny_tokenizer, 2)
    del without.params["encoder"]["pooler"]
    weights.write(M3(dataclasses.replace(without.config, pooler=False), without.params, tiny_tokenizer), "poolerless")
    before = files(folder)
    message = failed("a", "other", "poolerless", "--weights", "0.4,0.4,0.2", "out")
    for part in (
        "other: colbert_dim is 8, expected 6", "other: intermediate_size is 32, expected 24",
        "other: num_attention_heads is 4, expected 2", "other: another tokenizer",
        "poolerless: pooler is False, expected True", "5 differences from a",
    ):  # fmt: skip
        assert part in message, part
    assert files(folder) == before


def test_what_does_not_load_is_not_merged(tiny_tokenizer, folder):
    (folder / "b" / "sparse_linear.pt").unlink()
    assert "sparse_linear.pt: not found" in failed("a", "b", "--weights", "0.5,0.5", "out")
    assert not Path("out").exists()


def test_a_tokenizer_written_otherwise_is_the_same(tiny_tokenizer, tiny_tokenizer_json, folder):
    content = json.loads(tiny_tokenizer_json)
    content["truncation"] = {"max_length": 8, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    weights.write(model(Tokenizer.from_json(json.dumps(content, indent=1)), 1), "spaced")
    main(["merge", "a", "spaced", "--weights", "0.5,0.5", "out"])
