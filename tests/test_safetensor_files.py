"""What one side writes the safetensors package reads, and the other way round, bit for bit; broken files are named."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from m3jax import safetensor_files

DTYPES = [
    np.float64,
    np.float32,
    np.float16,
    ml_dtypes.bfloat16,
    np.int64,
    np.int32,
    np.int16,
    np.int8,
    np.uint8,
    np.bool_,
]


@pytest.fixture
def tensors():
    random = np.random.default_rng(0)
    named = {np.dtype(dtype).name: random.integers(0, 2, (3, 5)).astype(dtype) for dtype in DTYPES}
    return named | {"scalar": np.array(7.0, np.float32), "empty": np.zeros((0, 3), np.float16)}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        assert (x.dtype, x.shape, x.tobytes()) == (theirs[name].dtype, theirs[name].shape, theirs[name].tobytes()), name


def test_both_ways_with_the_package(tensors, tmp_path):
    safetensor_files.write(tmp_path / "ours", tensors)
    assert_same(safetensors.numpy.load_file(tmp_path / "ours"), tensors)
    safetensors.numpy.save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert_same(safetensor_files.read(tmp_path / "theirs"), tensors)
    assert_same(safetensor_files.read(tmp_path / "ours"), tensors)


def test_strides_do_not_matter_and_order_neither(tmp_path):
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    safetensor_files.write(tmp_path / "one", {"a": x.T, "b": x[::-1, ::2]})
    safetensor_files.write(tmp_path / "two", {"b": x[::-1, ::2].copy(), "a": x.T.copy()})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    np.testing.assert_array_equal(safetensors.numpy.load_file(tmp_path / "one")["a"], x.T)


def test_tensors_are_views_of_the_file_that_cannot_be_written(tmp_path):
    safetensor_files.write(tmp_path / "one", {"a": np.ones(64, np.float32)})
    found = safetensor_files.read(tmp_path / "one")["a"]
    assert not found.flags.owndata and not found.flags.writeable
    assert found.ctypes.data % 64 == 0  # what JAX needs to take it as it lies


def test_broken_files_are_named(tensors, tmp_path):
    path = tmp_path / "one"
    safetensor_files.write(path, tensors)
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:20], whole + b"0", b"", b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"one: not a readable safetensors file \(.+\); download or write it again"
        ):
            safetensor_files.read(path)


def test_dtypes_that_weights_do_not_have(tmp_path):
    with pytest.raises(ValueError, match=r"convert a \(complex64\)"):
        safetensor_files.write(tmp_path / "one", {"a": np.zeros(2, np.complex64)})
    assert not (tmp_path / "one").exists()
    header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "one").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match="but a is of F8_E4M3; convert it"):
        safetensor_files.read(tmp_path / "one")
