"""What a run would take, before it is paid for: rows, lengths, batches, memory, work, time and disk, and no parameter made.

Not here: the run (contrastive.py), and the formula of the work (flops.py).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from train import Config
from train.abstract import abstract_batch, abstract_state
from train.compiled import compile_step
from train.console import say
from train.data.streams import Shape, Stream
from train.flops import matrix_rate, step_flops
from train.optimizer import make_optimizer
from train.processes import first_then_others
from train.start import data_paths, read_sets, start_data, start_model
from train.step import make_step
from train.tables import format_duration


def plan(config: Config) -> dict[str, Any]:
    """Say what the run of `config` takes on the devices here, and return the numbers that `format_plan` shows.

    Every text is tokenised, and of each length group the step of the longest queries compiled. Raises ValueError as the run
    would.
    """
    data = first_then_others(lambda: data_paths(config), "write what is made of the data")
    dev, _ = first_then_others(lambda: read_sets(data), "read the sets that measure")
    m3 = start_model(config, values=False)
    config, mesh, source, batches = start_data(config, data.train, m3)
    optimizer, fixed = make_optimizer(config), FrozenConfigDict(config)
    state = abstract_state(m3.params, optimizer, mesh)
    rounds = sum(stream.batches_a_round for stream in batches.streams)
    planned = []
    with jax.set_mesh(mesh):
        rate = matrix_rate(mesh, config.dtype)
        for group in dict.fromkeys(stream.group for stream in batches.streams):
            streams = [stream for stream in batches.streams if stream.group == group]
            batch = abstract_batch(_largest(streams), int(source.positives.max()), mesh)
            _, parts, memory = compile_step(
                lambda sub_batches: make_step(m3.config, fixed, optimizer, mesh, state, sub_batches),
                state,
                batch,
                batches.parts,
                config.sub_batch_tokens,
            )
            queries, passages = batch.query_mask.shape, batch.passage_mask.shape
            flops = step_flops(
                m3.config,
                np.full(*queries),
                np.full(*passages),
                functions=config.functions,
                frozen=config.frozen,
                widths=config.matryoshka.colbert,
                remat=config.remat,
                sub_batches=parts,
            )
            planned.append(
                {
                    "max_length": group.max_length,
                    "rows": sum(len(stream.members) for stream in streams),
                    "batch_size": group.batch_size,
                    "group_size": passages[0] // queries[0],
                    "steps": config.steps * sum(stream.batches_a_round for stream in streams) / rounds,
                    "query_tokens": queries[1],
                    "passage_tokens": passages[1],
                    "sub_batches": parts.passages,
                    "memory": memory,
                    "encoder_flops": flops.encoder,
                    "colbert_flops": flops.colbert,
                }
            )
    found = {
        "rows": len(source),
        "lengths": {"queries": _histogram(source.query_lengths), "passages": _histogram(source.passage_lengths)},
        "counts": dict(source.counts),
        "query_max_length": config.query_max_length,
        "passage_max_length": config.passage_max_length,
        "groups": planned,
        "devices": mesh.size,
        "device": jax.devices()[0].device_kind,
        "dtype": config.dtype,
        "rate": rate,
        "checkpoint": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)),
        "checkpoints": config.keep_checkpoints + bool(dev and config.keep_best),
    }
    say(format_plan(found))
    return found


def _largest(streams: Sequence[Stream]) -> Shape:
    """Of the batches of the streams of a length group the sizes that hold them all."""
    sizes = ("group_size", "query_length", "passage_length")
    return Shape(streams[0].group.batch_size, *(max(getattr(stream, size) for stream in streams) for size in sizes))


def _histogram(lengths: np.ndarray) -> list[tuple[int, int]]:
    """(longest of the bin in tokens, texts in it); each bin ends at twice where the one before does.

    >>> _histogram(np.array([3, 8, 9, 20]))
    [(8, 2), (16, 1), (32, 1)]
    """
    bins = np.maximum(np.ceil(np.log2(lengths)).astype(int), 3)
    counts = np.bincount(bins)
    return [(2**power, int(counts[power])) for power in range(3, len(counts))]


def format_plan(found: Mapping[str, Any]) -> str:
    """The numbers of `plan` as text."""
    counts, groups = found["counts"], found["groups"]
    lines = [
        f"  cut       {counts['queries_cut']:,} of {counts['rows']:,} queries, to {found['query_max_length']} tokens; "
        f"{counts['passages_cut']:,} of {counts['passages']:,} passages, to {found['passage_max_length']}",
        "",
        "  tokens           queries   longest passages of a row",
    ]
    shown = {name: dict(bins) for name, bins in found["lengths"].items()}
    low, most = 1, max(shown["passages"].values())
    for high in sorted(shown["queries"].keys() | shown["passages"].keys()):
        queries, passages = (shown[name].get(high, 0) for name in ("queries", "passages"))
        lines.append(
            f"  {low:>5,}–{high:<6,} {queries:>11,} {passages:>11,} {'█' * round(30 * passages / most)}".rstrip()
        )
        low = high + 1
    head = ("up to", "rows", "batch", "steps", "epochs", "tokens", "parts", "memory", "TFLOP", "s/step")
    rows = []
    for group in groups:
        flops = group["encoder_flops"] + group["colbert_flops"]
        rows.append(
            (
                f"{group['max_length']:,}",
                f"{group['rows']:,}",
                f"{group['batch_size']:,} × {group['group_size']}",
                f"{group['steps']:,.0f}",
                f"{group['steps'] * group['batch_size'] / group['rows']:.2f}",
                f"{group['query_tokens']:,} × {group['passage_tokens']:,}",
                f"{group['sub_batches']:,}",
                f"{group['memory'] / 1e9:,.2f} GB",
                f"{flops / 1e12:,.3g}",
                f"{flops / found['rate']:,.3g}",
            )
        )
    lines += ["", *_columns([head, *rows])]
    total = {part: sum(group["steps"] * group[f"{part}_flops"] for group in groups) for part in ("encoder", "colbert")}
    flops = sum(total.values())
    devices = f"{found['devices']} × {found['device']}"
    took, rate = format_duration(flops / found["rate"]), f"{found['rate'] / 1e12:,.3g} TFLOP/s"
    lines += [
        "",
        "  batch: queries × passages of each. tokens: of a query × of a passage, with padding. parts: the sub-batches in",
        "  which passages are encoded. memory: of a device while a step runs, as compiled. TFLOP: of a step on all devices,",
        "  with padding and recomputation.",
        "",
        f"  work        {flops:.3g} FLOP, of which colbert {total['colbert'] / flops:.0%}",
        f"  time        {took} of steps at {rate}, what products of large {found['dtype']} matrices reach on {devices},",
        "              measured now; a run reaches a part of that rate (mfu in its metrics.jsonl) and takes longer",
        f"  checkpoint  {found['checkpoint'] / 1e9:,.3g} GB; {found['checkpoints']} are kept, and one more is there while it "
        "is written",
    ]
    return "\n".join(lines)


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
