"""Names on the hub, against a stand-in hub on loopback, each in an interpreter of its own with its own cache.

huggingface_hub reads its environment when it is imported; in an interpreter of its own it is as a user's program has it.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

import m3jax
from m3jax import hub, pickles, safetensor_files, weights
from tests.stand_in_hub import NAME, Hub

SMALL = {
    "config.json",
    "tokenizer.json",
    "sparse_linear.pt",
    "colbert_linear.pt",
    "modules.json",
    "1_Pooling/config.json",
}
SINGLE = SMALL | {"model.safetensors"}
FETCH = "import sys; from m3jax.hub import fetch; print(fetch(sys.argv[1], revision=sys.argv[2] or None))"


class Done(NamedTuple):
    """What a program printed, and its error's last line."""

    out: str
    err: str
    error: str

    @property
    def said(self):
        """Our own lines, without the library's progress bars."""
        return [line for line in re.split(r"[\r\n]+", self.err) if line.startswith((NAME, "ValueError"))]


@pytest.fixture
def stand_in(released):
    server = Hub()
    server.revisions["main"] = released
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(stand_in, tmp_path):
    """Runs Python with a cache of the test's own; `fetch` prints the directory. The network is the stand-in, or nothing."""

    def run(*arguments, **environment):
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
        ours = {
            "HF_ENDPOINT": f"http://127.0.0.1:{stand_in.server_address[1]}",
            "HF_HOME": str(tmp_path / "cache"),
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": str(Path(m3jax.__file__).parents[1]),
        }
        command = [sys.executable, *arguments]
        done = subprocess.run(
            command, env=kept | ours | environment, capture_output=True, text=True, timeout=300, cwd=tmp_path
        )
        error = done.stderr.strip().splitlines()[-1] if done.returncode else ""
        return Done(done.stdout.strip(), done.stderr, error)

    return run


@pytest.fixture
def fetch(run):
    # The library waits a second before it tries again.
    code = f"import time; time.sleep = lambda seconds: None; {FETCH}"
    return lambda name=NAME, revision="", **environment: run("-c", code, name, revision, **environment)


@pytest.fixture
def m3(tiny_tokenizer):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = m3jax.M3Config.tiny(vocab_size=tiny_tokenizer.vocab_size, **sizes)
    return m3jax.M3(config, m3jax.init(config, jax.random.key(0)), tiny_tokenizer)


@pytest.fixture
def released(m3, tmp_path):
    """A repository with the model twice and much that is not needed."""
    folder = tmp_path / "repository"
    m3jax.save(m3, folder)
    for file in ("pytorch_model.bin", "README.md", "onnx/model.onnx", "onnx/config.json", "imgs/cat.png", "rng.pth"):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(b"not needed")
    return folder


def size(folder, files):
    return sum((folder / file).stat().st_size for file in files)


def same(one, other):
    return (
        one.config == other.config
        and one.tokenizer.json == other.tokenizer.json
        and jax.tree.all(jax.tree.map(np.array_equal, one.params, other.params))
    )


def names(folder):
    """The files below a folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def tensors(folder):
    return safetensor_files.read(folder / "model.safetensors")


def test_loads_as_the_directory_does(stand_in, released, run):
    code = """if True:
        import sys, jax, numpy as np, m3jax
        there, here = m3jax.load(sys.argv[1], revision="main"), m3jax.load(sys.argv[2])
        assert there.config == here.config and there.tokenizer.json == here.tokenizer.json
        print(jax.tree.all(jax.tree.map(np.array_equal, there.params, here.params)))"""
    done = run("-c", code, NAME, str(released))
    assert done.out == "True", done.err
    assert set(stand_in.files) == SINGLE


def test_a_name_without_an_owner(stand_in, released, fetch):
    """xlm-roberta-base and -large are older than owners; the hub sends on to FacebookAI's."""
    done = fetch("xlm-roberta-base")
    assert not done.error and names(Path(done.out)) == SINGLE, done.err
    assert tensors(Path(done.out)).keys() == tensors(released).keys()
    assert fetch("xlm-roberta-base", HF_HUB_OFFLINE="1").out == done.out


def test_only_what_is_needed_is_fetched_and_said_before(stand_in, released, fetch):
    done = fetch()
    directory = Path(done.out)
    assert names(directory) == SINGLE == set(stand_in.files)
    assert len(stand_in.files) == len(SINGLE)
    assert all((directory / file).read_bytes() == (released / file).read_bytes() for file in SINGLE)
    said = f"{NAME} at revision main: downloading {size(released, SINGLE):,} bytes in 7 files"
    assert done.said == [said] and done.err.startswith(said)


def test_the_second_time_nothing_is_downloaded_or_said(stand_in, fetch):
    first = fetch()
    stand_in.asked.clear()
    again = fetch()
    assert again.out == first.out and again.err == "" and stand_in.files == []


def test_offline_from_the_cache(stand_in, fetch):
    first = fetch()
    stand_in.asked.clear()
    offline = fetch(HF_HUB_OFFLINE="1")
    assert offline.out == first.out and offline.err == "" and stand_in.asked == []


def test_the_hub_does_not_answer(stand_in, fetch):
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}  # the discard port, where nothing listens
    none = fetch(**nowhere)
    assert re.search(r"127.0.0.1:9 does not answer .*no copy of .*load once with the hub in reach, or give", none.error)
    first = fetch()
    for broken in (fetch(**nowhere), setattr(stand_in, "status", 503) or fetch()):
        assert broken.out == first.out and len(broken.said) == 1
        assert re.search(r"does not answer \(.+\); taking the cached copy$", broken.said[0])


def test_offline_and_not_in_the_cache(stand_in, fetch):
    done = fetch(HF_HUB_OFFLINE="1")
    assert done.error.startswith(f"ValueError: '{NAME}' is no directory here; HF_HUB_OFFLINE is set, and the cache")
    assert "HF_HUB_OFFLINE unset" in done.error and stand_in.asked == []


def test_offline_with_a_part_in_the_cache(stand_in, fetch):
    directory = Path(fetch().out)
    (directory / "sparse_linear.pt").unlink()
    without = fetch(HF_HUB_OFFLINE="1")
    assert without.out == str(directory)
    assert without.said == [
        f"{NAME} at revision main: HF_HUB_OFFLINE is set; taking the cached copy, without sparse_linear.pt"
    ]
    (directory / "model.safetensors").unlink()
    part = fetch(HF_HUB_OFFLINE="1")
    assert "a part only: a model needs model.safetensors or model.safetensors.index.json or pytorch_model" in part.error


def test_revisions(stand_in, released, m3, fetch, tmp_path):
    old = tmp_path / "old"
    m3jax.save(m3jax.M3(m3.config, jax.tree.map(lambda x: x + 1, m3.params), m3.tokenizer), old)
    stand_in.revisions["v/1"] = old
    new, tagged = fetch(), fetch(revision="v/1")
    assert new.out and tagged.out, tagged.err
    commit, _ = stand_in.find("v/1")
    assert (Path(new.out) / "model.safetensors").read_bytes() == (released / "model.safetensors").read_bytes()
    assert (Path(tagged.out) / "model.safetensors").read_bytes() == (old / "model.safetensors").read_bytes()
    # Config and tokenizer are the same bytes, which are not fetched, nor counted, twice.
    changed = {"model.safetensors", "sparse_linear.pt", "colbert_linear.pt"}
    assert tagged.said == [f"{NAME} at revision v/1: downloading {size(old, changed):,} bytes in 3 files"]
    assert fetch(revision=commit).out == tagged.out == fetch(revision="v/1", HF_HUB_OFFLINE="1").out
    assert fetch(HF_HUB_OFFLINE="1").out == new.out


def test_no_such_revision(fetch):
    done = fetch(revision="v9")
    assert done.error.startswith(f"ValueError: {NAME}: the repository has no revision 'v9'; give a branch")


@pytest.mark.parametrize("status", [None, 401, 404])
def test_no_such_repository(stand_in, fetch, status):
    stand_in.status = status
    done = fetch("runs/mdoel")
    assert done.error.startswith(
        "ValueError: 'runs/mdoel' is neither a directory here nor a repository that http://127"
    )
    assert "typing error" in done.error and "HF_TOKEN" in done.error


def test_a_gated_repository(stand_in, fetch):
    stand_in.gated = True  # the list of its files is public
    assert re.search(f"ValueError: {NAME}: the repository is gated; accept its conditions", fetch().error)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_a_missing_file(stand_in, released, fetch, file):
    (released / file).unlink()
    done = fetch()
    assert f"{NAME} at revision main: a model needs {file}; found 1_Pooling/config.json, README.md, " in done.error
    assert stand_in.files == []


def test_no_weights(stand_in, released, fetch):
    for file in ("model.safetensors", "pytorch_model.bin"):
        (released / file).unlink()
    assert "needs model.safetensors or model.safetensors.index.json or pytorch_model.bin; found" in fetch().error
    assert stand_in.files == []


def test_a_repository_of_pickles_without_heads(stand_in, released, m3, fetch):
    pickles.write(released / "pytorch_model.bin", tensors(released))
    for file in ("model.safetensors", "sparse_linear.pt", "colbert_linear.pt"):
        (released / file).unlink()
    directory = Path(fetch().out)
    assert names(directory) == SMALL - set(weights.HEAD_FILES.values()) | {"pytorch_model.bin"}
    there = m3jax.load(directory, heads="init")
    assert jax.tree.all(jax.tree.map(np.array_equal, there.params["encoder"], m3.params["encoder"]))


def shard(folder):
    """Writes the weights of a folder as two shards and an index; beside them, a shard of an older count."""
    whole = tensors(folder)
    (folder / "model.safetensors").unlink()
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    placed = {name: shards[i % 2] for i, name in enumerate(whole)}
    for file in shards:
        safetensor_files.write(folder / file, {k: v for k, v in whole.items() if placed[k] == file})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    shutil.copy(folder / shards[0], folder / "model-00001-of-00003.safetensors")
    return shards


def test_sharded_weights(stand_in, released, m3, fetch):
    shards = shard(released)
    done = fetch()
    needed = SINGLE - {"model.safetensors"} | {"model.safetensors.index.json", *shards}
    assert names(Path(done.out)) == needed == set(stand_in.files)
    # The index says which shards there are, so it comes before the line.
    rest = needed - {"model.safetensors.index.json"}
    assert done.said == [f"{NAME} at revision main: downloading {size(released, rest):,} bytes in 8 files"]
    assert same(m3jax.load(done.out), m3jax.load(released))
    assert fetch(HF_HUB_OFFLINE="1").out == done.out
    (Path(done.out) / shards[1]).unlink()
    assert f"a part only: a model needs {shards[1]}" in fetch(HF_HUB_OFFLINE="1").error


def test_a_missing_shard_and_a_broken_index(stand_in, released, fetch):
    shards = shard(released)
    (released / shards[1]).unlink()
    assert f"a model needs {shards[1]}; found" in fetch().error
    assert stand_in.files == ["model.safetensors.index.json"]
    other = released.rename(released.with_name("other"))
    (other / "model.safetensors.index.json").write_text("[]")
    stand_in.revisions["main"] = other
    assert "model.safetensors.index.json must be JSON" in fetch().error


def test_a_connection_that_closes_once_is_taken_up_again(stand_in, released, fetch):
    stand_in.cut = {"model.safetensors": 1}
    directory = Path(fetch().out)
    assert (directory / "model.safetensors").read_bytes() == (released / "model.safetensors").read_bytes()
    assert stand_in.files.count("model.safetensors") == 2


def test_a_download_that_breaks_leaves_nothing_that_passes_for_whole(stand_in, released, fetch, tmp_path):
    stand_in.cut = {"model.safetensors": 10**6}
    done = fetch()
    assert re.search(r"ValueError: .*: the download broke off at model.safetensors \(.+\); load again", done.error)
    assert not [p for p in (tmp_path / "cache").rglob("model.safetensors")]
    assert "has no copy" in fetch(HF_HUB_OFFLINE="1").error
    stand_in.cut, stand_in.asked = {}, []
    again = fetch()
    assert (Path(again.out) / "model.safetensors").read_bytes() == (released / "model.safetensors").read_bytes()
    assert "config.json" not in stand_in.files  # which had come whole


def test_an_update_that_breaks_leaves_the_older_copy_offline(stand_in, m3, fetch, tmp_path):
    first = fetch()
    new = tmp_path / "new"
    m3jax.save(m3jax.M3(m3.config, jax.tree.map(lambda x: x + 1, m3.params), m3.tokenizer), new)
    stand_in.revisions["main"] = new
    stand_in.cut = {"model.safetensors": 10**6}
    assert "broke off" in fetch().error
    assert fetch(HF_HUB_OFFLINE="1").out == first.out
    stand_in.cut = {}
    commit, _ = stand_in.find("main")
    assert fetch().out == fetch(HF_HUB_OFFLINE="1").out == str(Path(first.out).with_name(commit)) != first.out


def test_a_file_of_another_length_than_the_hub_names(stand_in, fetch):
    stand_in.listed = {"model.safetensors": 10}
    done = fetch()
    found = re.search(
        r"model.safetensors must have the 10 bytes .* but has [\d,]+; remove (.+) and load again", done.error
    )
    assert found and "has no copy" in fetch(HF_HUB_OFFLINE="1").error
    stand_in.listed = {}
    Path(found[1]).unlink()
    assert (Path(fetch().out) / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "text", ["bge-m3", "runs/x/model", "./runs/model", "/none/model", "~/model", "a/", "a b/c", "../m"]
)
def test_neither_a_directory_nor_a_name(text):
    with pytest.raises(
        ValueError, match=f"name on the hub such as 'BAAI/bge-m3', got '{re.escape(text)}', which is nei"
    ):
        hub.fetch(text)


def test_directories_and_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "model").mkdir(parents=True)
    (tmp_path / "runs" / "file").write_text("")
    assert hub.fetch("runs/model") == Path("runs/model")
    with pytest.raises(ValueError, match="revision is for names on the hub, but 'runs/model' is a directory"):
        m3jax.load("runs/model", revision="main")
    for other in ("runs/file", Path("runs/none")):
        with pytest.raises(ValueError, match="which is neither"):
            hub.fetch(other)


def test_convert_takes_a_name(released, run, tmp_path):
    done = run("-m", "convert", "from-pytorch", NAME, "checkpoint", "--revision", "main")
    assert done.out.startswith("checkpoint: 27 tensors, "), done.err
    assert same(m3jax.load(tmp_path / "checkpoint"), m3jax.load(released))


def test_the_heads_are_those_that_load_reads():
    assert set(hub._HEADS) == set(weights.HEAD_FILES.values())
