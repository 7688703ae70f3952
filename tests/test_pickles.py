"""Tests of m3jax/pickles.py: torch is the reference where it is installed.

Not here: what the names in a state dict mean (test_weights.py), hostile files (test_pickles_hostile.py), random ones
(test_pickles_fuzz.py).
"""

import io
import os
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from m3jax import pickles
from tests.torch_files import archive, refused, tensor_code

NEEDS_TORCH = "the reference for PyTorch's own files is torch; install the extra `test`"
DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]


def sample(dtype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random bits of every pattern, infinities and NaNs among them; a bool is 0 or 1."""
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    count = int(np.prod(shape)) * kind.itemsize
    bits = np.random.default_rng(seed).integers(0, 2 if dtype == "bool" else 256, count, np.uint8)
    return np.frombuffer(bits.tobytes(), kind).reshape(shape)


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


def torch_bits(tensor) -> bytes:
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_inside_map(array: np.ndarray) -> None:
    owner = array.base
    while isinstance(owner, np.ndarray):
        owner = owner.base
    assert isinstance(owner, memoryview)
    whole = np.frombuffer(owner.obj, np.uint8)
    low, high = np.lib.array_utils.byte_bounds(array)
    assert whole.ctypes.data <= low <= high <= whole.ctypes.data + whole.size


# --- against torch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_what_torch_saves_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    bits = torch.from_numpy(np.array(sample(dtype, (3, 40)).view(np.uint8).reshape(-1)))
    matrix = bits.view(getattr(torch, dtype)).reshape(3, 40)
    saved = {
        "whole": matrix,
        "transposed": matrix.T,
        "window": matrix[1:, 3:20:2],
        "scalar": matrix[1, 1].clone(),
        "empty": matrix[:0].clone(),
        "narrow": matrix[:1].T,
    }
    torch.save(saved, tmp_path / "x.pt")
    loaded = pickles.read(tmp_path / "x.pt")
    assert list(loaded) == list(saved)
    for name, tensor in saved.items():
        assert loaded[name].shape == tuple(tensor.shape)
        assert str(loaded[name].dtype) == dtype
        assert loaded[name].tobytes() == torch_bits(tensor), name
    assert np.shares_memory(loaded["whole"], loaded["transposed"])
    assert np.shares_memory(loaded["whole"], loaded["window"])
    assert loaded["transposed"].strides == (loaded["whole"].itemsize, 40 * loaded["whole"].itemsize)
    assert not np.shares_memory(loaded["whole"], loaded["scalar"])


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_loads_what_is_written_bit_for_bit(tmp_path: Path, dtype: str, mmap: bool) -> None:
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    whole = sample(dtype, (3, 40))
    arrays = {
        "whole": whole,
        "same": whole,
        "same again": whole[:],
        "transposed": whole.T,
        "backwards": whole[::-1, ::-2],
        "one backwards": whole[:1, :1][::-1],
        "broadcast": np.broadcast_to(whole[:1], (2, 40)),
        "scalar": whole[0, 0, ...],
        "empty": whole[:0],
        "ünïcode": whole[1],
    }
    path = tmp_path / "x.pt"
    pickles.write(path, arrays)
    loaded = torch.load(path, weights_only=True, mmap=mmap)
    assert type(loaded) is OrderedDict and list(loaded) == list(arrays)
    for name, array in arrays.items():
        assert loaded[name].is_contiguous() and tuple(loaded[name].shape) == array.shape
        assert str(loaded[name].dtype) == f"torch.{dtype}"
        assert torch_bits(loaded[name]) == array.tobytes(), name
    assert loaded["whole"].data_ptr() == loaded["same"].data_ptr() == loaded["same again"].data_ptr()
    assert loaded["whole"].data_ptr() != loaded["broadcast"].data_ptr()
    assert all(same_bits(array, arrays[name]) for name, array in pickles.read(path).items())


def test_reads_modules_with_metadata_and_tied_weights(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2), torch.nn.Linear(3, 2))
    module[2].weight = module[0].weight
    saved = module.state_dict()
    torch.save(saved, tmp_path / "state")
    loaded = pickles.read(tmp_path / "state")
    assert list(loaded) == list(saved)
    assert all(loaded[key].tobytes() == torch_bits(saved[key]) for key in saved)
    assert np.shares_memory(loaded["0.weight"], loaded["2.weight"])


def test_parameters_are_refused_with_advice_that_helps(tmp_path: Path) -> None:
    """They are a global of their own, and a state dict has none; the error's line of PyTorch makes one."""
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    path, weight = tmp_path / "head.pt", torch.nn.Linear(3, 2).weight
    torch.save({"weight": weight}, path)
    with pytest.raises(ValueError, match=r"not 'torch\._utils\._rebuild_parameter'") as caught:
        pickles.read(path)
    exec(str(caught.value).rpartition("in PyTorch: ")[2], {"torch": torch, "path": path})
    assert pickles.read(path)["weight"].tobytes() == torch_bits(weight.detach())


def released() -> dict:
    """State dicts as BAAI/bge-m3 has them: the encoder's of an nn.Module, with metadata; heads in halves."""
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    encoder = torch.nn.ModuleDict(
        {"embeddings": torch.nn.Embedding(9, 4, padding_idx=1), "norm": torch.nn.LayerNorm(4)}
    )
    encoder.register_buffer("position_ids", torch.arange(6).expand(1, -1).clone())
    return {
        "pytorch_model.bin": encoder.state_dict(),
        "halves.bin": encoder.half().state_dict(),
        "colbert_linear.pt": torch.nn.Linear(4, 4).half().state_dict(),
        "sparse_linear.pt": torch.nn.Linear(4, 1).half().state_dict(),
    }


@pytest.mark.parametrize("writer", ["to a path", "to a stream", "from a GPU", "as torch 1.13"])
def test_reads_files_like_the_released_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str) -> None:
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    if writer == "from a GPU":
        monkeypatch.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
    for file, state in released().items():
        assert type(state) is OrderedDict and state._metadata
        path = tmp_path / file
        if writer == "to a stream":
            with path.open("wb") as stream:
                torch.save(state, stream)
        else:
            torch.save(state, path)
        with zipfile.ZipFile(path) as source:
            names = source.namelist()
            assert names[0] == f"{'archive' if writer == 'to a stream' else path.stem}/data.pkl"
            assert (b"cuda:0" in source.read(names[0])) == (writer == "from a GPU")
            if writer == "as torch 1.13":  # it wrote only these
                kept = [name for name in names if name.split("/")[1] in ("data.pkl", "data", "version")]
                contents = [source.read(name) for name in kept]
        if writer == "as torch 1.13":
            with zipfile.ZipFile(path, "w") as target:
                for name, content in zip(kept, contents, strict=True):
                    target.writestr(name, content)
        loaded = pickles.read(path)
        assert list(loaded) == list(state)
        for name, tensor in state.items():
            assert (str(tensor.dtype), tuple(tensor.shape)) == (f"torch.{loaded[name].dtype}", loaded[name].shape)
            assert loaded[name].tobytes() == torch_bits(tensor), name


class SparseFile(io.FileIO):
    """Leaves holes instead of long zeros, so that a file of 4 GB takes a moment and no disk."""

    def write(self, content) -> int:
        view = memoryview(content).cast("B")
        if len(view) > 2**20 and not any(view[:64]):
            self.seek(len(view), os.SEEK_CUR)
            return len(view)
        return super().write(view)


@pytest.mark.parametrize("writer", ["torch", "ours"])
def test_files_beyond_4_gb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str) -> None:
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    arrays = {"before": np.ones(3, np.float32), "large": np.zeros(2**32 + 64, np.uint8), "after": np.arange(5)}
    path = tmp_path / "x.pt"
    if writer == "torch":
        with SparseFile(path, "w") as file:
            torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, file)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", lambda path, mode: SparseFile(path, mode.replace("b", "")))
            pickles.write(path, arrays)
    assert path.stat().st_size > 2**32
    loaded = pickles.read(path)
    reference = torch.load(path, weights_only=True, mmap=True)
    for name in "before", "after":
        assert same_bits(loaded[name], arrays[name]) and torch_bits(reference[name]) == arrays[name].tobytes()
    assert loaded["large"].shape == tuple(reference["large"].shape) == (2**32 + 64,) and not loaded["large"][-9:].any()


@pytest.mark.parametrize(
    "case", ["old format", "whole module", "nested", "number", "sparse", "uint16", "list", "expanded", "tensor"]
)
def test_torch_files_that_are_no_plain_state_dict_are_refused(tmp_path: Path, case: str) -> None:
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    ones, words = torch.ones(2), []
    value: object = {"w": ones}
    match case:
        case "whole module":
            value, words = torch.nn.Linear(1, 1), ["torch.nn.modules.linear.Linear"]
        case "nested":
            value, words = {"model": {"w": ones}, "w": ones}, ["every value", "'model'", "dict"]
        case "number":
            value, words = {"w": ones, "epoch": 3}, ["every value", "'epoch'", "int"]
        case "sparse":
            value, words = {"w": torch.eye(2).to_sparse()}, ["_rebuild_sparse_tensor"]
        case "uint16":
            value, words = {"w": torch.ones(2, dtype=torch.uint16)}, ["_rebuild_tensor_v3"]
        case "list":
            value, words = [ones], ["no opcode b']'"]
        case "expanded":
            value, words = {"w": torch.ones(1).expand(10**12)}, ["no larger", "1000000000000"]
        case "tensor":
            value, words = ones, ["a dict of tensors", "not a tensor"]
    torch.save(value, tmp_path / "x.pt", _use_new_zipfile_serialization=case != "old format")
    refused(tmp_path / "x.pt", *(words or ["since 1.6"]))


# --- without torch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_is_bit_identical_and_mapped(tmp_path: Path, dtype: str) -> None:
    arrays = {"a": sample(dtype, (5, 7)), "b": sample(dtype, ()), "c": sample(dtype, (0, 3)), "d": sample(dtype, (9,))}
    pickles.write(tmp_path / "x.bin", arrays | {"tied": arrays["a"]})
    loaded = pickles.read(str(tmp_path / "x.bin"))
    assert all(same_bits(loaded[name], array) for name, array in arrays.items())
    assert np.shares_memory(loaded["a"], loaded["tied"])
    for name in "abd":
        assert loaded[name].ctypes.data % 64 == 0
        assert not loaded[name].flags.writeable
        assert_inside_map(loaded[name])


def test_writing_is_deterministic_and_replaces_the_file_that_it_was_read_from(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    pickles.write(path, {"w": sample("float32", (4, 4))})
    first = path.read_bytes()
    loaded = pickles.read(path)
    pickles.write(path, loaded)
    assert path.read_bytes() == first
    pickles.write(path, {"w": np.zeros((4, 4), np.float32)})
    assert same_bits(loaded["w"], sample("float32", (4, 4)))
    assert list(tmp_path.iterdir()) == [path]


def test_the_bytes_depend_on_nothing_but_the_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tied = np.arange(12.0).reshape(3, 4)
    tensors = {"a": tied, "tied": tied, "t": tied.T, "e": tied[:0], "e again": tied[:0], "half": np.ones(2, np.float16)}
    pickles.write(tmp_path / "x.pt", tensors)
    expected = (tmp_path / "x.pt").read_bytes()
    with monkeypatch.context() as patch:  # other addresses, another time, another name
        patch.setattr(time, "time", lambda: 2e9)
        patch.setattr(time, "localtime", lambda *_: time.gmtime(2e9))
        copies = {name: array.copy("K") for name, array in tensors.items()}
        pickles.write(tmp_path / "other.bin", copies | {"tied": copies["a"]})
    assert (tmp_path / "other.bin").read_bytes() == expected
    pickles.write(tmp_path / "x.pt", pickles.read(tmp_path / "x.pt"))
    assert (tmp_path / "x.pt").read_bytes() == expected
    code = (
        "import sys, numpy as np; from m3jax import pickles; tied = np.arange(12.0).reshape(3, 4)\n"
        "pickles.write(sys.argv[1], {'a': tied, 'tied': tied, 't': tied.T.copy(), 'e': np.ones((0, 4)),"
        " 'e again': np.ones((0, 4)), 'half': np.ones(2, np.float16)})"
    )
    env = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "process.pt")], check=True, env=env)
    assert (tmp_path / "process.pt").read_bytes() == expected


def test_nothing_half_written_stands_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.pt"
    pickles.write(path, {"w": sample("float32", (2,))})
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        pickles.write(path, {"w": sample("float32", (200,))})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "tensors",
    [{"w": [1.0]}, {1: np.ones(1)}, {np.str_("w"): np.ones(1)}, {"w": np.ones(1, ">f4")}, {"w": np.ones(1, "c8")}],
)
def test_what_cannot_be_written_is_refused(tmp_path: Path, tensors: dict) -> None:
    with pytest.raises(ValueError, match="convert it"):
        pickles.write(tmp_path / "x.pt", tensors)
    assert not list(tmp_path.iterdir())


def test_large_entries_have_a_zip64_header_and_stay_aligned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pickles.write(tmp_path / "small.pt", {"w": np.ones(3)})
    monkeypatch.setattr(pickles, "_ZIP64_BYTES", 0)
    pickles.write(tmp_path / "large.pt", {"w": np.ones(3)})
    assert (tmp_path / "large.pt").stat().st_size != (tmp_path / "small.pt").stat().st_size
    assert b"\1\0\x10\0" in (tmp_path / "large.pt").read_bytes()
    loaded = pickles.read(tmp_path / "large.pt")["w"]
    assert loaded.ctypes.data % 64 == 0 and loaded.tolist() == [1, 1, 1]
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    assert torch.load(tmp_path / "large.pt", weights_only=True)["w"].tolist() == [1, 1, 1]


def test_the_hand_made_archive_is_read(tmp_path: Path) -> None:
    loaded = pickles.read(archive(tmp_path / "x.pt", tensor_code()))
    assert same_bits(loaded["w"], np.zeros(4, np.float32))


def test_a_missing_file_is_not_a_bad_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        pickles.read(tmp_path / "none.pt")
