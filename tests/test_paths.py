"""Folders written whole: on a disk by a rename, in a store by a marker that comes last."""

import errno
import os
import shutil
import sys
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from m3jax import paths


@pytest.fixture(params=["disk", "store"])
def place(request, tmp_path):
    """Where a folder `model` may be written: a disk, or fsspec's memory file system, which cannot rename a folder."""
    if request.param == "disk":
        yield str(tmp_path)
        return
    url = f"memory://{request.node.name.replace('[', '-').rstrip(']')}"
    yield url
    if fsspec.filesystem("memory").exists(url):
        fsspec.filesystem("memory").rm(url, recursive=True)


def put(destination, **texts):
    with paths.writing(destination, last="last", size=10) as folder:
        for name, text in texts.items():
            path = folder / name.replace("__", "/")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)


def test_written_and_read(place):
    model = f"{place}/model"
    assert not paths.exists(model) and paths.files(model) == []
    put(model, last="a", sub__b="b")
    assert paths.exists(model) and paths.files(model) == ["last", "sub/b"]
    assert paths.read_text(model, "sub/b") == "b"
    with paths.reading(model, lambda names: [name for name in names if name != "last"]) as local:
        found = paths.files(local)
        assert paths.read_text(local, "sub/b") == "b"
    assert found == (["sub/b"] if paths.is_url(model) else ["last", "sub/b"])


def test_the_new_folder_takes_the_place_of_the_old_one(place):
    model = f"{place}/model"
    put(model, last="a", old="gone")
    put(model, last="b", new="here")
    assert paths.files(model) == ["last", "new"] and paths.read_text(model, "last") == "b"
    assert paths.files(place) == ["model/last", "model/new"]


def test_an_error_leaves_what_was(place):
    model = f"{place}/model"
    put(model, last="a")
    with pytest.raises(RuntimeError, match="half"), paths.writing(model, last="last", size=1) as folder:
        (folder / "last").write_text("half")
        raise RuntimeError("half")
    assert paths.files(place) == ["model/last"] and paths.read_text(model, "last") == "a"


def test_what_others_have_beside_it_stays(tmp_path):
    for name in ("model.partial", "model.older", ".model", ".model.m3jax-partial", ".model.b.12345678.m3jax-partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis").write_text("the only copy")
    before = paths.files(tmp_path)
    put(tmp_path / "model", last="a")
    put(tmp_path / "model", last="b")
    assert paths.files(tmp_path) == sorted([*before, "model/last"])


def test_an_error_between_the_two_renames_leaves_what_was(tmp_path, monkeypatch):
    put(tmp_path / "model", last="a")
    rename = Path.rename

    def broken(self, target):
        if self.name == "partial":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(KeyboardInterrupt):
        put(tmp_path / "model", last="b")
    assert paths.files(tmp_path) == ["model/last"] and paths.read_text(tmp_path / "model", "last") == "a"


def test_a_disk_that_fills_up(tmp_path):
    with (
        pytest.raises(ValueError, match=r"model: No space left on device while it was written; make room"),
        paths.writing(tmp_path / "model", last="last", size=1),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert paths.files(tmp_path) == []


def test_too_little_room(place, monkeypatch):
    class Usage:
        free = 9

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(ValueError, match="10 bytes are to be written, but 9 are free; make room"):
        put(f"{place}/model", last="a")
    assert paths.files(place) == []


def test_too_little_room_for_a_copy(monkeypatch):
    class Usage:
        free = 3

    fsspec.filesystem("memory").pipe_file("/large/model", b"1234")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage)
    with (
        pytest.raises(ValueError, match="4 bytes are to be written, but 3 are free; make room"),
        paths.reading("memory://large", list),
    ):
        pass


def test_an_upload_that_breaks_off_never_looks_finished(monkeypatch):
    """Neither where nothing was nor over an older folder: the marker goes first and comes last."""
    model, sent = "memory://broken/model", []
    put(model, last="old", a="old")
    send = MemoryFileSystem.put_file

    def broken(self, local, remote, *args, **kwargs):
        sent.append(remote)
        if len(sent) == 2:
            raise OSError("connection reset")
        send(self, local, remote, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "put_file", broken)
    with pytest.raises(OSError, match="reset"):
        put(model, last="new", a="new", b="new")
    assert "last" not in paths.files(model)
    sent[:] = [""] * 2
    put(model, last="new", a="new", b="new")
    assert sent[-1].endswith("/last") and paths.files(model) == ["a", "b", "last"]


def test_a_store_that_is_not_known_or_empty():
    with pytest.raises(ValueError, match=r"nosuch://x: fsspec must know the store"):
        paths.files("nosuch://x")
    with (
        pytest.raises(
            ValueError, match="memory://nothing: expected a folder with a model or a checkpoint; there is no"
        ),
        paths.reading("memory://nothing", list),
    ):
        pass


def test_a_link_is_replaced_where_it_points_to(tmp_path):
    put(tmp_path / "v1", last="1")
    (tmp_path / "current").symlink_to("v1")
    put(tmp_path / "current", last="2")
    assert (tmp_path / "current").is_symlink() and paths.read_text(tmp_path / "v1", "last") == "2"


def test_the_bar_ends_at_the_size(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with paths.writing(tmp_path / "model", last="last", size=2048, progress=True) as folder:
        (folder / "last").write_bytes(bytes(2048))
    assert "2.05k/2.05k" in capsys.readouterr().err
