"""Time and memory of the converter and of `m3jax.load` at a released model's full size, beside `cp` and FlagEmbedding.

Run it as `python tests/benchmarks/convert.py [FOLDER] [--repeats 3]`; it needs about 10 GB of disk in FOLDER. A model of random
weights stands for the released one: the sizes of BAAI/bge-m3 (568M parameters, 2.27 GB in float32) and the tokenizer that
`--tokenizer` names, by default a small one made here. Every command runs in a process of its own, in turns; medians are
compared. Memory is the peak of a process's anonymous pages (RssAnon, sampled every 10 ms), interpreter and imports included,
as a multiple of the weights. FlagEmbedding is left out where it is not installed.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_TEXT = "What is BGE M3?"
_READ = "import sys; data = open(sys.argv[1], 'rb').read()"
_MAKE = """
import sys, jax, m3jax, numpy as np
from m3jax.config import M3Config
from m3jax.model import shapes
from m3jax.tokenization import Tokenizer
random = np.random.default_rng(0)
draw = lambda x: random.standard_normal(x.shape, np.float32) * np.float32(0.02)
m3jax.save(m3jax.M3(M3Config(), jax.tree.map(draw, shapes(M3Config())), Tokenizer.from_file(sys.argv[1])), sys.argv[2])
"""
_OURS = """
import sys, time
import m3jax
m3jax.load, m3jax.encode  # imports what they stand on, as the peer's import does
start = time.perf_counter()
vector = m3jax.encode(m3jax.load(sys.argv[1]), sys.argv[2]).dense_vecs
print(time.perf_counter() - start)
"""
_THEIRS = """
import sys, time
from FlagEmbedding import BGEM3FlagModel
start = time.perf_counter()
vector = BGEM3FlagModel(sys.argv[1], use_fp16=False, devices="cpu").encode(sys.argv[2])["dense_vecs"]
print(time.perf_counter() - start)
"""


def run(command: list[str]) -> tuple[float, int]:
    """Seconds and peak anonymous bytes of a process; those of a first answer are what it prints: imports do not count."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        time.sleep(0.01)
    seconds = time.perf_counter() - start
    assert process.stdout and process.stderr
    if process.returncode:
        raise SystemExit(f"{command}: {process.stderr.read()}")
    printed = process.stdout.read().split()
    return float(printed[-1]) if command[-1] == _TEXT else seconds, peak


def anonymous(process: int) -> int:
    """Anonymous resident bytes of a process, 0 once it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    lines = [line.split() for line in status.splitlines() if line.startswith("RssAnon")]
    return int(lines[0][1]) * 1024 if lines else 0


def tokenizer(path: Path) -> None:
    """A small tokenizer.json of XLM-R's form; reading XLM-R's own takes both sides the same time."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, processors

    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{c}", -2.0) for c in "WhatisBGEM3?")]
    inner = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=3))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>"])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    inner.save(str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="where to work; without it a temporary folder")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json that fits 250,002 rows")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        work, python = Path(name), sys.executable
        source, orbax, back = work / "model", work / "orbax", work / "back"
        if given.tokenizer is None:
            tokenizer(work / "tokenizer.json")
        run([python, "-c", _MAKE, str(given.tokenizer or work / "tokenizer.json"), str(source)])
        weights = source / "model.safetensors"
        commands = {
            "cp": ["cp", str(weights), str(work / "copy")],
            "cp with fsync": ["sh", "-c", 'cp "$0" "$1" && sync "$1"', str(weights), str(work / "copy")],
            "read into fresh memory": [python, "-c", _READ, str(weights)],
            "convert from-pytorch": [python, "-m", "convert", "from-pytorch", str(source), str(orbax)],
            "convert to-pytorch": [python, "-m", "convert", "to-pytorch", str(orbax), str(back)],
            "m3jax.load to a first answer": [python, "-c", _OURS, str(source), _TEXT],
        }
        if find_spec("FlagEmbedding"):
            commands["FlagEmbedding to a first answer"] = [python, "-c", _THEIRS, str(source), _TEXT]
        size = sum(path.stat().st_size for path in (weights, source / "sparse_linear.pt", source / "colbert_linear.pt"))
        taken: dict[str, list[tuple[float, int]]] = {name: [] for name in commands}
        for _ in range(given.repeats):
            for path in (orbax, back):
                shutil.rmtree(path, ignore_errors=True)
            for name, command in commands.items():
                (work / "copy").unlink(missing_ok=True)  # no copy waits for an old one to be emptied
                taken[name].append(run(command))
        print(f"{size:,} bytes of weights, median of {given.repeats}")
        seconds = {name: statistics.median(x for x, _ in runs) for name, runs in taken.items()}
        for name, runs in taken.items():
            peak = max(x for _, x in runs) / size
            print(
                f"{seconds[name]:7.1f} s  {seconds[name] / seconds['cp']:5.2f} × cp  "
                f"{seconds[name] / seconds['cp with fsync']:5.2f} × with fsync  "
                f"{seconds[name] / seconds['read into fresh memory']:6.2f} × read  {peak:5.2f} × the weights  {name}"
            )


if __name__ == "__main__":
    main()
