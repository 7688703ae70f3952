"""State dicts made by hand, hostile ones too: a pickle in an archive, with one storage.

Not here: what torch itself writes.
"""

import zipfile
from pathlib import Path

import pytest

from m3jax import pickles

PERSISTENT_ID = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n(" + PERSISTENT_ID
TAIL = b"\x89ccollections\nOrderedDict\n)RtR"


def archive(path: Path, code: bytes, **change: bytes) -> Path:
    """A state dict's archive around a pickle, with one storage "0" of four float32."""
    entries = {"a/data.pkl": code, "a/byteorder": b"little", "a/data/0": bytes(16), "a/version": b"3\n"} | change
    with zipfile.ZipFile(path, "w") as target:
        for name, content in entries.items():
            target.writestr(zipfile.ZipInfo(name), content)
    return path


def tensor_code(offset: bytes = b"K\0", shape: bytes = b"K\x04\x85", strides: bytes = b"K\x01\x85") -> bytes:
    return b"\x80\x02}X\x01\0\0\0w" + TENSOR + offset + shape + strides + TAIL + b"s."


def refused(path: Path, *words: str) -> None:
    with pytest.raises(ValueError) as caught:
        pickles.read(path)
    message = str(caught.value)
    assert str(path) in message and "weights_only=True" in message, message
    assert all(word in message for word in words), message
