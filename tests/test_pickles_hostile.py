"""Hostile pickles in hand-made archives, of which m3jax/pickles.py must refuse each: no code run, no wrong tensor.

Not here: files as PyTorch writes them (test_pickles.py), random ones (test_pickles_fuzz.py).
"""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from m3jax import pickles
from tests.torch_files import PERSISTENT_ID, TAIL, TENSOR, archive, refused, tensor_code


class Shell:
    def __reduce__(self) -> tuple:
        return os.system, ("echo executed >&2",)


@pytest.mark.parametrize(
    "name", ["os\nsystem", "builtins\nexec", "builtins\neval", "builtins\ngetattr", "torch\nload", "collections\nabc",
             "torch._utils\n_rebuild_parameter", "torch._utils\n_rebuild_parameter_with_state",
             "m3jax.pickles\nwrite", "numpy\nndarray"]
)  # fmt: skip
def test_other_globals_are_refused_by_name(tmp_path: Path, name: str) -> None:
    code = b"\x80\x02c" + name.encode() + b"\nX\x04\0\0\0true\x85R."
    refused(archive(tmp_path / "x.pt", code), name.replace("\n", "."))


def test_nested_execution_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        refused(archive(tmp_path / "x.pt", pickle.dumps({"w": {"deep": [Shell()]}}, protocol)))
    state = b"\x80\x02ccollections\nOrderedDict\n)R" + pickle.dumps({"_metadata": Shell()}, 2)[2:-1] + b"b."
    refused(archive(tmp_path / "x.pt", state), "system")
    assert "executed" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("code", "word"),
    [
        (b"", "a state dict has a data.pkl"),
        (b"\x80\x02", "lacks code"),
        (b"\x80\x02}", "lacks code"),
        (b"\x80\x04}.", "no opcode b'\\x80'"),
        (b"\x80\x02.", "lacks stack or mark"),
        (b"\x80\x02R.", "lacks stack or mark"),
        (b"\x80\x02t.", "lacks stack or mark"),
        (b"\x80\x02)b.", "lacks stack or mark"),
        (b"\x80\x02h\x07.", "lacks memo"),
        (b"\x80\x02}X\x01\0\0\0a" + b")" + b"\x85" * 10**5 + b"s.", "'a' is a tuple"),
        (b"\x80\x02}" + b")" + b"\x85" * 10**5 + b"Ns.", "unique strings"),  # hash() of it overflows the C stack
        (
            b"\x80\x02}q\1" + b")q\0" + b"h\0h\0\x86q\0" * 80 + b"h\1h\0Ns.",
            "unique strings",
        ),  # hash() of it takes 2**80 steps
        (b"\x80\x02}" + b"}X\x01\0\0\0ah\0q\0s" * 10**4 + b".", "lacks memo"),
        (b"\x80\x02" + b"}q\0X\x01\0\0\0ah\0s.", "'a' is a dict"),  # holds itself
        (b"\x80\x02Nr\xff\xff\xff\xff.", "not a nonetype"),  # pickle.Unpickler fills 64 GB for this memo
        (b"\x80\x02}(X\x01\0\0\0au.", "pairs"),
        (b"\x80\x02}(X\x01\0\0\0aNX\x01\0\0\0aNu.", "unique"),
        (b"\x80\x02)X\x01\0\0\0aNs.", "into a tuple"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x08\0\0\0__code__Nsb.", "only a dict has a state"),
        (b"\x80\x02ccollections\nOrderedDict\nN}X\x07\0\0\0__new__Ns\x86b.", "only a dict has a state"),
        (b"\x80\x02ccollections\nOrderedDict\n.", "not a global"),
        (b"\x80\x02ccollections\nOrderedDict\n}\x85R.", "OrderedDict(dict)"),
        (b"\x80\x02ctorch\nFloatStorage\nK\x09\x85R.", "torch.FloatStorage(int)"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", "_rebuild_tensor_v2()"),
        (b"\x80\x02" + TENSOR + b"K\0))\x89}X\x01\0\0\0aNstR.", "int, tuple, tuple, bool, dict)"),
        (b"\x80\x02X\x02\0\0\0osX\x02\0\0\0ls\x85R.", "str(str)"),
        (b"\x80\x02NQ.", "a storage is"),
        (b"\x80\x02(" + TENSOR + b"K\0K\x04\x85K\x01\x85" + TAIL + b"NNNNtQ.", "a storage is"),  # array == "storage"
        (b"\x80\x02" + PERSISTENT_ID.replace(b"K\x04", b"\x88") + b".", "a storage is"),
        (b"\x80\x02(X\x07\0\0\0storageccollections\nOrderedDict\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ.", "a storage is"),
        (b"\x80\x02}X\x01\0\0\0w" + PERSISTENT_ID + b"s.", "'w' is a storage"),
        (b"\x80\x02cos\nsystem\n\x81.", "os.system"),
        (b"\x80\x02}\x81.", "no opcode b'\\x81'"),
        (b"\x80\x02\x96\xff\xff\xff\xff\xff\xff\xff\x7f.", "no opcode"),  # BYTEARRAY8 of 2**63 bytes
        (b"\x80\x02\x8a\xff\xff.", "lacks code"),
        (b"\x80\x02\x8b\0\x10\0\0" + b"\x7f" * 4096 + b".", "no opcode"),  # an integer of 10,000 digits
        (b"\x80\x02cx\xff\ny\n.", "lacks UTF-8"),
        (b"\x80\x02}X\x01\0\0\0\xffNs.", "lacks UTF-8"),
        (b"}" * 2**22 + b".", "4194304"),
    ],
)
def test_hostile_pickles_are_refused(tmp_path: Path, code: bytes, word: str) -> None:
    refused(archive(tmp_path / "x.pt", code), word)


@pytest.mark.parametrize(
    ("offset", "shape", "strides", "word"),
    [
        (b"K\x01", b"K\x04\x85", b"K\x01\x85", "within its storage"),
        (b"K\0", b"K\x05\x85", b"K\x01\x85", "within its storage"),
        (b"K\0", b"K\x04\x85", b"K\x02\x85", "within its storage"),
        (b"K\0", b"K\x05\x85", b"K\0\x85", "no larger"),
        (b"K\0", b"\x8a\x09" + b"\0" * 8 + b"\x01\x85", b"K\0\x85", "63 bits"),
        (b"J\xff\xff\xff\xff", b"K\x02\x85", b"K\x01\x85", "negative"),
        (b"K\x03", b"K\x02\x85", b"J\xff\xff\xff\xff\x85", "negative"),
        (b"K\0", b"J\xfe\xff\xff\xffJ\xff\xff\xff\xff\x86", b"K\x01K\x01\x86", "negative"),
        (b"K\0", b"K\x04\x85", b"K\x01K\x01\x86", "as many strides"),
        (b"K\0", b"\x88\x85", b"K\x01\x85", "as many strides"),
        (b"K\0", b"X\x01\0\0\0a\x85", b"K\x01\x85", "as many strides"),
        (b"K\0", b"(" + b"K\x01" * 65 + b"t", b"(" + b"K\x01" * 65 + b"t", "at most 64"),
        (b"N", b"K\x04\x85", b"K\x01\x85", "_rebuild_tensor_v2(storage, nonetype"),
        (b"\x88", b"K\x02\x85", b"K\x01\x85", "_rebuild_tensor_v2(storage, bool"),
        (b"K\0", b"K\x04", b"K\x01\x85", "_rebuild_tensor_v2(storage, int, int"),
        (b"K\0", b"K\0\x8a\x08" + b"\xff" * 7 + b"\x7f\x86", b"K\0K\0\x86", "63 bits"),
        (b"\x8a\x09" + b"\0" * 8 + b"\x01", b"K\0\x85", b"K\x01\x85", "63 bits"),
        (b"K\x03", b"K\x01K\x01\x86", b"\x8a\x09" + b"\0" * 8 + b"\x01K\x07\x86", "63 bits"),
        (b"\x8a\x07" + b"\x7f" * 7, b"K\0\x85", b"\x8a\x07" + b"\x7f" * 7 + b"\x85", None),
        (b"K\x03", b"K\x01K\x01\x86", b"\x8a\x07" + b"\x7f" * 7 + b"K\x07\x86", None),
    ],
)
def test_a_tensor_lies_within_its_storage(
    tmp_path: Path, offset: bytes, shape: bytes, strides: bytes, word: str | None
) -> None:
    path = archive(tmp_path / "x.pt", tensor_code(offset, shape, strides))
    if word is not None:
        refused(path, word)
        return
    assert pickles.read(path)["w"].size <= 1  # nothing of it, or one number, is taken from the storage


def test_a_storage_has_one_type(tmp_path: Path) -> None:
    """torch would give the second tensor the first one's type, whatever the pickle says."""
    first, second = tensor_code()[:-1], tensor_code().replace(b"torch\nFloat", b"torch\nInt")[3:]
    refused(archive(tmp_path / "x.pt", first + second.replace(b"}X\x01\0\0\0w", b"X\x01\0\0\0v")), "one type", "int32")


def test_a_boolean_is_no_other_byte(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    pickles.write(path, {"w": np.array([True] * 100)})
    path.write_bytes(path.read_bytes().replace(b"\1" * 100, b"\1" * 99 + b"\2"))
    refused(path, "0 or 1")
