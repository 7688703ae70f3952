"""encode in processes of its own: on eight devices, in two processes of jax.distributed, with a compilation cache.

Not here: what one process on one device gives (../test_encoding.py, ../test_encoding_run.py).
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import m3jax
from tests.conftest import LINES
from tests.random_model import random_model
from tests.real_processes import HEEDING, free_address

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("encode_worker.py")
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "colbert_dim": 8}


@pytest.fixture(scope="module")
def model(tiny_tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("e2e") / "model"
    m3jax.save(random_model(tiny_tokenizer, **SIZES, max_position_embeddings=1026), path)
    return path


@pytest.fixture(scope="module")
def texts():
    """Short ones, and one of more than 512 tokens, for which attention works in blocks."""
    random = np.random.default_rng(0)
    words = " ".join(LINES).split()
    made = [" ".join(random.choice(words, n)) for n in [*random.integers(1, 12, 50), 170]]
    return ["", *made]


@pytest.fixture(scope="module")
def expected(model, texts):
    """All of them in this process, on one device."""
    return m3jax.encode(m3jax.load(model), texts, colbert=True)


def environment(**variables):
    ours = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return {key: value for key, value in (os.environ | ours | variables).items() if value is not None}


def start(given, devices):
    arguments = [sys.executable, str(WORKER), json.dumps(given)]
    flags = environment(XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}")
    return subprocess.Popen(arguments, env=flags, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process):
    out, error = process.communicate(timeout=600)
    assert process.returncode == 0, error[-3000:]
    return out


def assert_same(path, expected):
    got = np.load(path)
    np.testing.assert_allclose(got["dense"], expected.dense, atol=1e-5, rtol=0)
    np.testing.assert_allclose(got["sparse"], expected.terms.toarray(), atol=1e-5, rtol=0)
    np.testing.assert_allclose(got["colbert"], np.concatenate(expected.colbert), atol=1e-5, rtol=0)


def test_eight_devices(model, texts, expected, tmp_path):
    """A copy on each, each computing its own rows and nothing else; and parameters split over meshes."""
    meshes = [(2, 2, 2), (1, 4, 2)]
    given = {"model": str(model), "texts": texts, "out": str(tmp_path), "meshes": meshes}
    assert finished(start(given, 8)).splitlines()[-1] == f"encoded on 8 of 8, {ROOT}"
    for name in ("2x2x2", "1x4x2", "local"):
        assert_same(tmp_path / f"{name}.npz", expected)


def test_two_processes(model, texts, expected, tmp_path):
    """On a mesh of both, both pass all texts and get all rows; with parameters of their own, each its own."""
    given = {"model": str(model), "texts": texts, "address": free_address(), "meshes": [(4, 1, 1), (2, 2, 1)]}
    processes = [start(given | {"index": index, "out": str(tmp_path / str(index))}, 2) for index in range(2)]
    try:
        for process in processes:
            assert finished(process).splitlines()[-1] == f"encoded on 2 of 4, {ROOT}"
    finally:
        for process in processes:
            process.kill()
    for index in range(2):
        for name in ("4x1x1", "2x2x1"):
            assert_same(tmp_path / str(index) / f"{name}.npz", expected)
        assert_same(tmp_path / str(index) / "local.npz", expected[np.arange(index, len(texts), 2)])


LONG_BATCHES = """
import os, signal, sys, time, m3jax
import numpy as np
from m3jax import __main__, encoding
model, texts, out, by, when = sys.argv[1:]
forward, save = encoding.forward, np.save

def slowly(*given):
    print("a batch is at work", flush=True)
    time.sleep(60)
    save(*given)

if when == "while a shard is written":
    np.save = slowly

def told(*args):
    results = forward(*args)
    if args[2].ids.shape[1] > 1000 and when != "while a shard is written":
        print("a batch is at work", flush=True)
        if when == "as the last one starts":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)
    return results

encoding.forward = told
if by == "encode":
    m3jax.encode(m3jax.load(model), open(texts).read().splitlines())
else:
    __main__.main(["encode", model, texts, out, "--shard-texts", "1"])
"""


@pytest.mark.parametrize(
    ("by", "when"),
    [
        ("encode", "later"),
        ("encode_to", "later"),
        ("encode_to", "while a shard is written"),
        ("encode", "as the last one starts"),
    ],
)
def test_a_process_ends_at_once_when_interrupted(tiny_tokenizer, tmp_path, by, when):
    """While batches are at work that take many times as long, in more layers than XLA lets wait on CPU."""
    sizes = {"hidden_size": 128, "num_hidden_layers": 24, "num_attention_heads": 8, "intermediate_size": 128}
    m3jax.save(random_model(tiny_tokenizer, **sizes, colbert_dim=8), tmp_path / "model")
    (tmp_path / "texts").write_text(
        "\n".join(["the fox", *["a " * 8000] * (1 if when == "as the last one starts" else 20)])
    )
    arguments = [
        sys.executable,
        "-c",
        LONG_BATCHES,
        *(str(tmp_path / name) for name in ("model", "texts", "out")),
        by,
        when,
    ]
    running = subprocess.Popen(
        [*HEEDING, *arguments], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert running.stdout.readline() == "a batch is at work\n", running.stderr.read()
        if when != "as the last one starts":
            time.sleep(1)
            assert running.poll() is None
            running.send_signal(signal.SIGINT)
        start = time.monotonic()
        out, error = running.communicate(timeout=120)
        assert time.monotonic() - start < 6  # one batch took 36 s on busy cores, this 2 s
    finally:
        running.kill()
    assert "terminate" not in error and "FATAL" not in error
    if by == "encode":
        assert running.returncode == -signal.SIGINT and error.splitlines()[-1] == "KeyboardInterrupt"
    else:
        assert running.returncode == 130 and error.splitlines()[-1].startswith("interrupted; the same command goes on")
        left = {path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")}
        assert left == {"settings.json", *(["shard-00000000"] if when == "later" else [])}
    assert out == ""  # no other was begun


ENCODE = """
import sys, jax, numpy as np, m3jax
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None)
m3 = m3jax.load(sys.argv[1])
np.save(sys.argv[2], m3jax.encode(m3, "the fox").dense_vecs)
print(jax.config.jax_compilation_cache_dir, len(hits))
"""


def encode_once(model, out, **variables):
    """Where a fresh process keeps what it compiles, and how often it found it there; it says nothing on stderr."""
    arguments = [sys.executable, "-c", ENCODE, str(model), str(out)]
    variables = dict.fromkeys(name for name in os.environ if "CACHE_" in name and name.startswith("JAX_")) | variables
    done = subprocess.run(arguments, env=environment(**variables), capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, "")
    where, hits = done.stdout.split()
    return where, int(hits)


def kept(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith("-atime"))


def test_compilations_are_kept(model, tmp_path):
    """In the user's cache folder; the next process reads them, without a word, and gives the same vector."""
    cache = tmp_path / "m3jax"
    variables = {"XDG_CACHE_HOME": str(tmp_path)}
    assert encode_once(model, tmp_path / "first.npy", **variables) == (str(cache), 0)
    before = kept(cache)
    assert any(name.startswith("jit__layer-") for name in before), before
    where, hits = encode_once(model, tmp_path / "second.npy", **variables)
    assert (where, hits) == (str(cache), len(before))
    assert set(before) <= set(kept(cache))  # and what took a tenth of a second only this time
    np.testing.assert_array_equal(np.load(tmp_path / "first.npy"), np.load(tmp_path / "second.npy"))


@pytest.mark.parametrize("enabled", [None, "0"])
def test_compilations_are_kept_where_jax_is_told(model, tmp_path, enabled):
    """Or not at all; in no case in the user's folder."""
    told = None if enabled else str(tmp_path / "told")
    variables = {"JAX_ENABLE_COMPILATION_CACHE": enabled, "JAX_COMPILATION_CACHE_DIR": told}
    where, _ = encode_once(model, tmp_path / "x.npy", XDG_CACHE_HOME=str(tmp_path / "cache"), **variables)
    assert where == str(told) and not (tmp_path / "cache").exists()
    assert not told or any(name.startswith("jit__layer-") for name in kept(tmp_path / "told"))


def test_the_suite_keeps_what_it_compiles_in_a_folder_of_its_own():
    assert Path(jax.config.jax_compilation_cache_dir).parent == Path(os.environ["XDG_CACHE_HOME"])
    assert Path(os.environ["XDG_CACHE_HOME"]).name.startswith("m3jax-tests-")
