"""PyTorch's zip pickles (`.bin`, `.pt`) without torch: a reader that can execute nothing, a small writer.

Not here: the zip archive around the pickle (archives.py), names of a model, conversions, the format before PyTorch 1.6.
"""

import io
import math
import os
import pickle
import secrets
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from m3jax import archives
from m3jax.archives import short

_TYPES = {"Double": "f8", "Float": "f4", "Half": "f2", "BFloat16": ml_dtypes.bfloat16}
_TYPES |= {"Long": "i8", "Int": "i4", "Short": "i2", "Char": "i1", "Byte": "u1", "Bool": "?"}
_STORAGES = {f"torch {name}Storage": np.dtype(dtype) for name, dtype in _TYPES.items()}
_DICT, _TENSOR = "collections OrderedDict", "torch._utils _rebuild_tensor_v2"
_CONSTANTS = {pickle.NONE: None, pickle.NEWTRUE: True, pickle.NEWFALSE: False, pickle.EMPTY_TUPLE: ()}
_TUPLES = {pickle.TUPLE1: 1, pickle.TUPLE2: 2, pickle.TUPLE3: 3}
# the number that follows an opcode; of BINUNICODE and LONG1 it is the length of what follows then
_NUMBERS = {pickle.PROTO: "<B", pickle.BININT1: "<B", pickle.BININT2: "<H", pickle.BININT: "<i", pickle.LONG1: "<B"}
_NUMBERS |= {pickle.BINPUT: "<B", pickle.BINGET: "<B", pickle.LONG_BINPUT: "<I", pickle.LONG_BINGET: "<I"}
_NUMBERS |= {pickle.BINUNICODE: "<I"}
_MAX_PICKLE_BYTES = 2**22  # 40,000 tensors of 100 bytes each; the worst that was found takes 12 s and 0.4 GB
_ZIP64_BYTES = 2**30  # below zipfile's own limit, so that the choice, which moves the data by 20 bytes, is ours alone
_MAX_DIMENSIONS = 64  # numpy's own limit
_ALIGNMENT = 64  # torch's default: torch.utils.serialization.config.save.storage_alignment
_ADVICE = (
    "Fetch it again if it was downloaded; else, if you trust where it comes from, write its tensors anew in PyTorch: "
    "torch.save({k: v.detach().contiguous() for k, v in torch.load(path, weights_only=True).items()}, path)"
)


@dataclass(frozen=True)
class _Global:
    """A name that the pickle imports, as "module name"; nothing is imported for it."""

    name: str


@dataclass(frozen=True)
class _Storage:
    """One storage as a flat array over the mapped file; a class of its own, so that it cannot pass for a tensor."""

    values: np.ndarray


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The tensors of a state dict that `torch.save` wrote, by name: read-only views of the mapped file.

    Tied tensors share memory, and strides are kept. No tensor is larger than its storage, so a small file stays small.
    ValueError for whatever is not a zip archive of stored entries with a flat dict of dense CPU or GPU tensors in it.
    Format: torch/serialization.py (`_save`, `_load`) and torch/_utils.py (`_rebuild_tensor_v2`) of PyTorch 2.13.
    """
    try:
        records = archives.records(Path(path))
        if records.get("byteorder", b"little") != b"little":
            raise ValueError(f"numbers are stored little-endian, byteorder says {short(bytes(records['byteorder']))}")
        if not 0 < len(records.get("data.pkl", b"")) <= _MAX_PICKLE_BYTES:
            raise ValueError(f"a state dict has a data.pkl of at most {_MAX_PICKLE_BYTES} bytes; this one has not")
        if (version := records.get("version")) != b"3\n":
            raise ValueError(f"the format has version 3; this one says {short(version and bytes(version[:9]))}")
        tensors = _unpickle(records)
        if type(tensors) is not dict:
            raise ValueError(f"the pickle holds a dict of tensors by name, not a {_kind(tensors)}")
        for name, value in tensors.items():
            if not isinstance(value, np.ndarray):
                raise ValueError(f"every value of the dict is a tensor, but {short(name)} is a {_kind(value)}")
        return tensors
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}. {_ADVICE}") from error


def write(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray]) -> None:
    """Write what `torch.load(path, weights_only=True)` reads as an OrderedDict of contiguous tensors, dtypes kept.

    Arrays that are the same memory (address, dtype, shape, strides) become tied tensors and are stored once; the bytes
    depend on nothing else but names, order, dtypes, shapes and numbers. The file appears at `path` only when it is
    whole. ValueError for a name that is no str and a dtype that `read` does not know.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(f"{folder}/two.pt", {"a": np.float32([1, 2]), "b": np.array(3)})
    ...     read(f"{folder}/two.pt")
    {'a': array([1., 2.], dtype=float32), 'b': array(3)}
    """
    arrays = dict(tensors)  # held to the end: an address stands for an array only while the array lives
    storages: dict[tuple[object, ...], tuple[int, np.ndarray]] = {}
    code = [b"\x80\x02", _code(OrderedDict()), b"("]
    for name, array in arrays.items():
        if type(name) is not str or not isinstance(array, np.ndarray):  # a subclass would be pickled by its class
            raise ValueError(
                f"tensors are numpy arrays by str name, not {type(array).__name__} by {name!r}; convert it"
            )
        storage = next((key for key, dtype in _STORAGES.items() if dtype == array.dtype), None)
        if storage is None:
            known = ", ".join(dtype.name for dtype in _STORAGES.values())
            raise ValueError(f"{name!r} has dtype {array.dtype.str} ({array.dtype.name}); convert it to one of {known}")
        # nothing is shared where nothing is: an empty array's address may be anything, so its name stands for it
        memory = (array.ctypes.data if array.size else name, array.dtype, array.shape, array.strides)
        index, _ = storages.setdefault(memory, (len(storages), array))
        # not array.strides: numpy's of an axis of length 1 are arbitrary, even negative
        strides = tuple(math.prod(max(n, 1) for n in array.shape[axis + 1 :]) for axis in range(array.ndim))
        code += [_code(name), _global(_TENSOR), b"((", _code("storage"), _global(storage), _code(str(index))]
        code += [_code("cpu"), _code(array.size), b"tQ", *map(_code, (0, array.shape, strides, False, OrderedDict()))]
        code += [b"tR"]
    code.append(b"u.")

    path = Path(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:
            with zipfile.ZipFile(file, "w") as archive:
                _add(archive, "data.pkl", b"".join(code))
                _add(archive, "byteorder", b"little")
                for index, array in storages.values():
                    _add(archive, f"data/{index}", array.ravel().view(np.uint8).data)
                _add(archive, "version", b"3\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _code(value: object) -> bytes:
    """The opcodes that push a plain value; they overwrite the memo, which the rest of the pickle never reads."""
    return pickle.dumps(value, protocol=2)[2:-1]


def _global(name: str) -> bytes:
    return b"c" + name.replace(" ", "\n").encode() + b"\n"


def _add(archive: zipfile.ZipFile, name: str, content: bytes | memoryview) -> None:
    entry = zipfile.ZipInfo(f"archive/{name}")
    zip64 = len(content) >= _ZIP64_BYTES
    padding = -(archive.start_dir + 30 + len(entry.filename) + 4 + 20 * zip64) % _ALIGNMENT
    entry.extra = b"FB" + struct.pack("<H", padding) + bytes(padding)
    with archive.open(entry, "w", force_zip64=zip64) as file:
        file.write(content)
    entry.extra = b""  # the padding belongs to the local header; the central directory does not repeat it


def _unpickle(records: Mapping[str, memoryview]) -> object:
    """Run data.pkl on a machine of the few opcodes that a state dict needs, over inert values.

    Not `pickle.Unpickler`: with no class at all to find, a deep tuple as a dict key still overflows its C stack and
    one LONG_BINPUT makes it fill 64 GB. Here keys are str, the memo is a dict, and nothing recurses.
    """
    code = io.BytesIO(records["data.pkl"])
    stack: list[object] = []
    marks: list[list[object]] = []
    memo: dict[int, object] = {}
    storages: dict[str, _Storage] = {}

    def take(size: int) -> bytes:
        if len(taken := code.read(size)) < size:
            raise EOFError
        return taken

    try:
        while (opcode := take(1)) != pickle.STOP:
            form = _NUMBERS.get(opcode, "")
            (number,) = struct.unpack(form, take(struct.calcsize(form))) if form else (0,)
            match opcode:
                case pickle.PROTO if number == 2:
                    pass
                case pickle.MARK:
                    marks.append(stack)
                    stack = []
                case pickle.EMPTY_DICT:
                    stack.append({})
                case pickle.BININT | pickle.BININT1 | pickle.BININT2:
                    stack.append(number)
                case pickle.LONG1:
                    stack.append(int.from_bytes(take(number), "little", signed=True))
                case pickle.BINUNICODE:
                    stack.append(take(number).decode())
                case _ if opcode in _CONSTANTS:
                    stack.append(_CONSTANTS[opcode])
                case _ if opcode in _TUPLES:
                    stack.append(tuple([stack.pop() for _ in range(_TUPLES[opcode])][::-1]))
                case pickle.TUPLE:
                    items, stack = stack, marks.pop()
                    stack.append(tuple(items))
                case pickle.BINPUT | pickle.LONG_BINPUT:
                    memo[number] = stack[-1]
                case pickle.BINGET | pickle.LONG_BINGET:
                    stack.append(memo[number])
                case pickle.GLOBAL:
                    name = (code.readline() + code.readline()).decode().removesuffix("\n").replace("\n", " ")
                    if name not in (_DICT, _TENSOR, *_STORAGES):
                        came = short(name.replace(" ", "."))
                        raise ValueError(f"the pickle may name only OrderedDict and torch's dense tensors, not {came}")
                    stack.append(_Global(name))
                case pickle.BINPERSID:
                    stack.append(_storage(stack.pop(), records, storages))
                case pickle.REDUCE:
                    args, function = stack.pop(), stack.pop()
                    stack.append(_reduce(function, args))
                case pickle.SETITEM:
                    items = [stack.pop(-2), stack.pop()]
                    _set_items(stack[-1], items)
                case pickle.SETITEMS:
                    items, stack = stack, marks.pop()
                    _set_items(stack[-1], items)
                case pickle.BUILD:  # the `_metadata` of nn.Module.state_dict(): versions of the modules, no tensors
                    state = stack.pop()
                    if type(state) is not dict or type(stack[-1]) is not dict:
                        raise ValueError(f"only a dict has a state, a dict; not a {_kind(stack[-1])} a {_kind(state)}")
                case _:
                    raise ValueError(f"a state dict in pickle protocol 2 has no opcode {opcode} at byte {code.tell()}")
        return stack.pop()
    except (EOFError, IndexError, KeyError, UnicodeDecodeError) as error:
        missing = {EOFError: "code", IndexError: "stack or mark", KeyError: "memo"}.get(type(error), "UTF-8")
        raise ValueError(f"data.pkl is whole; this one lacks {missing} at byte {code.tell()}") from error


def _set_items(target: object, items: list[object]) -> None:
    if type(target) is not dict or len(items) % 2:
        raise ValueError(f"pairs of name and value go into a dict, not {len(items)} objects into a {_kind(target)}")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) is not str or key in target:
            raise ValueError(f"names are unique strings; {short(key) if type(key) is str else _kind(key)} is not")
        target[key] = value


def _storage(identity: object, records: Mapping[str, memoryview], storages: dict[str, _Storage]) -> _Storage:
    match identity:
        case (str("storage"), _Global(kind), str(key), str(), size) if kind in _STORAGES and type(size) is int:
            dtype, name = _STORAGES[kind], f"data/{key}"
        case _:
            raise ValueError("a storage is ('storage', type, key, device, size) with a type that torch.save writes")
    if name not in records or len(records[name]) != size * dtype.itemsize:
        came = f"{len(records[name])} bytes" if name in records else "not there"
        raise ValueError(f"storage {short(name)} has {size} × {dtype.itemsize} bytes; its entry is {came}")
    storage = storages.setdefault(name, _Storage(np.frombuffer(records[name], dtype)))
    if storage.values.dtype != dtype:  # torch would go on with the first type
        raise ValueError(f"a storage has one type; {short(name)} is {storage.values.dtype} and {dtype}")
    # any other byte is undefined behaviour in numpy's boolean loops
    if dtype == np.bool_ and np.frombuffer(records[name], np.uint8).max(initial=0) > 1:
        raise ValueError(f"booleans are stored as 0 or 1; {short(name)} holds another byte")
    return storage


def _reduce(function: object, args: object) -> object:
    match function, args:
        case _Global(name), () if name == _DICT:
            return {}
        case _Global(name), (
            _Storage(values), offset, tuple(shape), tuple(strides), bool(), dict(hooks)
        ) if name == _TENSOR and type(offset) is int and not hooks:  # fmt: skip
            return _tensor(values, offset, shape, strides)
    called = function.name.replace(" ", ".") if isinstance(function, _Global) else _kind(function)
    came = ", ".join(_kind(arg) for arg in args[:8]) if isinstance(args, tuple) else _kind(args)
    raise ValueError(f"torch.save calls OrderedDict() and its functions for dense tensors, not {called}({came})")


def _tensor(values: np.ndarray, offset: int, shape: tuple[object, ...], strides: tuple[object, ...]) -> np.ndarray:
    sizes = [n for n in shape if type(n) is int and n >= 0]
    steps = [n for n in strides if type(n) is int and n >= 0]
    if not len(sizes) == len(shape) == len(strides) == len(steps) <= _MAX_DIMENSIONS or offset < 0:
        raise ValueError(f"a tensor has as many strides as sizes, at most {_MAX_DIMENSIONS}, and nothing is negative")
    if max(offset, *steps, math.prod(max(size, 1) for size in sizes) * values.itemsize) >= 2**63:
        raise ValueError("a tensor's numbers fit into 63 bits; this one's do not")
    if math.prod(sizes) == 0:
        return np.ndarray(sizes, values.dtype)
    end = offset + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True)) + 1
    if end > values.size or math.prod(sizes) > values.size:  # the second is an expanded tensor
        came = f"shape {short(sizes)}, strides {short(steps)}, offset {short(offset)}"
        raise ValueError(f"a tensor lies within its storage of {values.size} and is no larger; this one has {came}")
    # the stride of an axis of length 1 is never taken, and may be any number
    steps = [step * values.itemsize if size > 1 else values.itemsize for size, step in zip(sizes, steps, strict=True)]
    return np.ndarray(sizes, values.dtype, values, offset * values.itemsize, steps)


def _kind(value: object) -> str:
    return "tensor" if isinstance(value, np.ndarray) else type(value).__name__.lstrip("_").lower()
