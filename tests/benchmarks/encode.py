"""m3jax.encode beside FlagEmbedding, transformers, sentence-transformers and ONNX Runtime: the same weights, the same texts.

Run it as `python tests/benchmarks/encode.py --geometry 12x768 --tokenizer TOKENIZER.json --texts TEXTS`, with the `peer`
extra; contestants that are not installed are named and left out. TEXTS has one text a line, or JSON lines with "text" (.gz
too); texts are cut and joined so that their lengths fill a mix evenly. Without it, and without TOKENIZER.json (such as
XLM-R's), both are made here. The weights are random: speed does not depend on them, and vectors are compared.

    queries 5–40 tokens, passages 50–400, documents 1,000–8,000 (--mixes; --count texts of each)

Each contestant lives in a process of its own, holding its own weights (24x1024: 20 GB for all; --only takes fewer); in every
round (--repeats) each computes all texts once, one at a time, so that what else the machine does falls on all alike. Medians
are compared. m3jax chooses its batches itself; the others get the best of batch size 1, 8, 32, 256, found on a batch (of 8
texts and more) of middling length, as far as the texts make at least 8 batches: 2,048 texts for all sizes (FlagEmbedding
computes the first of each call twice, which counts against it in the measured rounds as it does in use, and not in the search).

Columns: tokens/s, real tokens only; × Flag and × other, how many times faster than FlagEmbedding, and than the fastest of as
many bits that is not m3jax; spread, (slowest − fastest round) / median; batch size; padding of what m3jax computes; GiB, peak
memory of the process with all that it imports (on a GPU, of the device); compile s, the first call less a warm one, without
a persistent cache; GFLOP/s, where a text of n tokens in L layers of width w counts L · (24 · n · w² + 4 · n² · w), the linear
layers and attention, and padding counts nothing; of peak, the share of a matrix product's rate in as many bits, which takes
its turn in each round; 1 − cos, the largest distance of a dense vector from the first contestant's.

    --first-call   one call on 2,000 passages in a fresh process with an empty compilation cache, compile included, load not
    --latency      one query of 12 tokens, warm, calls in turns: median and 95th percentile of 200
    --host         100,000 queries on 2x64: what encode takes beyond the device's time for the same batches
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

import contestants
from texts import MIXES, make_texts, small_tokenizer
from workers import Failed, Worker, apart, start

# Texts of each mix: on two cores a round of FlagEmbedding takes about two minutes, on a GPU at most one.
COUNTS = {
    "small": {"queries": 2048, "passages": 256, "documents": 8},
    "large": {"queries": 512, "passages": 64, "documents": 8},
    "accelerator": {"queries": 8192, "passages": 4096, "documents": 256},
}


def flops(lengths: list[int], given: argparse.Namespace) -> float:
    n, w = np.array(lengths, float), given.width
    return float((given.layers * (24 * n * w**2 + 4 * n**2 * w) + given.colbert * 2 * n * w**2).sum())


def best_batch_size(worker: Worker, texts: list[str], lengths: list[int]) -> int:
    """The fastest of those that the texts fill 8 times, by the faster of two calls on a batch of middling length."""
    sizes = [size for size in worker.told["batch_sizes"] if size == 0 or -(-len(texts) // size) >= 8] or [1]
    if len(sizes) == 1:
        return sizes[0]
    order = np.argsort(lengths)
    seconds: dict[int, float] = {}
    for size in sizes:
        count = max(size, 8)
        middle = [texts[i] for i in order[(len(texts) - count) // 2 :][:count]]
        computed = count + worker.told["again"] * size
        seconds[size] = min(worker.ask("run", middle, size)[0] for _ in range(2)) / computed
        if seconds[size] > 1.1 * min(seconds.values()):
            break  # larger ones are slower still
    return min(seconds, key=seconds.__getitem__)


def compare(mix: str, given: argparse.Namespace) -> None:
    """The table of one mix."""
    texts, lengths = make_texts(given, *MIXES[mix], given.count or given.counts[mix])
    print(f"\n{mix}: {len(texts):,} texts, {sum(lengths):,} tokens, {min(lengths)} to {max(lengths)} each", flush=True)
    workers, matrix = start(given.only, given), start(list(contestants.MATRIX), given)
    sizes, padding, first, vectors = {}, {}, {}, {}
    seconds = {worker.name: [] for worker in workers}
    for turn in range(given.repeats + 1):
        for worker in list(workers):
            name = worker.name
            try:
                if turn:
                    taken, vectors[name] = worker.ask("run", texts, sizes[name])
                    seconds[name].append(taken)
                    print(f"{mix}, round {turn}: {taken:.1f} s, {name}", file=sys.stderr, flush=True)
                else:
                    sizes[name] = best_batch_size(worker, texts, lengths)
                    if not sizes[name]:
                        padding[name] = worker.ask("padding_share", texts, lengths)
                        first[name], _ = worker.ask("run", texts, 0)
            except Failed as why:
                print(f"not measured: {why}", flush=True)
                workers.remove(worker)
        if turn:
            for worker in matrix:
                worker.told.setdefault("rates", []).append(worker.ask("rate", given.width))
    peaks = {bits(worker): statistics.median(worker.told["rates"]) for worker in matrix}
    medians = {worker.name: statistics.median(seconds[worker.name]) for worker in workers}
    rows = {}
    for worker in workers:
        name, ours = worker.name, worker.name in first
        others = [medians[w.name] for w in workers if bits(w) == bits(worker) and w.name not in first]
        rate = flops(lengths, given) / medians[name]
        rows[f"{name}: {worker.told['computes']}; {worker.told['dtype']}, {worker.told['device']}"] = {
            "tokens/s": f"{sum(lengths) / medians[name]:,.0f}",
            "× Flag": times_faster(medians[name], medians.get("FlagEmbedding")),
            "× other": times_faster(medians[name], min(others, default=None)),
            "spread": f"{(max(seconds[name]) - min(seconds[name])) / medians[name]:.0%}",
            "batch": f"{sizes[name]}" if sizes[name] else None,
            "padding": f"{padding[name]:.1%}" if ours else None,
            "GiB": f"{worker.ask('peak_memory') / 2**30:.2f}",
            "compile s": f"{first[name] - medians[name]:.1f}" if ours else None,
            "GFLOP/s": f"{rate / 1e9:,.0f}",
            "of peak": f"{rate / peaks[bits(worker)]:.0%}",
            "1 − cos": f"{farthest(vectors[workers[0].name], vectors[name]):.0e}",
        }
    table(rows)
    for worker in matrix:
        print(f"{worker.name}: {peaks[bits(worker)] / 1e9:,.0f} GFLOP/s")
    for worker in workers + matrix:
        worker.close()


def first_call(given: argparse.Namespace) -> None:
    """The first call of fresh processes; batch sizes are found in other processes than those measured."""
    texts, lengths = make_texts(given, *MIXES["passages"], given.count or 2000)
    print(f"\nfirst call, {len(texts):,} passages, {sum(lengths):,} tokens", flush=True)
    sizes, seconds = {}, {}
    for worker in start(given.only, given):
        sizes[worker.name] = best_batch_size(worker, texts, lengths)
        worker.close()
    for _ in range(given.repeats):
        for name in sizes:
            for worker in start([name], given, cache=True):
                seconds.setdefault(name, []).append(worker.ask("run", texts, sizes[name])[0])
                worker.close()
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    table(
        {
            name: {
                "seconds": f"{time:.1f}",
                "tokens/s": f"{sum(lengths) / time:,.0f}",
                "× Flag": times_faster(time, medians.get("FlagEmbedding")),
                "batch": f"{sizes[name]}" if sizes[name] else None,
            }
            for name, time in medians.items()
        }
    )


def latency(given: argparse.Namespace) -> None:
    """Single warm calls, which take turns."""
    texts, lengths = make_texts(given, 12, 12, 1)
    workers = start(given.only, given)
    seconds: dict[str, list[float]] = {worker.name: [] for worker in workers}
    for turn in range(220):
        for worker in workers:
            taken, _ = worker.ask("run", texts, min(worker.told["batch_sizes"]))
            if turn >= 20:
                seconds[worker.name].append(taken)
    print(f"\none query of {lengths[0]} tokens, 200 warm calls each")
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    reference = medians.get("transformers float32")
    rows = {}
    for name, times in seconds.items():
        high = float(np.percentile(times, 95))
        rows[name] = {
            "median ms": f"{1000 * medians[name]:.2f}",
            "95% ms": f"{1000 * high:.2f}",
            "95% / median": f"{high / medians[name]:.2f}",
            "/ transformers": f"{medians[name] / reference:.2f}" if reference else None,
        }
    table(rows)
    for worker in workers:
        worker.close()


def host(given: argparse.Namespace) -> None:
    """What of encode's time is not the device's."""
    texts, lengths = make_texts(given, *MIXES["queries"], given.count or 100_000)
    print(f"\n{len(texts):,} queries, {sum(lengths):,} tokens", flush=True)
    rows = {}
    for worker in start([name for name in given.only if "m3jax" in name], given):
        rounds = worker.ask("host_and_device", texts, given.repeats)
        wall, device, tokenising = (statistics.median(column) for column in zip(*rounds, strict=True))
        rows[worker.name] = {
            "wall s": f"{wall:.2f}",
            "device s": f"{device:.2f}",
            "beyond": f"{1 - device / wall:.1%}",
            "tokenising alone s": f"{tokenising:.2f}",
        }
        worker.close()
    table(rows)


def bits(worker: Worker) -> int:
    return {"float32": 32, "bfloat16": 16, "float16": 16}[worker.told["dtype"]]


def times_faster(seconds: float, other: float | None) -> str | None:
    return f"{other / seconds:.2f}" if other else None


def farthest(reference: np.ndarray, vectors: np.ndarray) -> float:
    """The largest 1 − cosine of rows."""
    a, b = (x.astype(np.float64) for x in (reference, vectors))
    return float(1 - ((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).min())


def table(rows: dict[str, dict[str, str | None]]) -> None:
    """Rows by name, which stands last; what does not apply is a dash."""
    lines = [[value or "–" for value in row.values()] for row in rows.values()]
    lines.insert(0, list(next(iter(rows.values()), {})))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for name, line in zip(["contestant", *rows], lines, strict=True):
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + f"  {name}", flush=True)


def chosen(only: list[str] | None, default: list[str]) -> list[str]:
    """The contestants whose names hold one of the words."""
    if only is None:
        return default
    names = list(contestants.CONTESTANTS)
    if unknown := [word for word in only if not any(word.lower() in name.lower() for name in names)]:
        raise SystemExit(f"--only takes words of {', '.join(names)}; no such name: {', '.join(unknown)}")
    return [name for name in names if any(word.lower() in name.lower() for word in only)]


def describe(given: argparse.Namespace, device: str) -> None:
    packages = ("jax", "torch", "transformers", "FlagEmbedding", "sentence-transformers", "onnxruntime")
    found = []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    cores = len(os.sched_getaffinity(0))
    print(f"{given.layers} × {given.width}, {device}, {cores} cores, Python {platform.python_version()}")
    print(", ".join(found), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", help="layers x width, such as 12x768 (the default) or 24x1024; heads of 64")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json of XLM-R's form")
    parser.add_argument("--texts", type=Path, help='one text a line, or JSON lines with "text"')
    parser.add_argument("--mixes", nargs="+", choices=list(MIXES), default=list(MIXES))
    parser.add_argument("--count", type=int, help="texts of each mix")
    parser.add_argument("--repeats", type=int, help="rounds; 3, of --first-call 1")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="contestants whose names hold a WORD")
    parser.add_argument("--colbert", action="store_true", help="token vectors too, where the contestant gives them")
    mode = parser.add_mutually_exclusive_group()
    for name in ("first-call", "latency", "host"):
        mode.add_argument(f"--{name}", action="store_true")
    given = parser.parse_args()
    given.repeats = given.repeats or (1 if given.first_call else 3)
    given.layers, given.width = map(int, (given.geometry or ("2x64" if given.host else "12x768")).split("x"))
    given.backend, device = apart(contestants.backend)
    large = given.layers * given.width**2 > 2 * 12 * 768**2
    given.counts = COUNTS["accelerator" if given.backend != "cpu" else "large" if large else "small"]
    ours = "m3jax float32" if given.backend == "cpu" else "m3jax bfloat16"
    everyone = list(contestants.CONTESTANTS)
    default = (
        [ours, "FlagEmbedding"] if given.first_call else [ours, "transformers float32"] if given.latency else everyone
    )
    given.only = chosen(given.only, [ours] if given.host else default)
    describe(given, device)
    with tempfile.TemporaryDirectory() as work:
        given.work, given.model = Path(work), Path(work) / "model"
        if given.tokenizer is None:
            given.tokenizer = given.work / "tokenizer.json"
            small_tokenizer(given.tokenizer)
        apart(contestants.make_model, given.model, given.tokenizer, given.layers, given.width)
        if given.first_call:
            first_call(given)
        elif given.latency:
            latency(given)
        elif given.host:
            host(given)
        else:
            for mix in given.mixes:
                compare(mix, given)


if __name__ == "__main__":
    main()
