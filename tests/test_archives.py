"""Tests of m3jax/archives.py through the pickles in them: archives that lie, or that two readers could see as two.

Not here: the pickles (test_pickles.py), random files (test_pickles_fuzz.py).
"""

import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from m3jax import pickles
from tests.torch_files import archive, refused, tensor_code


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"a/data/0": bytes(12)}, "its entry is 12 bytes"),
        ({"a/data/0": bytes(20)}, "its entry is 20 bytes"),
        ({"a/byteorder": b"big"}, "little-endian"),
        ({"a/../../etc/x": b""}, "'..'"),
        ({"a/data/../0": b""}, "'..'"),
        ({"/etc/x": b""}, "absolute"),
        ({"a//data/0": b""}, "absolute"),
        ({"C:/x": b""}, "absolute"),
        ({"a/..\\x": b""}, "absolute"),
        ({"plain": b""}, "folder/name"),
        ({"b/other": b""}, "one top folder"),
        ({"A/other": b""}, "one top folder"),
        ({"a/DATA/0": bytes(16)}, "unique names"),  # torch finds entries without regard to case, and the first of two
        ({"a/ByteOrder": b"big"}, "unique names"),
        ({"a/ü": b""}, "ASCII"),
        ({"a/version": b"4\n"}, "has version 3"),
    ],
)
def test_lies_of_the_archive_are_refused(tmp_path: Path, change: dict[str, bytes], word: str) -> None:
    refused(archive(tmp_path / "x.pt", tensor_code(), **change), word)


def test_missing_entries_are_refused(tmp_path: Path) -> None:
    code = tensor_code().replace(b"X\x01\0\0\x000", b"X\x01\0\0\x001")
    refused(archive(tmp_path / "x.pt", code), "'data/1'", "not there")
    code = tensor_code().replace(b"X\x01\0\0\x000", b"X\x0b\0\0\x00../data.pkl")
    refused(archive(tmp_path / "x.pt", code), "'data/../data.pkl'", "not there")
    with zipfile.ZipFile(tmp_path / "y.pt", "w") as target:
        target.writestr("a/other", b"")
    refused(tmp_path / "y.pt", "data.pkl")


def test_an_entry_of_another_case_counts_as_torch_counts_it(tmp_path: Path) -> None:
    entries = {"a/data.pkl": tensor_code(), "a/BYTEORDER": b"big", "a/Data/0": bytes(16), "a/version": b"3\n"}
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as target:
        for name, content in entries.items():
            target.writestr(name, content)
    refused(tmp_path / "x.pt", "little-endian")


@pytest.mark.parametrize("case", ["behind", "before", "comment", "two directories"])
def test_an_archive_that_readers_could_see_as_two_is_refused(tmp_path: Path, case: str) -> None:
    one = archive(tmp_path / "one.pt", tensor_code()).read_bytes()
    two = archive(tmp_path / "two.pt", tensor_code(), **{"a/data/0": b"\1" * 16}).read_bytes()
    start = two.index(b"PK\1\2")
    content = {
        "behind": one + two,  # zipfile finds the second by its size, torch the first by its offset
        "before": b"PK" + two,
        "comment": one[:-2] + struct.pack("<H", len(two)) + two,
        "two directories": two[:-22] + two[start:],
    }[case]
    (tmp_path / "x.pt").write_bytes(content)
    refused(tmp_path / "x.pt", "whole")


@pytest.mark.parametrize(
    ("at", "form", "value"),
    [(0, "<4s", b"PK\6\5"), (4, "<Q", 45), (16, "<I", 1), (20, "<I", 1), (24, "<Q", 3), (32, "<Q", 3), (40, "<Q", 1),
     (48, "<Q", 1), (60, "<I", 1), (64, "<Q", 1), (72, "<I", 2), (76, "<4s", b"PK\5\5"), (80, "<H", 1), (82, "<H", 1),
     (84, "<H", 3), (86, "<H", 5), (88, "<I", 1), (92, "<I", 1), (96, "<H", 1), (None, "", None)]
)  # fmt: skip
def test_ends_of_the_archive_that_disagree_are_refused(tmp_path: Path, at: int | None, form: str, value) -> None:
    path = archive(tmp_path / "x.pt", tensor_code())
    content = path.read_bytes()
    count, size, start = struct.unpack_from("<HII", content, len(content) - 12)
    end64 = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, start)
    ends = bytearray(end64 + struct.pack("<4sIQI", b"PK\6\7", 0, start + size, 1) + content[-22:])
    if at is None:  # what does not fit into the last record is all ones there
        struct.pack_into("<HHII", ends, 84, 2**16 - 1, 2**16 - 1, 2**32 - 1, 2**32 - 1)
        path.write_bytes(content[:-22] + ends)
        assert pickles.read(path)["w"].tolist() == [0, 0, 0, 0]
    else:
        struct.pack_into(form, ends, at, value)
        path.write_bytes(content[:-22] + ends)
        refused(path, "whole")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicate_and_compressed_entries_are_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.pt", tensor_code())
    with zipfile.ZipFile(path, "a") as target:
        target.writestr("a/data/0", bytes(16))
    refused(path, "unique names")
    path = archive(tmp_path / "y.pt", tensor_code())
    with zipfile.ZipFile(path, "a") as target:
        target.writestr("a/more", bytes(999), zipfile.ZIP_DEFLATED)
    refused(path, "not compressed", "method 8")


@pytest.mark.parametrize(
    ("central", "local", "form", "value", "word"),
    [
        (8, 6, "<H", 1, "flags 0x1"),
        (10, None, "<H", 8, "method 8"),
        (None, 6, "<H", 1, "agree"),
        (None, 8, "<H", 8, "agree"),
        (20, None, "<I", 15, "size 15 of 16"),
        (24, None, "<I", 999, "size 16 of 999"),
        (38, None, "<I", 16, "attributes 0x10"),  # a folder: torch hands out memory that it never filled
        (34, None, "<H", 1, "damaged before byte"),
        (42, None, "<I", 1, "follow each other"),
        (42, None, "<I", 2**31, "follow each other"),
        (None, 0, "<4s", b"PK\1\2", "differ"),
        (None, 30, "<1s", b"b", "differ"),
        (None, 28, "<H", 2**16 - 1, "central directory"),
        ((20, 24), None, "<I", 9999, "central directory"),
        ((20, 24), None, "<I", 2**32 - 1, "cut off or damaged"),  # zip64 sizes are announced and missing
    ],
)
def test_headers_that_lie_are_refused(tmp_path: Path, central, local, form: str, value, word: str) -> None:
    path = archive(tmp_path / "x.pt", tensor_code())
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as source:
        record = content.index(b"PK\1\2", source.start_dir)
        header = source.getinfo("a/data/0").header_offset
    record = content.index(b"a/data/0", record) - 46
    for at in central if isinstance(central, tuple) else () if central is None else (central,):
        struct.pack_into(form, content, record + at, value)
    if local is not None:
        struct.pack_into(form, content, header + local, value)
    path.write_bytes(content)
    refused(path, word)


@pytest.mark.parametrize(
    ("size", "word"), [(2**40, "central directory"), (2**63, "central directory"), (None, "damaged")]
)
def test_zip64_sizes_that_lie_are_refused(tmp_path: Path, size: int | None, word: str) -> None:
    path, entry = tmp_path / "x.pt", zipfile.ZipInfo("a/data.pkl")
    with zipfile.ZipFile(path, "w") as target:
        target.writestr(entry, tensor_code())
        entry.extra = struct.pack("<HHQQ", 1, 16, size, size) if size else struct.pack("<HHQ", 1, 8, 8)
    content = bytearray(path.read_bytes())
    struct.pack_into("<II", content, content.index(b"PK\1\2") + 20, 2**32 - 1, 2**32 - 1)
    path.write_bytes(content)
    refused(path, word)


def test_no_prefix_of_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    pickles.write(path, {"w": np.float32([1, 2])})
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        refused(path)
