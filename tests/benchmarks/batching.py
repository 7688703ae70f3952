"""What length groups are worth on a mix of short and long sets: padding share and steps a second, with them and without.

Run it as `python tests/benchmarks/batching.py [--rows 320 80] [--batch 8]` on an otherwise idle machine. A small model trains
on a round of rows (each row once) of two sets in memory, whose lengths are drawn (log-normal: passages of about 40 and of about
600 tokens, queries of about 12), with the same batch size in every group, so that steps are of as many rows. Programs are
compiled before; how many there are and how long that took is told apart.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from configs import base
from m3jax.config import M3Config
from m3jax.model import init
from m3jax.sharding import make_mesh
from tests.memory_rows import Memory
from train.data.builders import Dataset
from train.data.pipeline import Batches, prefetch
from train.data.streams import LengthGroup
from train.optimizer import make_optimizer
from train.step import make_state, make_step

LONGEST = 1024
BOUNDS = (64, 128, 512, LONGEST)  # with groups; without, the last alone
MODEL = M3Config.tiny(
    vocab_size=10_000, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512,
    max_position_embeddings=LONGEST + 2,
)  # fmt: skip


class Measured(NamedTuple):
    """One way of batching: its name, shapes compiled and their seconds, then of a round steps, seconds and padding share."""

    name: str
    shapes: int
    compiling: float
    steps: int
    seconds: float
    padding: float


def lengths(random: np.random.Generator, count: int, typical: float, spread: float) -> np.ndarray:
    drawn = np.exp(random.normal(np.log(typical), spread, count))
    return np.clip(drawn, 6, LONGEST).astype(np.int32)


def mix(short: int, long: int) -> Memory:
    """Two datasets of rows with two negatives each."""
    random = np.random.default_rng(0)
    passages = np.concatenate([lengths(random, short, 40, 0.4), lengths(random, long, 600, 0.4)])
    queries = np.minimum(lengths(random, short + long, 12, 0.4), 64)
    datasets = [Dataset("short", short, False), Dataset("long", long, False)]
    return Memory([1] * len(passages), [2] * len(passages), queries=queries, passages=passages, datasets=datasets)


def measure(name: str, source: Memory, groups: list[LengthGroup], same_dataset: bool) -> Measured:
    config = base.get_config()
    config.update(steps=1000, dropout=0.0, remat="elements")
    batches = Batches(source, seed=0, groups=groups, group_size=2, pad_id=1, same_dataset=same_dataset)
    steps = batches.order.steps_in(1)
    optimizer, mesh = make_optimizer(config), make_mesh()
    with jax.set_mesh(mesh):
        state = make_state(init(MODEL, jax.random.key(0)), optimizer, mesh)
        step = make_step(MODEL, FrozenConfigDict(config), optimizer, mesh, state)
        firsts = {}
        for number in range(steps):
            batch = batches[number]
            firsts.setdefault((batch.query_ids.shape, batch.passage_ids.shape), batch)
        began = time.perf_counter()
        for batch in firsts.values():
            state, measures = step(state, batch)
        jax.block_until_ready((state, measures))
        compiling = time.perf_counter() - began
        real = held = 0
        began = time.perf_counter()
        for batch in prefetch(batches, 0, steps):
            state, measures = step(state, batch)
            real += int(batch.query_mask.sum() + batch.passage_mask.sum())
            held += batch.query_mask.size + batch.passage_mask.size
        jax.block_until_ready((state, measures))
        seconds = time.perf_counter() - began
    return Measured(name, len(firsts), compiling, steps, seconds, 1 - real / held)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs=2, type=int, default=[320, 80], help="of the short set and of the long one")
    parser.add_argument("--batch", type=int, default=8)
    given = parser.parse_args()
    source = mix(*given.rows)
    grouped = [LengthGroup(bound, given.batch) for bound in BOUNDS]
    alone = [LengthGroup(LONGEST, given.batch)]
    print(
        "| batches | padding | steps a second | seconds a round | shapes, seconds to compile |\n|---|---|---|---|---|"
    )
    ways = (
        ("of a dataset and length group", grouped, True),
        ("of a length group", grouped, False),
        ("of a dataset", alone, True),
        ("of all rows", alone, False),
    )
    for name, groups, same_dataset in ways:
        m = measure(name, source, groups, same_dataset)
        print(
            f"| {m.name} | {m.padding:.0%} | {m.steps / m.seconds:.2f} | {m.seconds:.1f} ({m.steps} steps) "
            f"| {m.shapes}, {m.compiling:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
