"""encode_to: what was stopped, killed or left without room goes on where it was, with the same texts alone; two processes too.

Not here: what a run that nothing stopped leaves (test_corpus.py).
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import m3jax
from m3jax import corpus, paths, shards
from tests.real_processes import free_address
from tests.small_corpus import SMALL, TEXTS, files, raising, small_model, stopped

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def m3(tiny_tokenizer):
    return small_model(tiny_tokenizer)


@pytest.fixture(scope="module")
def whole(m3, tmp_path_factory):
    """The files of `TEXTS`, never interrupted."""
    directory = tmp_path_factory.mktemp("corpus") / "whole"
    m3jax.encode_to(directory, m3, TEXTS, **SMALL)
    return files(directory)


@pytest.mark.parametrize("after", [0, 4, 5, 12, 20, 22])
def test_it_goes_on_where_it_was_stopped(m3, tmp_path, whole, after, monkeypatch):
    directory = stopped(m3, tmp_path / "x", after)
    # A shard is encoded when the text after it is known.
    assert shards.there(directory) == set(range((after - 1) // 5 if after else 0)) and not list(
        directory.glob(f"{shards.PARTIAL}*")
    )
    if after:
        with pytest.raises(ValueError, match="not finished" if after > 5 else "no settings.json"):
            m3jax.open_embeddings(directory)
    encoded = watch_run(monkeypatch)
    (directory / f"{shards.PARTIAL}of-a-killed-run").mkdir(parents=True)
    m3jax.encode_to(directory, m3, (text for text in TEXTS), **SMALL)
    assert files(directory) == whole
    assert encoded == TEXTS[max(0, after - 1) // 5 * 5 :]
    m3jax.encode_to(directory, m3, TEXTS, **SMALL)  # finished: the texts are compared, nothing is encoded
    assert files(directory) == whole and len(encoded) == 23 - max(0, after - 1) // 5 * 5


def watch_run(monkeypatch):
    """The texts that are encoded, as they come."""
    encoded, run = [], corpus.run

    def watched(m3, parts, *more, **how):
        run(m3, ((encoded.extend(texts), (key, texts))[1] for key, texts in parts), *more, **how)

    monkeypatch.setattr(corpus, "run", watched)
    return encoded


RUN = """
import sys, time
import m3jax
directory, model, texts, stop = sys.argv[1:]
m3 = m3jax.load(model)
texts = open(texts).read().split("\\n")

def some():
    for number, text in enumerate(texts):
        if number == int(stop):
            time.sleep(600)
        yield text

m3jax.encode_to(directory, m3, some(), sparse=True, colbert=True, colbert_dtype="int8", shard_texts=5)
"""


def test_killed_and_called_again_it_is_the_same_bit_for_bit(m3, tmp_path):
    m3jax.save(m3, tmp_path / "model")
    (tmp_path / "texts").write_text("\n".join(TEXTS))

    def run(directory, stop):
        command = [
            sys.executable,
            "-c",
            RUN,
            *map(str, (tmp_path / directory, tmp_path / "model", tmp_path / "texts", stop)),
        ]
        return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)

    m3jax.encode_to(tmp_path / "uninterrupted", m3, TEXTS, colbert_dtype="int8", **SMALL)
    # In the last, while texts come; in the first, between the shards that are there and the one that is being made.
    for stop in (13, 21):
        killed = run("killed", stop)
        deadline = time.monotonic() + 300
        while not (tmp_path / "killed" / f"shard-{(stop - 1) // 5 - 1:08d}").exists():
            assert time.monotonic() < deadline and killed.poll() is None, killed.stderr.read()
            time.sleep(0.01)
        killed.send_signal(signal.SIGKILL)
        assert killed.wait(60) == -signal.SIGKILL
        with pytest.raises(ValueError, match="not finished"):
            m3jax.open_embeddings(tmp_path / "killed")
    assert run("killed", 99).wait(600) == 0
    assert files(tmp_path / "killed") == files(tmp_path / "uninterrupted")
    assert len(m3jax.open_embeddings(tmp_path / "killed")) == 23


def test_a_kill_before_the_settings_are_there(m3, tmp_path, whole):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / f"{shards.PARTIAL}0").write_text("{")
    m3jax.encode_to(tmp_path / "x", m3, TEXTS, **SMALL)
    assert files(tmp_path / "x") == whole


@pytest.mark.parametrize("finished", [False, True], ids=["unfinished", "finished"])
@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (
            [*TEXTS[:3], "other", *TEXTS[4:]],
            r"texts 0 to 4 are there already, but others came in their place \(5 of them\)",
        ),
        (TEXTS[::-1], "texts 0 to 4 are there already"),
        (TEXTS[:8], r"texts 5 to 9 are there already, but others came in their place \(3 of them\)"),
        (["".join(TEXTS[:2]), *TEXTS[2:]], "texts 0 to 4 are there already"),
    ],
    ids=["another", "order", "fewer", "joined"],
)
def test_other_texts_are_refused(m3, tmp_path, whole, texts, message, finished):
    directory = stopped(m3, tmp_path / "x", 12)
    if finished:
        m3jax.encode_to(directory, m3, TEXTS, **SMALL)
    before = files(directory)
    with pytest.raises(ValueError, match=message):
        m3jax.encode_to(directory, m3, texts, **SMALL)
    assert files(directory) == before


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (TEXTS[:5], "shard number 1 is there, but the texts that came end in number 0"),
        (TEXTS[:12], "it is finished with 10 texts, but more came"),
    ],
)
def test_more_or_fewer_texts_at_the_end_of_a_shard_are_refused(m3, tmp_path, texts, message):
    m3jax.encode_to(tmp_path / "x", m3, TEXTS[:10], **SMALL)
    before = files(tmp_path / "x")
    with pytest.raises(ValueError, match=message):
        m3jax.encode_to(tmp_path / "x", m3, texts, **SMALL)
    assert files(tmp_path / "x") == before


def test_what_ends_where_a_shard_is_missing_is_refused_before_it_is_written(m3, tmp_path, whole):
    """As where one of several processes was killed."""
    directory = stopped(m3, tmp_path / "x", 22)
    shutil.rmtree(directory / "shard-00000002")
    with pytest.raises(ValueError, match="shard number 3 is there, but the texts that came end in number 2"):
        m3jax.encode_to(directory, m3, iter(TEXTS[:13]), **SMALL)
    m3jax.encode_to(directory, m3, TEXTS, **SMALL)
    assert files(directory) == whole


def test_a_finished_directory_that_lost_a_shard_is_refused_as_that(m3, tmp_path):
    m3jax.encode_to(tmp_path / "x", m3, TEXTS, **SMALL)
    shutil.rmtree(tmp_path / "x" / "shard-00000001")
    with pytest.raises(ValueError, match="shards were finished, but 1 are not there, shard-00000001 first"):
        m3jax.encode_to(tmp_path / "x", m3, TEXTS, **SMALL)


def test_what_else_is_there_is_left(m3, tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ValueError, match="expected an empty directory or one that encode_to began, found notes"):
        m3jax.encode_to(tmp_path, m3, TEXTS)
    assert files(tmp_path) == {"notes": b"mine"}


def test_an_iterator_is_checked_shard_by_shard(m3, tmp_path, whole, monkeypatch):
    room = [10**9, 10**9, 10**9, 100]
    monkeypatch.setattr(shards, "free", lambda directory: room.pop(0))
    with pytest.raises(
        ValueError, match=r"shard-00000002 takes [\d,]+ bytes, but 100 are free; make room and call encode"
    ):
        m3jax.encode_to(tmp_path / "x", m3, iter(TEXTS), **SMALL)
    assert shards.there(tmp_path / "x") == {0, 1}
    monkeypatch.undo()
    m3jax.encode_to(tmp_path / "x", m3, iter(TEXTS), **SMALL)
    assert files(tmp_path / "x") == whole


def test_what_a_kill_left_half_written_goes_at_once(m3, tmp_path):
    """Not in the end: it takes room on the disk."""
    for _ in range(2):
        stopped(m3, tmp_path / "x", 10)
        assert not list((tmp_path / "x").glob(f"{shards.PARTIAL}*"))
        (tmp_path / "x" / f"{shards.PARTIAL}deadbeef").mkdir()
        (tmp_path / "x" / f"{shards.PARTIAL}beefdead").touch()


def test_a_refused_call_leaves_what_another_is_writing(m3, tmp_path):
    stopped(m3, tmp_path / "x", 10)
    (tmp_path / "x" / f"{shards.PARTIAL}0").mkdir()
    with pytest.raises(ValueError, match="was encoded with instruction"):
        m3jax.encode_to(tmp_path / "x", m3, TEXTS, instruction="q: ", **SMALL)
    assert (tmp_path / "x" / f"{shards.PARTIAL}0").is_dir()


def test_who_writes_what_another_call_clears_away_is_told(m3, tmp_path, monkeypatch):
    """And no shard appears that lacks what was written before: the folder goes away whole."""
    write, written = paths.write_array, []

    def slowly(path, array):
        write(path, array)
        written.append(path.name)
        if len(written) == 2:
            shards.clear(tmp_path / "x")

    def but_the_folder(folder, ignore_errors):
        """What rmtree does where a file is added meanwhile."""
        for path in folder.glob("*"):
            path.unlink()

    monkeypatch.setattr(paths, "write_array", slowly)
    monkeypatch.setattr(shutil, "rmtree", but_the_folder)
    with pytest.raises(ValueError, match=r"shard-00000000 cannot be written .* does another run write here"):
        m3jax.encode_to(tmp_path / "x", m3, TEXTS, **SMALL)
    assert not shards.there(tmp_path / "x")


def test_a_shard_that_lost_an_array_is_not_taken_for_finished(m3, tmp_path, whole):
    stopped(m3, tmp_path / "x", 12)
    (tmp_path / "x" / "shard-00000001" / "dense.npy").unlink()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"dense.npy: .* remove shard-00000001"):
            m3jax.encode_to(tmp_path / "x", m3, TEXTS, **SMALL)
        assert not (tmp_path / "x" / shards.FINISHED).exists()
    shutil.rmtree(tmp_path / "x" / "shard-00000001")
    m3jax.encode_to(tmp_path / "x", m3, TEXTS, **SMALL)
    assert files(tmp_path / "x") == whole


def test_files_that_only_look_like_ours_stay(m3, tmp_path):
    (tmp_path / "partial-notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"expected an empty directory .* found partial-notes.txt"):
        m3jax.encode_to(tmp_path, m3, TEXTS, **SMALL)
    assert (tmp_path / "partial-notes.txt").read_text() == "mine"


def test_a_list_is_looked_through_before_anything_is_written(m3, tmp_path):
    for bad, message in ((3, "text 23 must be a str"), ("a \ud800", "text 23 is not valid Unicode")):
        with pytest.raises(ValueError, match=message):
            m3jax.encode_to(tmp_path / "x", m3, [*TEXTS, bad], **SMALL)
        assert not (tmp_path / "x").exists()


def test_a_full_disk_leaves_what_can_go_on(m3, tmp_path, whole, monkeypatch):
    save, saved = np.save, []

    def full(file, array):
        saved.append(file)
        if len(saved) > 14:
            raise OSError(28, "No space left on device")
        save(file, array)

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(
        ValueError, match=r"shard-00000002 takes [\d,]+ bytes, .* make room .* \(.*No space left on device"
    ):
        m3jax.encode_to(tmp_path / "x", m3, TEXTS, **SMALL)
    assert shards.there(tmp_path / "x") == {0, 1} and not list((tmp_path / "x").glob(f"{shards.PARTIAL}*"))
    monkeypatch.undo()
    m3jax.encode_to(tmp_path / "x", m3, TEXTS, **SMALL)
    assert files(tmp_path / "x") == whole


PROCESSES = """
import os, signal, sys
from pathlib import Path
import jax
directory, model, texts, mode, number, address = sys.argv[1:]
soon = {} if mode in ("apart", "together") else {"heartbeat_timeout_seconds": 10, "shutdown_timeout_seconds": 10}
jax.distributed.initialize(address, num_processes=2, process_id=int(number), **soon)
import numpy as np
import m3jax
from m3jax import corpus, shards
from m3jax.sharding import make_mesh
m3 = m3jax.load(model)
texts = Path(texts).read_text().split("\\n")
if mode in ("together", "differing"):
    everywhere = jax.NamedSharding(make_mesh(), jax.P())
    params = jax.tree.map(lambda x: jax.make_array_from_process_local_data(everywhere, np.asarray(x)), m3.params)
    m3 = m3jax.M3(m3.config, params, m3.tokenizer)
if mode == "differing" and number == "1":
    texts[7], texts[8] = texts[8], texts[7]
encoded, run, written, write = [], corpus.run, [], shards.write_shard

def seen(parts):
    for key, some in parts:
        encoded.append(texts.index(some[0]) // 5)
        if mode in ("killed", "raises") and number == "1":
            os.kill(os.getpid(), signal.SIGKILL) if mode == "killed" else sys.exit("out of patience")
        yield key, some

corpus.run = lambda m3, parts, *more, **how: run(m3, seen(parts), *more, **how)
shards.write_shard = lambda directory, index, *rest, **more: (written.append(index), write(directory, index, *rest, **more))
got = m3jax.encode_to(directory, m3, texts, shard_texts=5, colbert=True)
print(len(got), encoded, written)
"""


@pytest.mark.parametrize("mode", ["apart", "together"])
def test_two_processes(m3, tmp_path, mode):
    """Each writes its shards into one directory, which is that of one process; parameters that span both make both encode
    all. Begun by one process and gone on with by two."""
    texts = [f"{text} {number}" for number, text in enumerate(TEXTS)]
    m3jax.save(m3, tmp_path / "model")
    (tmp_path / "texts").write_text("\n".join(texts))
    expected = files(Path(encode_whole(m3, tmp_path / "whole", texts)))
    with pytest.raises(OSError):
        m3jax.encode_to(tmp_path / "x", m3, raising(texts, 8), shard_texts=5, colbert=True)
    codes, done = on_two(tmp_path, mode)
    assert codes == [0, 0], done
    written = [[1, 3], [2, 4]]
    encoded = written if mode == "apart" else [[1, 2, 3, 4]] * 2
    assert [out.splitlines()[-1] for out, _ in done] == [f"23 {encoded[i]} {written[i]}" for i in range(2)]
    assert ["texts take" in err for _, err in done] == [True, False]
    if mode == "apart":
        assert files(tmp_path / "x") == expected
    got, alone = m3jax.open_embeddings(tmp_path / "x"), m3jax.open_embeddings(tmp_path / "whole")
    np.testing.assert_allclose(got.dense_vecs[:], alone.dense_vecs[:], atol=1e-5)


def on_two(folder, mode):
    """The exit codes of two processes that encode the folder's texts by its model, and what each said."""
    paths = map(str, (folder / "x", folder / "model", folder / "texts", mode))
    command, address = [sys.executable, "-c", PROCESSES, *paths], free_address()
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    given = {"cwd": ROOT, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, str(number), address], **given) for number in range(2)]
    try:
        done = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], done


def test_two_processes_that_must_compute_the_same_batches_refuse_others(m3, tmp_path):
    m3jax.save(m3, tmp_path / "model")
    (tmp_path / "texts").write_text("\n".join(f"{text} {number}" for number, text in enumerate(TEXTS)))
    codes, done = on_two(tmp_path, "differing")
    assert 0 not in codes, done
    for _, error in done:
        assert "among texts 0 to 4 those of processes [1] are not those of process 0" in error
    assert shards.there(tmp_path / "x") <= {0}


@pytest.mark.parametrize("mode", ["killed", "raises"])
def test_where_one_of_two_processes_ends_so_does_the_other_and_both_go_on(m3, tmp_path, mode):
    """By JAX's coordinator, which would wait 100 seconds for one that is killed and 300 for one that raises, here 10."""
    texts = [f"{text} {number}" for number, text in enumerate(TEXTS)]
    m3jax.save(m3, tmp_path / "model")
    (tmp_path / "texts").write_text("\n".join(texts))
    expected = files(Path(encode_whole(m3, tmp_path / "whole", texts)))
    codes, done = on_two(tmp_path, mode)
    assert 0 not in codes, done
    assert codes[1] == -signal.SIGKILL if mode == "killed" else "out of patience" in done[1][1]
    with pytest.raises(ValueError, match="not finished"):
        m3jax.open_embeddings(tmp_path / "x")
    codes, done = on_two(tmp_path, "apart")
    assert codes == [0, 0], done
    assert files(tmp_path / "x") == expected


def encode_whole(m3, directory, texts):
    m3jax.encode_to(directory, m3, texts, shard_texts=5, colbert=True)
    return directory
