"""`python -m m3jax`: what encode writes and inspect tells, from files and stdin, and errors in one line."""

import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import jax
import numpy as np
import pytest

import m3jax
from m3jax import __main__ as program
from m3jax import shards
from tests.real_processes import HEEDING

ROOT = Path(__file__).parents[1]
TEXTS = ["the fox", "", "a cat", " 東京 は\t日本", "the the", "a\u2028b\x0cc", "last"]


@pytest.fixture(scope="module")
def m3(tiny_tokenizer):
    config = m3jax.M3Config.tiny(
        vocab_size=tiny_tokenizer.vocab_size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=40, colbert_dim=6,
    )  # fmt: skip
    return m3jax.M3(config, m3jax.init(config, jax.random.key(0)), tiny_tokenizer)


@pytest.fixture(scope="module")
def model(m3, tmp_path_factory):
    directory = tmp_path_factory.mktemp("main") / "model"
    m3jax.save(m3, directory)
    return str(directory)


def rows(texts):
    return "".join(json.dumps({"id": "x", "text": text}) + "\n" for text in texts).encode()


INPUTS = {
    "text": ("texts.txt", "\n".join(TEXTS).encode(), []),
    "text, a newline at the end": ("texts.txt", "".join(f"{text}\n" for text in TEXTS).encode(), []),
    "text of Windows": ("texts", "".join(f"{text}\r\n" for text in TEXTS).encode("utf-8-sig"), []),
    "JSONL": ("texts.jsonl", rows(TEXTS), []),
    "JSONL, blank lines": ("texts.jsonl", rows(TEXTS).replace(b"\n", b"\n \n\n"), []),
    "JSONL, lines of other blanks": (
        "texts.jsonl",
        b"\xef\xbb\xbf\n" + rows(TEXTS).replace(b"\n", b"\n\xe3\x80\x80\n"),
        [],
    ),
    "JSONL by another name": ("texts", rows(TEXTS), ["--format", "jsonl"]),
    "gzip": ("texts.txt.gz", gzip.compress("\n".join(TEXTS).encode(), mtime=0), []),
    "JSONL in gzip": ("texts.jsonl.gz", gzip.compress(rows(TEXTS), mtime=0), []),
    "stdin": ("-", "\n".join(TEXTS).encode(), []),
    "JSONL from stdin": ("-", rows(TEXTS), ["--format", "jsonl"]),
}


@pytest.mark.parametrize(("name", "content", "more"), INPUTS.values(), ids=INPUTS)
def test_encode_takes(m3, model, tmp_path, monkeypatch, capsys, name, content, more):
    if name == "-":
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    else:
        (tmp_path / name).write_bytes(content)
        name = str(tmp_path / name)
    program.main(["encode", model, name, str(tmp_path / "out"), "--shard-texts", "3", *more])
    shown = capsys.readouterr()
    assert re.fullmatch(r".*out: Embeddings\(7 texts: dense 16, sparse \d+\), [\d.]+ s\n", shown.out)
    assert ("how many come is not known" in shown.err) == (name == "-")
    # JSON's text is stripped, as evaluation sets are read.
    texts = [text.strip() for text in TEXTS] if "jsonl" in name + "".join(more) else TEXTS
    got = m3jax.open_embeddings(tmp_path / "out")
    np.testing.assert_allclose(got.dense_vecs[:], m3jax.encode(m3, texts).dense_vecs, atol=1e-5)


def test_a_title_comes_before_the_text(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(
        '{"title": "A", "text": "b"}\n{"title": "", "text": "c"}\n{"text": "d"}\n{"title": "E", "text": ""}'
    )
    texts = program._File(path, jsonl=True)
    assert list(texts) == list(texts) == ["A b", "c", "d", "E"] and len(texts) == 4


def test_every_option_reaches_encode_to(model, tmp_path, monkeypatch):
    (tmp_path / "x").write_text("a\nb")
    given = {}

    def encode_to(directory, m3, texts, **settings):
        given.update(
            settings,
            directory=directory,
            texts=list(texts),
            dtype=str(m3.params["heads"]["sparse_linear"]["kernel"].dtype),
        )

    monkeypatch.setattr(m3jax, "encode_to", encode_to)
    program.main(["encode", model, str(tmp_path / "x"), str(tmp_path / "out")])
    plain = dict(given)
    options = ["--no-dense", "--no-sparse", "--colbert", "--colbert-dtype", "int8", "--max-length", "9"]
    options += ["--shard-texts", "7", "--batch-tokens", "64", "--instruction", "q: ", "--truncate-dim", "4", "--mcls"]
    program.main(["encode", model, str(tmp_path / "x"), str(tmp_path / "out"), *options, "--dtype", "bfloat16"])
    defaults = {
        "dense": True, "sparse": True, "colbert": False, "colbert_dtype": "float16", "max_length": None, "shard_texts": 8192,
        "instruction": "", "truncate_dim": None, "mcls": False, "batch_tokens": None, "dtype": "float32",
    }  # fmt: skip
    assert plain.items() >= defaults.items()
    changed = {
        "dense": False, "sparse": False, "colbert": True, "colbert_dtype": "int8", "max_length": 9, "shard_texts": 7,
        "batch_tokens": 64, "instruction": "q: ", "truncate_dim": 4, "mcls": True, "dtype": "bfloat16", "texts": ["a", "b"],
    }  # fmt: skip
    assert given.items() >= changed.items()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", None, "No such file"),
        ("x.txt", b"a\n\xff\nb", r"x.txt:2: must be UTF-8; byte 0 of the line is not"),
        ("x.jsonl", b'{"text": "a"}\n{"text"\n', r"x.jsonl:2: must be one JSON object; .* at character 8"),
        ("x.jsonl", b'{"text": "a"}\n\n["b"]', r'x.jsonl:3: must be {"text": str}.*\["b"\] came'),
        ("x.jsonl", b'{"text":' + b"[" * 100_000, "x.jsonl:1: must be one JSON object; .*recursion"),
        ("x.jsonl", b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "x.jsonl:1: must be one JSON object; .*digits"),
        ("x.jsonl", b'{"id": 1}', "x.jsonl:1: must be"),
        ("x.jsonl", b'{"text": 1}', "x.jsonl:1: must be"),
        ("x.jsonl", b'{"text": "a", "title": 1}', "x.jsonl:1: must be"),
        ("x.jsonl", b'{"text": "a"}\n\n{"text": "\\ud800"}', "x.jsonl:3: text is not valid Unicode"),
        ("x.txt.gz", b"a", "x.txt.gz: not a whole gzip file"),
        ("x.txt.gz", gzip.compress(b"a" * 99, mtime=0)[:-9], "x.txt.gz: not a whole gzip file"),
    ],
)
def test_what_is_wrong_is_one_line(model, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as caught:
        program.main(["encode", model, str(tmp_path / name), str(tmp_path / "out")])
    assert re.match(f"error: .*{message}", str(caught.value)) and "\n" not in str(caught.value)


def test_inspect(m3, model, tmp_path, capsys):
    def some():
        yield from ["the fox", "a cat " * 20, "the river", "lazy", "dog"]
        raise OSError

    out = tmp_path / "out"
    settings = {"shard_texts": 2, "colbert": True, "colbert_dtype": "int8", "max_length": 9}
    with pytest.raises(OSError):
        m3jax.encode_to(out, m3, some(), **settings)
    program.main(["inspect", str(out)])
    first, texts, dense, sparse, colbert, model_line, made_with = capsys.readouterr().out.splitlines()
    assert first == f"{out}: NOT finished; the call that began it goes on where it stopped"
    assert texts == "texts    4 in 2 shards, 1 of them cut to max_length"
    assert dense == f"dense    16 wide, float32: {4 * 64} bytes"
    assert re.fullmatch(r"sparse   \d+ wide, float32, \d+ weights: \d+ bytes", sparse)
    assert re.fullmatch(r"colbert  6 wide, int8, \d+ vectors: \d+ bytes", colbert)
    assert model_line.startswith("model    1 layers × 16, float32, weights ") and ", tokenizer " in model_line
    assert made_with == (
        "settings dense True, sparse True, colbert True, max_length 9, mcls False, colbert_dtype int8, shard_texts 2"
    )
    with pytest.warns(UserWarning, match="1 of 5"):
        m3jax.encode_to(out, m3, ["the fox", "a cat " * 20, "the river", "lazy", "dog"], **settings)
    capsys.readouterr()
    program.main(["inspect", str(out)])
    shown = capsys.readouterr().out
    sizes = sum(int(n.replace(",", "")) for n in re.findall(r"([\d,]+) bytes", shown))
    on_disk = [path.stat().st_size for path in out.rglob("*.npy")]
    assert shown.startswith(f"{out}: finished\ntexts    5 in 3 shards, 1 of") and sizes == sum(on_disk) - 128 * len(
        on_disk
    )
    (out / "shard-00000001").rename(tmp_path / "lost")
    with pytest.raises(SystemExit, match="3 shards were finished, but 1 are not there"):
        program.main(["inspect", str(out)])
    for path in (tmp_path, tmp_path / "none", Path(model)):
        with pytest.raises(SystemExit, match=f"error: {path}: expected a directory that m3jax.encode_to wrote"):
            program.main(["inspect", str(path)])


@pytest.mark.parametrize("jsonl", [False, True])
def test_a_pipe_is_read_once(model, tmp_path, capsys, jsonl):
    pipe = tmp_path / ("x.jsonl" if jsonl else "x")
    os.mkfifo(pipe)
    content = rows(TEXTS) if jsonl else "\n".join(TEXTS).encode()
    Thread(target=pipe.write_bytes, args=(content,), daemon=True).start()
    program.main(["encode", model, str(pipe), str(tmp_path / "out")])
    assert "how many come is not known" in capsys.readouterr().err
    assert len(m3jax.open_embeddings(tmp_path / "out")) == len(TEXTS)


def test_object_stores_are_refused(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").write_text("a")
    for arguments in (["encode", model, "x", "gs://bucket/out"], ["inspect", "gs://bucket/out"]):
        with pytest.raises(SystemExit, match=r"error: .*gs://bucket/out.* copy"):
            program.main(arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_warnings_are_one_line(model, tmp_path, capsys):
    (tmp_path / "x").write_text("a cat " * 20 + "\nb")
    program.main(["encode", model, str(tmp_path / "x"), str(tmp_path / "out")])
    assert capsys.readouterr().err.splitlines()[-1].startswith("warning: 1 of 2 texts are longer than max_length = 38")


def test_interrupted_and_called_again(model, tmp_path):
    """The program as a process, with Ctrl-C while it waits for stdin."""
    command = [sys.executable, "-m", "m3jax", "encode", model, "-", str(tmp_path / "out"), "--shard-texts", "2"]
    running = subprocess.Popen([*HEEDING, *command], cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    running.stdin.write("".join(f"{text}\n" for text in TEXTS[:5]).encode())
    running.stdin.flush()
    deadline = time.monotonic() + 300
    while not (tmp_path / "out" / "shard-00000001").exists():
        assert time.monotonic() < deadline and running.poll() is None, running.stderr.read()
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert err.decode().splitlines()[-1] == "interrupted; the same command goes on where it stopped"
    assert "Traceback" not in err.decode()
    done = subprocess.run(command, cwd=ROOT, input="\n".join(TEXTS).encode(), capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert b"Embeddings(7 texts" in done.stdout and b"4 texts are there" in done.stderr
    assert len(m3jax.open_embeddings(tmp_path / "out")) == 7


def test_inspect_does_without_jax(tmp_path):
    shards.write_json(tmp_path / shards.SETTINGS, {"format": "x"})
    code = f"""
import sys
from m3jax.__main__ import main
try:
    main(["inspect", {str(tmp_path)!r}])
except SystemExit as error:
    print(error)
print([name for name in ("jax", "flax") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert "the format must be" in done.stdout and done.stdout.endswith("[]\n"), done
