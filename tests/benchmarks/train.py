"""A training step of any stage beside FlagEmbedding's own model and loss: forward and backward on the same weights and rows.

Run it as `python tests/benchmarks/train.py [--geometry 4x256] [--queries 4x64] [--passages 16x256]` with the `peer` extra;
without FlagEmbedding ours is measured alone. Rows are full, because the peer's padding changes its scores; dropout is 0 on both
sides, vocabulary 250,002; in the unified stage both distil. Each contestant has a process of its own; in each round each takes
one step, in turns; medians are compared, and both losses printed, which must agree.

    --stage unified (the default), dense (the dense loss alone, on both sides; the paper's pairs are as many passages as
            queries) or retromae (on the rows of --passages, ours alone: the peer has no stage 1)

Columns: tokens/s of queries and passages; × Flag; GB, peak memory of the process with all that it imports (on a GPU, of the
device); compile s; GFLOP/s of the encoder, 3 · L · (24 · n · w² + 4 · n² · w) for a text of n tokens forward and backward, and
of peak, its share of a matrix product's rate in as many bits, measured before and after. What the scores of tokens add
(2 · 3 · queries · passages · n · n · w for colbert) is counted apart, as colbert. Of stage 1 all of the model's FLOPs count, as
train/flops.py has them: those of the decoder's layer and of the vocabulary's logits too.

    --largest LENGTH …   the largest batch (queries × a group of 8, pairs, or texts) of each length whose step fits into a
                         device's memory, whole and in sub-batches, by compiling: nothing runs. --memory GB says how much;
                         without it the device's own. With --chip v5e, v6e or v5p for one such TPU, by libtpu (`.[test,tpu]`)
"""

import argparse
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import contestants
import numpy as np
from steps import Case, Ours, Peer, batch_of, gradient_of, make_full_vocabulary, serve
from texts import small_tokenizer
from workers import SPAWN

GROUPS = {"unified": 8, "dense": 1}  # passages a query of --largest; PAPER §3


def product_rate(width: int, dtype: str) -> float:
    """FLOP/s of a matrix product of this width."""
    return contestants.MatrixProduct(Path(), False, dtype).rate(width)


def apart(function: Any, *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=SPAWN) as pool:
        return pool.submit(function, *arguments).result()


def compare(case: Case, layers: int, width: int, repeats: int) -> None:
    makers: dict[str, Any] = {"m3jax": Ours}
    if case.stage != "retromae" and find_spec("FlagEmbedding"):
        makers["FlagEmbedding"] = Peer
    workers, compiling = {}, {}
    for name, make in makers.items():
        connection, theirs = SPAWN.Pipe()
        SPAWN.Process(target=serve, args=(theirs, make, case), daemon=True).start()
        told = connection.recv()
        if isinstance(told, str):
            print(f"not measured: {name}: {told}")
            continue
        workers[name], compiling[name] = connection, told
    rates = [apart(product_rate, width, case.dtype)]
    taken: dict[str, list[tuple[float, float, int]]] = {name: [] for name in workers}
    for _ in range(repeats):
        for name, connection in workers.items():
            connection.send("step")
            answer = connection.recv()
            if isinstance(answer, str):
                raise SystemExit(f"{name}: {answer}")
            taken[name].append(answer)
    rates.append(apart(product_rate, width, case.dtype))
    for connection in workers.values():
        connection.send(None)
    peak = statistics.mean(rates)
    flops, colbert = case.flops(layers, width)
    medians = {name: statistics.median(x for x, _, _ in runs) for name, runs in taken.items()}
    more = f", colbert's scores {colbert / 1e9:.0f} more" if colbert else ""
    print(f"model {flops / 1e9:.0f} GFLOP a step{more}; ", end="")
    print(f"a matrix product {peak / 1e9:.0f} GFLOP/s ({rates[0] / 1e9:.0f}, {rates[1] / 1e9:.0f})")
    print("tokens/s  × Flag   spread     GB  compile s  GFLOP/s  of peak       loss  contestant")
    for name, runs in taken.items():
        seconds = medians[name]
        spread = (max(x for x, _, _ in runs) - min(x for x, _, _ in runs)) / seconds
        ratio = f"{medians['FlagEmbedding'] / seconds:.2f}" if "FlagEmbedding" in medians else "–"
        print(
            f"{case.tokens / seconds:8,.0f} {ratio:>7} {spread:7.0%} {max(m for _, _, m in runs) / 1e9:7.2f} "
            f"{compiling[name]:10.1f} {flops / seconds / 1e9:8.0f} {flops / seconds / peak:8.0%} {runs[0][1]:10.6f}  {name}"
        )


def largest(lengths: list[int], given: argparse.Namespace) -> None:
    """Compile for more and more queries until a step no longer fits."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from m3jax import retromae
    from m3jax.config import M3Config
    from m3jax.model import shapes
    from train.compiled import bytes_of, device_memory
    from train.sub_batch import SubBatches

    placed, memory, on = None, given.memory, nullcontext()
    if given.chip:
        from tests.tpu.chips import MEMORY, tpu_mesh

        mesh, memory = tpu_mesh(given.chip, 1), memory or MEMORY[given.chip]
        placed, on = NamedSharding(mesh, PartitionSpec()), jax.set_mesh(mesh)
    limit = memory * 1e9 if memory else device_memory()
    model = M3Config(
        hidden_size=given.width,
        num_hidden_layers=given.layers,
        num_attention_heads=given.width // 64,
        intermediate_size=4 * given.width,
        colbert_dim=given.width,
    )
    group = GROUPS.get(given.stage, 1)
    params, what = shapes(model), f"queries with {group} passages each"
    if given.stage == "retromae":
        params, what = retromae.shapes(model), "texts"
    state = 2 * sum(x.size * 4 for x in jax.tree.leaves(params))  # AdamW's moments, which this step does not hold

    def bytes_taken(count: int, length: int, whole: bool) -> float:
        sides = {"texts": (count, length)}
        if given.stage != "retromae":
            sides = {"queries": (count, min(length, 512)), "passages": (count * group, length)}
        parts = SubBatches() if whole else SubBatches(**{name: rows for name, (rows, _) in sides.items()})
        rows = [jax.ShapeDtypeStruct(side, np.int32) for side in sides.values()]
        case = Case(given.stage, Path(), rows[0].shape, rows[-1].shape, given.dtype, 0, given.remat)
        batch = jax.eval_shape(lambda *x: batch_of(given.stage, x[0], x[-1]), *rows)
        shaped = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), (params, batch))
        try:
            return bytes_of(gradient_of(model, case, parts).lower(*shaped).compile()) + state
        except jax.errors.JaxRuntimeError as error:  # TPU's compiler refuses what is larger than the memory
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return math.inf

    print(f"largest batch of {what}, {given.stage}, in {limit / 1e9:.0f} GB, remat {given.remat!r}")
    print("length   whole  MB a query   in sub-batches of one row  MB a query", flush=True)
    with on:
        for length in lengths:
            cells = []
            for whole in (True, False):
                count, each = most(lambda n, length=length, whole=whole: bytes_taken(n, length, whole), limit)
                cells.append(f"{count:7,} {each / 1e6:11,.0f}")
            print(f"{length:6,} {cells[0]} {cells[1]:>40}", flush=True)


def most(bytes_taken: Callable[[int], float], limit: float) -> tuple[int, float]:
    """The largest batch within the limit, to a sixteenth, and the bytes that one more of its queries takes."""
    low, of_low, high, each, following = 0, 0.0, None, 0.0, 1
    while high is None or high - low > max(1, low // 16):
        if (taken := bytes_taken(following)) > limit:
            high = following
        else:
            each = (taken - of_low) / (following - low) if low else 0.0
            low, of_low = following, taken
        if high:
            following = (low + high) // 2
        else:  # a little before where the last two say that it ends, and then what would be a sixteenth more
            guess = low + int(0.97 * (limit - of_low) / each) if each > 0 else 2 * low
            following = max(low + max(1, low // 16), min(guess, 8 * low))
    return low, each


def shape(text: str) -> tuple[int, int]:
    first, second = map(int, text.split("x"))
    return first, second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("unified", "dense", "retromae"), default="unified")
    parser.add_argument("--geometry", type=shape, default=(4, 256), help="layers x width; heads of 64")
    parser.add_argument("--queries", type=shape, help="rows x tokens; 4x64, none in stage 1")
    parser.add_argument("--passages", type=shape, default=(16, 256), help="rows x tokens; in stage 1 the texts")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--remat", default="elements", help="as in configs/base.py; ours only")
    parser.add_argument("--sub_batch_tokens", type=int, default=0, help="ours only; 0 is the whole batch at once")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--largest", type=int, nargs="+", metavar="LENGTH")
    parser.add_argument("--memory", type=float, metavar="GB")
    parser.add_argument("--chip", choices=("v5e", "v6e", "v5p"), help="of --largest")
    given = parser.parse_args()
    given.layers, given.width = given.geometry
    if given.stage == "retromae" and given.queries:
        parser.error("stage 1 has no queries, only --passages, its texts")
    queries = (0, 1) if given.stage == "retromae" else given.queries or (4, 64)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the peer needs memory too
    device = f"compiled for one {given.chip} on" if given.chip else apart(contestants.backend)[1] + ","
    print(
        f"{given.stage}, {given.layers} × {given.width}, {given.dtype}, {device} {len(os.sched_getaffinity(0))} cores"
    )
    if given.largest:
        largest(given.largest, given)
        return
    with tempfile.TemporaryDirectory() as work:
        model, tokenizer = Path(work) / "model", Path(work) / "tokenizer.json"
        small_tokenizer(tokenizer)
        apart(make_full_vocabulary, model, tokenizer, given.layers, given.width)
        case = Case(given.stage, model, queries, given.passages, given.dtype, given.sub_batch_tokens, given.remat)
        compare(case, given.layers, given.width, given.repeats)


if __name__ == "__main__":
    main()
