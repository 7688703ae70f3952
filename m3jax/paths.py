"""Folders that are read and written whole, on disks and in object stores: nothing half-written under a finished name.

Not here: what is in them (weights.py, checkpoint.py). A path is local, or a URL that fsspec knows (gs://, s3://, memory://);
the contents of a URL pass through a temporary folder.
"""

import errno
import glob
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from tqdm import tqdm


def is_url(path: str | Path) -> bool:
    """Whether a path is in an object store: a str with a scheme.

    >>> is_url("gs://bucket/model"), is_url("runs/model")
    (True, False)
    """
    return "://" in str(path)


def exists(path: str | Path) -> bool:
    """Whether a path is taken: a file or folder, even an empty one; in a store, a folder is there when it has a file."""
    return bool(files(path)) if is_url(path) else os.path.lexists(path)


def files(path: str | Path) -> list[str]:
    """The files below a folder, as sorted relative names with `/`; [] where there is none. A file is its own only one."""
    if is_url(path):
        store, root = _store(path)
        return sorted(name.removeprefix(root).strip("/") or Path(name).name for name in store.find(root))
    folder = Path(path)
    if folder.is_file():
        return [folder.name]
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def read_text(folder: str | Path, name: str) -> str:
    """The text of one file of a folder; bytes that are no UTF-8 become replacement characters."""
    if is_url(folder):
        store, root = _store(folder)
        return store.cat_file(f"{root}/{name}").decode("utf-8", "replace")
    return Path(folder, name).read_text(encoding="utf-8", errors="replace")


@contextmanager
def reading(source: str | Path, needed: Callable[[Sequence[str]], Sequence[str]]) -> Iterator[str | Path]:
    """`source` itself, or of a URL a local folder with its `needed` files, which is gone when the block ends.

    What is memory-mapped in the block stays readable after it. A bar on stderr, if that is a terminal, follows the download.
    Raises ValueError where the URL holds no file, or the disk has too little room for a copy.
    """
    if not is_url(source):
        yield source
        return
    there = files(source)
    if not there:
        raise ValueError(f"{source}: expected a folder with a model or a checkpoint; there is no file")
    store, root = _store(source)
    sizes = {name: store.size(f"{root}/{name}") or 0 for name in needed(there)}
    with tempfile.TemporaryDirectory() as folder:
        _check_room(Path(folder), sum(sizes.values()), Path(folder).parent)
        with tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc="download", disable=None) as bar:
            for name, size in sizes.items():
                path = Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                store.get_file(f"{root}/{name}", str(path))
                bar.update(size)
        yield Path(folder)


@contextmanager
def writing(destination: str | Path, *, last: str, size: int, progress: bool = False) -> Iterator[Path]:
    """An empty local folder to fill, which takes the place of `destination` when the block ends; an error leaves what was.

    On a disk it is filled in a hidden folder beside and renamed into place; the next writing removes what a killed process left
    there. A store has no such rename: there the file `last`, without which nobody takes the folder for finished, goes first of
    the old ones and comes last of the new ones. size: bytes to come; ValueError where the disk has fewer free, or fills up
    meanwhile. progress shows a bar on stderr, if that is a terminal.
    """
    if is_url(destination):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary, "partial")  # within it, because Orbax puts more beside the folder that it fills
            folder.mkdir()
            _check_room(folder, size, tempfile.gettempdir())
            with _telling_room(tempfile.gettempdir()), _bar(folder, size, "write", progress):
                yield folder
            _upload(folder, destination, last, progress)
        return
    directory = Path(os.path.realpath(destination))  # a link is replaced where it points to
    directory.parent.mkdir(parents=True, exist_ok=True)
    _sweep(directory)
    beside = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=_BESIDE, dir=directory.parent))
    partial, older = beside / "partial", beside / "older"
    try:
        partial.mkdir()
        _check_room(partial, size, destination)
        with _telling_room(destination), _bar(partial, size, "write", progress):
            yield partial
        # The old one keeps its name until the new one is complete, and is never half removed under it.
        if directory.exists():
            directory.rename(older)
        partial.rename(directory)
    finally:
        if older.exists() and not directory.exists():
            older.rename(directory)
        _sweep(directory)


_BESIDE = ".m3jax-partial"


def _sweep(directory: Path) -> None:
    """Remove what writing left beside a directory, killed processes too; but not the only copy of what it held."""
    for left in directory.parent.glob(f".{glob.escape(directory.name)}.????????{_BESIDE}"):  # the ? are mkdtemp's
        if directory.exists() or not (left / "older").exists():
            shutil.rmtree(left, ignore_errors=True)


def _check_room(folder: Path, size: int, destination: str | Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise ValueError(f"{destination}: {size:,} bytes are to be written, but {free:,} are free; make room")


@contextmanager
def _telling_room(destination: str | Path) -> Iterator[None]:
    """A disk that fills up meanwhile as ValueError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise ValueError(f"{destination}: {error.strerror} while it was written; make room") from error


@contextmanager
def _bar(folder: Path, size: int, what: str, shown: bool) -> Iterator[None]:
    """A bar that follows the bytes in a folder: Orbax does not say how far it is."""
    done = threading.Event()

    def follow(bar: tqdm) -> None:
        while not done.wait(0.2):
            there = 0
            for name in files(folder):
                with suppress(OSError):  # renamed meanwhile
                    there += (folder / name).stat().st_size
            bar.update(min(there, size) - bar.n)

    with tqdm(total=size, unit="B", unit_scale=True, desc=what, disable=None if shown else True) as bar:
        thread = threading.Thread(target=follow, args=(bar,), daemon=True)
        if shown:
            thread.start()
        try:
            yield
            bar.update(size - bar.n)
        finally:
            done.set()
            if shown:
                thread.join()


def _upload(folder: Path, url: str | Path, last: str, progress: bool) -> None:
    store, root = _store(url)
    old, new = files(url), files(folder)
    for name in sorted(old, key=lambda name: name != last):
        if name == last or name not in new:
            store.rm_file(f"{root}/{name}")
    size = sum((folder / name).stat().st_size for name in new)
    with tqdm(total=size, unit="B", unit_scale=True, desc="upload", disable=None if progress else True) as bar:
        for name in sorted(new, key=lambda name: name == last):
            store.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
            store.put_file(str(folder / name), f"{root}/{name}")
            bar.update((folder / name).stat().st_size)


def _store(url: str | Path) -> tuple[Any, str]:
    """fsspec's file system and the path in it."""
    import fsspec  # here: who has local paths does not wait for it

    try:
        store, root = fsspec.core.url_to_fs(str(url), use_listings_cache=False)
    except (ImportError, ValueError) as error:  # a store's package is missing; an unknown scheme
        raise ValueError(f"{url}: fsspec must know the store; {error}") from error
    return store, root.rstrip("/")


def write_array(path: Path, array: np.ndarray) -> None:
    """Write an array as a .npy file, which is on the disk when this returns. OSError where it does not fit."""
    with open(path, "wb") as file:
        # Of files that it knows NumPy takes the descriptor, and says nothing where the disk cuts off the last bytes.
        unknown: Any = SimpleNamespace(write=file.write)
        np.save(unknown, array)
        file.flush()
        os.fsync(file.fileno())
