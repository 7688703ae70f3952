"""Whether encode keeps a device at work: wall time beside the device's, for a stand-in that takes no time of this machine.

Run it as `python tests/benchmarks/stream.py [--texts 60000] [--shard-texts 2048] [--rate 300000]`: passages of 50 to 400 tokens
go through encode_to and a model whose `forward` is replaced by a device that computes `rate` tokens a second, one batch after
the other, beside this machine's processors, which read, tokenise, collect and write. With `--queries --texts 100000` it is
queries of 5 to 40 tokens through one call of encode. Nothing is learnt of any device's own speed.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from texts import MIXES, make_texts, small_tokenizer

import m3jax
from m3jax import encoding
from m3jax.forward import Results
from tests.random_model import random_model


class Later:
    """An array that a device has at a certain time."""

    def __init__(self, array: np.ndarray, ready: float):
        self.array, self.ready = array, ready

    def is_ready(self) -> bool:
        return time.perf_counter() >= self.ready

    def __array__(self, *args, **kwargs) -> np.ndarray:
        time.sleep(max(0.0, self.ready - time.perf_counter()))
        return self.array


class Device:
    """One that computes batches in turn; `busy` are the seconds that they took, `idle` those between them."""

    def __init__(self, rate: float, width: int):
        self.rate, self.width = rate, width
        self.busy = self.idle = 0.0
        self.free: float | None = None

    def forward(self, config, params, batch, asked) -> Results:
        now, taken = time.perf_counter(), batch.ids.size / self.rate
        start = now if self.free is None else max(now, self.free)
        self.idle += 0.0 if self.free is None else start - self.free
        self.busy += taken
        self.free = start + taken
        vectors = np.full((*batch.slots.shape[:2], self.width), self.width**-0.5, np.float32)
        weights = np.where(batch.segments > 0, np.float32(0.1), np.float32(0))
        return Results(Later(vectors, self.free), Later(weights, self.free), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=60_000)
    parser.add_argument("--queries", action="store_true", help="queries through encode, not passages through encode_to")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json of XLM-R's form; without it a small one is made")
    parser.add_argument("--shard-texts", type=int, default=2048)
    parser.add_argument("--rate", type=float, default=300_000, help="tokens a second of the device")
    given = parser.parse_args()
    mix = "queries" if given.queries else "passages"
    with tempfile.TemporaryDirectory() as work:
        if given.tokenizer is None:
            given.tokenizer = Path(work) / "tokenizer.json"
            small_tokenizer(given.tokenizer)
        some, lengths = make_texts(argparse.Namespace(tokenizer=given.tokenizer, texts=None), *MIXES[mix], 2000)
        tokenizer = m3jax.Tokenizer.from_file(given.tokenizer)
        m3 = random_model(tokenizer, hidden_size=1024, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        texts = [some[i % len(some)] for i in range(given.texts)]
        start = time.perf_counter()
        tokenizer.encode(some)
        rate = sum(lengths) / (time.perf_counter() - start)
        device = Device(given.rate, 1024)
        encoding.forward = device.forward
        encoding._ROWS["cpu"] = encoding._ROWS["gpu"]
        start = time.perf_counter()
        if given.queries:
            m3jax.encode(m3, texts)
        else:
            m3jax.encode_to(Path(work) / "out", m3, iter(texts), shard_texts=given.shard_texts)
        wall = time.perf_counter() - start
        print(f"{given.texts:,} {mix}; tokenising alone {rate:,.0f} tokens/s, the device {given.rate:,.0f}")
        print(
            f"wall {wall:.2f} s, device {device.busy:.2f} s, beyond it {1 - device.busy / wall:.1%}, "
            f"idle between batches {device.idle:.2f} s"
        )


if __name__ == "__main__":
    main()
