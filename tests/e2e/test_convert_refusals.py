"""`python -m convert` that is refused, stopped or killed: one line says why, and nothing is left that looks finished.

Not here: what the two formats refuse and list (test_weights.py, test_checkpoint.py).
"""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

pytest.importorskip("orbax.checkpoint", reason="Orbax checkpoints need the train extra")

from convert.__main__ import main
from m3jax import sources
from tests.small_release import files, make_release

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def released(tiny_tokenizer, tmp_path_factory):
    return make_release(tiny_tokenizer, tmp_path_factory.mktemp("released") / "model")


@pytest.mark.parametrize("direction", ["from-pytorch", "to-pytorch"])
def test_errors_end_in_one_line(released, tmp_path, direction):
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "thesis.txt").write_text("the only copy")
    (tmp_path / "file").write_text("")
    new = tmp_path / "new"
    before = files(tmp_path)
    for source, destination, named in [
        (tmp_path / "nowhere", new, "nowhere"),
        (released, occupied, "occupied"),
        (released, tmp_path / "file" / "new", "file"),
    ]:
        for more in ([], ["--overwrite"]):
            with pytest.raises(SystemExit) as end:
                main([direction, str(source), str(destination), *more])
            message = str(end.value)
            assert message.startswith("error: ") and named in message and "\n" not in message
            assert files(tmp_path) == before and not new.exists()


@pytest.mark.parametrize("name", ["sparse_linear.pt", "tokenizer.json", "config.json", "model.safetensors"])
def test_a_missing_file_is_named(released, tmp_path, name):
    directory = shutil.copytree(released, tmp_path / "broken")
    (directory / name).unlink()
    with pytest.raises(SystemExit, match=rf"^error: .*(expected |heads, ){name}"):
        main(["from-pytorch", str(directory), str(tmp_path / "new")])
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize("name", ["model.safetensors", "colbert_linear.pt"])
def test_a_truncated_source_is_refused(released, tmp_path, name):
    directory = shutil.copytree(released, tmp_path / "broken")
    (directory / name).write_bytes((released / name).read_bytes()[:-200])
    with pytest.raises(SystemExit, match=rf"^error: .*{name}: .*(download|write)"):
        main(["from-pytorch", str(directory), str(tmp_path / "new")])
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize("direction", ["from-pytorch", "to-pytorch"])
def test_overwrite_replaces_what_a_conversion_wrote(released, tmp_path, direction):
    other = tmp_path / "other"
    main([direction, str(released), str(other)])
    before = files(other)
    with pytest.raises(SystemExit, match=r"error: .*other must be new"):
        main([direction, str(released), str(other)])
    assert files(other) == before
    main(["to-pytorch", str(released), str(tmp_path / "bf16"), "--dtype", "bfloat16"])
    main([direction, str(tmp_path / "bf16"), str(other), "--overwrite"])
    assert {str(x.dtype) for x in jax.tree.leaves(sources.read(other)[1])} == {"bfloat16"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bf16", "other"]


@pytest.mark.parametrize("direction", ["from-pytorch", "to-pytorch"])
def test_a_full_disk(released, tmp_path, direction, monkeypatch):
    class Usage:
        free = 1000

    new = tmp_path / "new"
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: Usage)
        with pytest.raises(
            SystemExit, match=rf"error: {new}: .* bytes are to be written, but 1,000 are free; make room"
        ):
            main([direction, str(released), str(new)])
    # What the check could not foresee: there is no room for a file while it is written.
    code = """if True:
        import resource, signal, sys
        from convert.__main__ import main
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        main(sys.argv[1:])"""
    command = [sys.executable, "-c", code, direction, str(released), str(new)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"error: {new}: File too large while it was written; make room\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("direction", ["from-pytorch", "to-pytorch"])
def test_a_killed_conversion_leaves_nothing_that_looks_finished(released, tmp_path, direction):
    """The program is stopped for good between the last byte and the new name; the next run takes its place."""
    code = """if True:
        import os, signal, sys
        from pathlib import Path
        from convert.__main__ import main
        Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        main(sys.argv[1:])"""
    arguments = [direction, str(released), str(tmp_path / "new")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    [left] = tmp_path.iterdir()
    assert left.name.startswith(".new.")
    main(arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    sources.read(tmp_path / "new")


@pytest.mark.parametrize("direction", ["from-pytorch", "to-pytorch"])
def test_ctrl_c(released, tmp_path, direction):
    """It comes while one tensor is being written, and Orbax writes others in threads of its own."""
    code = """if True:
        import asyncio, os, signal, sys
        import orbax.checkpoint as ocp
        from convert.__main__ import main
        from m3jax import pickles
        signal.signal(signal.SIGINT, signal.default_int_handler)
        write, handler = pickles.write, ocp.type_handlers.NumpyHandler
        open_and_write = handler._open_and_write
        def interrupted(*given):
            os.kill(os.getpid(), signal.SIGINT)
            write(*given)
        async def slow(*given):
            if not sent:
                sent.append(os.kill(os.getpid(), signal.SIGINT))
            await asyncio.sleep(0.5)
            await open_and_write(*given)
        sent, pickles.write, handler._open_and_write = [], interrupted, slow
        main(sys.argv[1:])"""
    command = [sys.executable, "-c", code, direction, str(released), str(tmp_path / "new")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "interrupted; nothing was finished\n")
    assert list(tmp_path.iterdir()) == []


def test_wrong_tensors_are_all_listed_and_nothing_is_written(released, tmp_path):
    wrong = shutil.copytree(released, tmp_path / "wrong")
    kept = safetensors.numpy.load_file(wrong / "model.safetensors")
    del kept["encoder.layer.1.output.dense.bias"]
    kept["lm_head.bias"] = np.zeros(3, np.float32)
    safetensors.numpy.save_file(kept, wrong / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit, match="error: ") as end:
        main(["from-pytorch", str(wrong), str(tmp_path / "orbax")])
    assert "missing: encoder.layer.1.output.dense.bias" in str(end.value)
    assert "left over: lm_head.bias" in str(end.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["wrong"]


def test_the_program(tmp_path):
    command = [sys.executable, "-m", "convert", "to-pytorch", str(tmp_path / "nowhere"), str(tmp_path / "new")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
