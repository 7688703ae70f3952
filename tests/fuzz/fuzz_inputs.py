"""The inputs of fuzz_pickles.py: archives and pickles built from what a zip's headers and a pickle's opcodes can say.

Not here: how they are read and judged.
"""

import io
import pickletools
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# --- inputs: archives ------------------------------------------------------------------------------------------------

LOCAL, CENTRAL, END = "<4sHHHHHIIIHH", "<4sHHHHHHIIIHHHHHII", "<4sHHHHIIH"
END64, LOCATOR = "<4sQHHIIQQQQ", "<4sIQI"
INTEGERS = [
    0,
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    15,
    16,
    63,
    64,
    65,
    127,
    128,
    255,
    256,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
]
INTEGERS += [2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**200, -1, -2, -(2**31), -(2**63), -(2**200)]
NAMES = [
    "a",
    "archive",
    "data",
    "data.pkl",
    "data/0",
    "data/1",
    "DATA/0",
    "Data.PKL",
    "byteorder",
    "BYTEORDER",
    "version",
]
NAMES += ["..", ".", "", "/", "\\", "C:", "a\0b", "ü", "\u212a", "./data/0", "data//0", "data/../0", "constants.pkl"]

Entries = list[tuple[str, bytes]]
Piece = list[Any]  # [struct format, values, the bytes that follow]


def pack(entries: Entries, rng: random.Random, lies: int = 0) -> bytes:
    """A zip archive of stored entries, as torch writes it or as zipfile does, with `lies` in its headers."""
    big, pad, order = rng.random() < 0.3, rng.random() < 0.5, list(range(len(entries)))
    bodies: list[Piece] = []
    directory: list[Piece] = []
    at = 0
    for name, content in entries:
        title = name.encode("utf-8", "surrogatepass")
        flags = 0 if title.isascii() else 0x800
        sizes = struct.pack("<HHQQ", 1, 16, len(content), len(content)) if big else b""
        extra = sizes
        if pad:
            fill = -(at + 34 + len(title) + len(sizes)) % 64
            extra += b"FB" + struct.pack("<H", fill) + bytes(fill)
        size = 2**32 - 1 if big else len(content)
        values = [20, flags, 0, 0, 0, zlib.crc32(content), size, size, len(title)]
        bodies.append([LOCAL, [b"PK\3\4", *values, len(extra)], title + extra + content])
        far = struct.pack("<HHQQQ", 1, 24, len(content), len(content), at) if big else b""
        where = 2**32 - 1 if big else at
        directory.append([CENTRAL, [b"PK\1\2", 20, *values, len(far), 0, 0, 0, 0, where], title + far])
        at += 30 + len(title) + len(extra) + len(content)
    size = sum(46 + len(piece[2]) for piece in directory)
    ends: list[Piece] = []
    if big or rng.random() < 0.3:
        ends.append([END64, [b"PK\6\6", 44, 45, 45, 0, 0, len(entries), len(entries), size, at], b""])
        ends.append([LOCATOR, [b"PK\6\7", 0, at + size, 1], b""])
    ends.append([END, [b"PK\5\6", 0, 0, len(entries), len(entries), size, at, 0], b""])
    for _ in range(lies):
        match rng.randrange(10):
            case 0 if len(order) > 1:
                rng.shuffle(order)
            case 1:
                rng.choice([bodies, directory, ends]).append(rng.choice(directory + bodies))
            case 2:
                group = rng.choice([bodies, directory, ends])
                del group[rng.randrange(len(group)) :][:1]
            case 3:
                piece = rng.choice(directory + bodies)
                piece[2] = replaced(piece[2], rng)
            case _:
                fmt, values, _ = rng.choice(rng.choice([bodies, directory, directory, ends]) or ends or bodies)
                if values:
                    index = rng.randrange(1, len(values))
                    near = [values[index] + rng.choice([-64, -30, -8, -1, 1, 8, 30, 64]), values[index] ^ 1, *INTEGERS]
                    width = struct.calcsize("<" + re.findall(r"\d*[a-zA-Z]", fmt)[index])
                    values[index] = rng.choice([*near[:2] * 8, *near]) % 256**width
    directory = [directory[i] for i in order if i < len(directory)] + directory[len(order) :]
    return b"".join(struct.pack(fmt, *values) + tail for fmt, values, tail in [*bodies, *directory, *ends])


def replaced(content: bytes, rng: random.Random) -> bytes:
    """Changes bytes: flips, cuts, copies, numbers, mostly where the last structures stand."""
    changed = bytearray(content) or bytearray(1)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at = rng.randrange(len(changed)) if rng.random() < 0.6 else max(0, len(changed) - rng.randint(1, 200))
        match rng.randrange(7):
            case 0:
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                changed[at] = rng.choice(b"\0\x01\x02\x7f\x80\xff./PK")
            case 2:
                value = (rng.choice(INTEGERS) % 2**64).to_bytes(8, "little")[: rng.choice([1, 2, 4, 8])]
                changed[at : at + len(value)] = value
            case 3:
                source, size = rng.randrange(len(changed)), rng.randint(1, 64)
                changed[at : at + size * rng.randint(0, 1)] = changed[source : source + size]
            case 4:
                del changed[at : at + rng.choice([1, 2, 3, 22, 64])]
            case 5:
                changed[at:at] = rng.randbytes(rng.randint(1, 4))
            case 6 if rng.random() < 0.3:
                del changed[at:]
        changed = changed or bytearray(1)
    return bytes(changed)


def joined(one: bytes, two: bytes, rng: random.Random) -> bytes:
    """Two archives in one file: before, behind, or in the comment of each other, so that readers may differ."""
    match rng.randrange(4):
        case 0:
            return one + two
        case 1:
            return one[: rng.randrange(len(one))] + two[rng.randrange(len(two)) :]
        case 2:
            return one[:-2] + struct.pack("<H", len(two) % 2**16) + two
        case (
            _
        ):  # the directory of one, which miniz finds by its offset, and that of two, which zipfile finds by its size
            start = one.find(b"PK\1\2")
            shift = len(one)
            end = bytearray(two[-22:])
            if start > 0 and len(end) == 22:
                struct.pack_into("<I", end, 16, rng.choice([start, shift, start + shift]))
            return one[: rng.choice([shift, max(start, 0)])] + two[:-22] + bytes(end)


# --- inputs: pickles -------------------------------------------------------------------------------------------------

STORAGES = ["Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool"]
ITEMSIZES = [4, 2, 2, 8, 8, 4, 2, 1, 1, 1]
GLOBALS = [f"torch {name}Storage" for name in STORAGES]
GLOBALS += ["torch._utils _rebuild_tensor_v2", "collections OrderedDict"]
FOREIGN = [
    "torch._utils _rebuild_parameter",
    "os system",
    "builtins eval",
    "torch UntypedStorage",
    "torch.storage UntypedStorage",
    "torch float32",
    "torch Size",
]
FOREIGN += [
    "torch._utils _rebuild_tensor_v3",
    "torch._utils _rebuild_tensor",
    "torch.nn.parameter Parameter",
    " ",
    "torch",
]
FOREIGN += ["torch ComplexFloatStorage", "collections Counter", "_codecs encode", "builtins set", "torch device"]


def integer(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def string(value: str) -> bytes:
    content = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(content)) + content


def name(value: str) -> bytes:
    return b"c" + value.replace(" ", "\n").encode() + b"\n"


def integers(values: list[int]) -> bytes:
    items = b"".join(map(integer, values))
    return b"(" + items + b"t" if len(values) > 3 else items + [b")", b"\x85", b"\x86", b"\x87"][len(values)]


def split(code: bytes) -> list[bytes]:
    """The opcodes of a pickle, each with its argument."""
    starts = [at for _, _, at in pickletools.genops(code) if at is not None]
    return [code[start:end] for start, end in zip(starts, [*starts[1:], len(code)], strict=True)]


def opcode(rng: random.Random) -> bytes:
    match rng.randrange(12):
        case 0 | 1:
            return integer(rng.choice(INTEGERS))
        case 2:
            return string(rng.choice(["storage", "cpu", "cuda:0", "0", "1", "w", "", "\ud800", *NAMES]))
        case 3:
            return name(rng.choice(GLOBALS + FOREIGN))
        case 4:
            return rng.choice([b"q", b"h"]) + rng.randbytes(1)
        case 5:
            return rng.choice([b"r", b"j"]) + struct.pack("<I", rng.choice(INTEGERS) % 2**32)
        case 6:
            return bytes([rng.randrange(256)])
        case _:
            return bytes([rng.choice(b"()}]tRQsub\x85\x86\x87\x88\x89N.0122ae")])


def reprogrammed(code: bytes, other: bytes, rng: random.Random) -> bytes:
    """Changes opcodes: deletes, repeats, swaps, inserts, and takes over some of another pickle's."""
    codes, others = split(code), split(other)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 5])):
        at = rng.randrange(1, max(len(codes), 2))
        match rng.randrange(9):
            case 0:
                del codes[at : at + rng.choice([1, 1, 2, 5])]
            case 1:
                codes[at:at] = codes[at : at + rng.choice([1, 1, 5, 20])] * rng.choice([1, 1, 2, 50])
            case 2 if len(codes) > 3:
                one = rng.randrange(1, len(codes) - 1)
                codes[one], codes[one + 1] = codes[one + 1], codes[one]
            case 3:
                codes.insert(at, opcode(rng))
            case 4:
                source = rng.randrange(len(others))
                codes[at:at] = others[source : source + rng.choice([1, 3, 20])]
            case 5:
                codes[at : at + 1] = [opcode(rng)]
            case _:  # another argument of the same kind
                at = rng.randrange(len(codes))
                old = codes[at][:1]
                if old in (b"K", b"M", b"J", b"\x8a"):
                    value = int.from_bytes(codes[at][2 if old == b"\x8a" else 1 :], "little", signed=old != b"K")
                    codes[at] = integer(rng.choice([value + 1, value - 1, value * 2, -value, *INTEGERS]))
                elif old == b"X":
                    codes[at] = string(
                        rng.choice([*(c[5:].decode("utf-8", "replace") for c in codes if c[:1] == b"X"), *NAMES])
                    )
                elif old == b"c":
                    codes[at] = name(rng.choice(GLOBALS * 3 + FOREIGN))
                elif old in (b"q", b"h"):
                    codes[at] = old + bytes([rng.randrange(8)])
    return b"".join(codes)


def generated(rng: random.Random) -> Entries:
    """A state dict's archive that is right in most places and wrong in some."""

    def odd(right: Any, *wrong: Any) -> Any:
        return rng.choice(wrong) if rng.random() < 0.02 else right

    stored: list[tuple[int, int, int]] = []  # key, type, numbers
    entries: Entries = [(odd("byteorder", *NAMES), odd(b"little", b"big", b""))]
    for key in range(rng.randint(1, 3)):
        kind, count = rng.randrange(len(STORAGES)), rng.choice([0, 1, 2, 3, 4, 6, 12])
        content = bytearray(rng.randbytes(max(0, odd(count, count + 1, count - 1)) * ITEMSIZES[kind]))
        if STORAGES[kind] == "Bool":
            content = bytearray(byte & odd(1, 3) for byte in content)
        stored.append((key, kind, count))
        entries.append((odd(f"data/{key}", f"Data/{key}", f"data/{key + 1}", *NAMES), bytes(content)))
    code = [b"\x80\x02", odd(name("collections OrderedDict") + b")R", b"}")]
    for index in range(rng.randint(1, 5)):
        key, kind, count = rng.choice(stored)
        if rng.random() < 0.05:  # the same bytes as another type
            other = rng.randrange(len(STORAGES))
            count, kind = count * ITEMSIZES[kind] // ITEMSIZES[other], other
        shape: list[int] = []
        for _ in range(rng.choice([0, 1, 1, 2, 2, 3, odd(4, 64, 65)])):
            shape.append(rng.choice([1, 2, 3, odd(count, 0, -1, *INTEGERS)]))
        strides, step = [], 1
        for size in reversed(shape):
            strides.insert(0, odd(step, 0, step + 1, *INTEGERS))
            step *= size
        if rng.random() < 0.3:
            order = rng.sample(range(len(shape)), len(shape))
            shape, strides = [shape[i] for i in order], [strides[i] for i in order]
        offset = odd(rng.choice([0, 0, 0, 1, max(0, count - step)]), *INTEGERS)
        tensor = name("torch._utils _rebuild_tensor_v2") + b"(("
        tensor += odd(string("storage"), b"N") + name(GLOBALS[kind]) + string(odd(str(key), *NAMES))
        tensor += string(odd("cpu", "cuda:0", "meta", "")) + integer(odd(count, count + 1, -1)) + b"tQ"
        tensor += integer(offset) + integers(shape) + integers(strides) + odd(b"\x89", b"\x88", b"K\0", b"N")
        tensor += odd(name("collections OrderedDict") + b")R", b"}", b"N") + b"tR"
        if rng.random() < 0.2:
            tensor += b"q" + bytes([rng.randrange(4)])
        code.append(string(odd(f"layer.{index}", *NAMES)) + odd(tensor, b"h" + bytes([rng.randrange(4)])) + b"s")
    if rng.random() < 0.2:
        code.append(b"}" + string("_metadata") + name("collections OrderedDict") + b")R" + b"sb")
    entries.insert(0, (odd("data.pkl", *NAMES), b"".join(code) + b"."))
    folder = rng.choice(["a", "archive", "pytorch_model", odd("a", *NAMES)])
    return [(f"{odd(folder, 'b', 'A')}/{title}", content) for title, content in [*entries, ("version", b"3\n")]]


def seeds(folder: Path) -> list[bytes]:
    """State dicts as torch.save and pickles.write write them."""
    import torch

    from m3jax import pickles

    kinds = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]
    views = torch.arange(12.0).reshape(3, 4)
    norm = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    norm[0].weight = torch.nn.Parameter(norm[1].running_mean.repeat(2, 1))
    saved: list[Any] = [{"w": (torch.arange(4) % 2).to(kind)} for kind in kinds]
    saved += [{"a": views, "tied": views, "t": views.T, "part": views[1:, ::2], "empty": views[:0], "one": views[1, 1]}]
    saved += [norm.state_dict(), norm.state_dict(keep_vars=True), torch.nn.Linear(1, 2).half().state_dict()]
    contents: list[bytes] = []
    for value in saved:
        torch.save(value, file := io.BytesIO())
        contents.append(file.getvalue())
        arrays = {k: v.detach().float().numpy() for k, v in value.items()}
        pickles.write(folder / "seed.pt", arrays | {"again": next(iter(arrays.values()))})
        contents.append((folder / "seed.pt").read_bytes())
    return contents


def inputs(seed: int, originals: list[bytes]) -> Iterator[bytes]:
    archives: list[Entries] = []
    for content in originals:
        with zipfile.ZipFile(io.BytesIO(content)) as source:
            archives.append([(entry.orig_filename, source.read(entry)) for entry in source.infolist()])
    yield from originals
    for number in range(2**40):
        rng = random.Random(f"{seed} {number}")
        entries = generated(rng) if rng.random() < 0.4 else list(rng.choice(archives))
        match rng.randrange(12):
            case 0 | 1 | 2:
                yield pack(entries, rng)
            case 3 | 4 | 5 | 6:
                index = next((i for i, (title, _) in enumerate(entries) if title.endswith("data.pkl")), 0)
                other = next(content for title, content in rng.choice(archives) if title.endswith("data.pkl"))
                code = reprogrammed(entries[index][1] if entries[index][1][:1] == b"\x80" else other, other, rng)
                if rng.random() < 0.1:
                    code = replaced(code, rng)
                entries[index] = (entries[index][0], code)
                yield pack(entries, rng)
            case 7 | 8 | 9:
                yield pack(entries, rng, rng.choice([1, 1, 1, 2, 4]))
            case 10:
                yield replaced(rng.choice([*originals, pack(entries, rng)]), rng)
            case 11:
                yield joined(pack(entries, rng), pack(generated(rng), rng, rng.randint(0, 1)), rng)
