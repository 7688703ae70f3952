"""The zip archives of PyTorch's files, read without trust: what two readers could read as two things is refused.

Not here: what the entries hold (pickles.py).
"""

import mmap
import struct
from pathlib import Path

_FLAGS = 0x808  # of a zip's entries: a checksum behind the data, a name in UTF-8; others change what the data mean
_FOLDER = 0x10  # among the attributes of an entry: torch takes it for empty, whatever it holds


def records(path: Path) -> dict[str, memoryview]:
    """The content of each entry of the archive, by its name below the top folder, as a view of the mapped file.

    Not `zipfile`: an archive can be made to hold one set of entries for it and another for torch, which finds the
    directory by another number. Here all that says where something is must agree, and nothing may overlap.
    Checksums are not compared: that would read every byte, and torch.save can be told not to compute them.
    Names are lower-cased, as torch compares them.
    """
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            raise ValueError("the file is a zip archive, as PyTorch writes since 1.6; this one is not (older format?)")
        content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    try:
        entries, limit = _directory(content)
    except struct.error as error:
        raise ValueError("the zip archive is whole; this one is cut off or damaged") from error
    found: dict[str, memoryview] = {}
    folders, reached = set(), 0
    for offset, title, size in sorted(entries):
        folder, _, name = title.partition("/")
        name = name.lower()
        folders.add(folder)
        if {"", ".", ".."} & {folder, *name.split("/")} or set("\\:\0") & set(title) or not title.isascii():
            raise ValueError(f"entries are named folder/name, no '..', not absolute, in ASCII; {short(title)} is not")
        if len(folders) > 1 or name in found:
            raise ValueError(f"entries are unique names in one top folder; {short(title)} is a second")
        if not reached <= offset <= limit - 30:
            raise ValueError(f"entries follow each other in the file; {short(title)} starts at {offset}")
        signature, flags, method, title_bytes, extra_bytes = struct.unpack_from("<4s2x2H16x2H", content, offset)
        start = offset + 30 + title_bytes
        local = bytes(content[start - title_bytes : start])
        if (signature, flags & ~_FLAGS, method, local) != (b"PK\3\4", 0, 0, title.encode()):
            raise ValueError(f"the central directory and the local header agree; they differ on {short(title)}")
        start += extra_bytes
        reached = start + size
        if reached > limit:
            raise ValueError(f"entries end before the central directory at {limit}; {short(title)} ends at {reached}")
        found[name] = content[start:reached]
    return found


def _directory(content: memoryview) -> tuple[list[tuple[int, str, int]], int]:
    """Offset, name and size of each entry in the central directory, and where that starts. struct.error if cut off."""
    end = max(len(content) - 22, 0)
    signature, *disks, here, count, size, start, comment = struct.unpack_from("<4s4H2IH", content, end)
    agree = signature == b"PK\5\6" and not comment
    if end >= 76 and content[end - 20 : end - 16] == b"PK\6\7":
        end -= 76
        # what is too large for the first record is all ones there; else both say the same
        for value, bits, at in (here, 16, 24), (count, 16, 32), (size, 32, 40), (start, 32, 48):
            agree &= value in (2**bits - 1, *struct.unpack_from("<Q", content, end + at))
        signature, length, *more, here, count, size, start, signature64, first, place, total = struct.unpack_from(
            "<4sQ4x2I4Q4sIQI", content, end
        )
        disks += [*more, first]
        agree &= signature == b"PK\6\6" and length == 44 and signature64 == b"PK\6\7" and place == end and total == 1
    if not agree or any(disks) or here != count or start + size != end:
        raise ValueError("the zip archive is whole, of one part, with no comment; this one is cut off or damaged")
    entries, at = [], start
    for _ in range(count):
        signature, flags, method, packed, size, *lengths, disk, attributes, offset = struct.unpack_from(
            "<4s4x2H8x2I4H2x2I", content, at
        )
        at += 46
        middle = at + lengths[0]
        title, extra = bytes(content[at:middle]).decode("ascii", "replace"), content[middle : middle + lengths[1]]
        at += sum(lengths)
        large = [value == 2**32 - 1 for value in (size, packed, offset)]
        if any(large):  # the first extra field has those, of 8 bytes each
            tag, length, *numbers = struct.unpack_from(f"<2H{sum(large)}Q", extra)
            if tag != 1 or length != 8 * len(numbers):
                raise ValueError(f"the zip archive is whole; this one lacks the size of {short(title)}")
            size, packed, offset = (
                numbers.pop(0) if big else n for big, n in zip(large, (size, packed, offset), strict=True)
            )
        if signature != b"PK\1\2" or disk or at > end:
            raise ValueError(f"the zip archive is whole; this one is damaged before byte {at}")
        if flags & ~_FLAGS or method or packed != size or attributes & _FOLDER:
            came = f"flags {flags:#x}, method {method}, size {packed} of {size}, attributes {attributes:#x}"
            raise ValueError(f"entries are files, not compressed, encrypted or patched; {short(title)} has {came}")
        entries.append((offset, title, size))
    if at != end:
        raise ValueError(f"the zip archive is whole; in this one, the directory ends at {at}, not at {end}")
    return entries, start


def short(value: object) -> str:
    return f"{value!r:.80}"
