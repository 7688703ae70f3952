"""`python -m train.evaluate --model DIR --task custom --data FOLDER`: the table of a model on folders of passages, queries and
relevance judgements.

Not here: how a model is measured (evaluation.py), and how weights are chosen (tuning.py).
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import m3jax
from m3jax.model import M3
from m3jax.retrieval import FUNCTIONS
from train.evaluation import encode_task, evaluate, mean, shown
from train.tasks import Task, read_tasks
from train.tuning import HYBRIDS, RERANK, Hybrid, Weights, choose_weights


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m train.evaluate`: print the table of each folder and of their mean, and write them where --output says."""
    parser = argparse.ArgumentParser(
        prog="python -m train.evaluate", description="nDCG@10 and Recall@100 of BM25 and of a model's five functions."
    )
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="a released directory, a checkpoint of ours, or a hub name"
    )
    parser.add_argument("--task", required=True, choices=["custom"], help="custom: the files of --data")
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        metavar="FOLDER",
        help="each with corpus.jsonl, test_queries.jsonl and test_qrels.jsonl",
    )
    parser.add_argument(
        "--output", metavar="DIR", help="where results.json, results.md and the TREC runs go, a folder each"
    )
    parser.add_argument(
        "--functions",
        nargs="+",
        choices=FUNCTIONS,
        default=list(FUNCTIONS),
        help="what is measured (default: all five)",
    )
    hybrid = parser.add_mutually_exclusive_group()
    hybrid.add_argument(
        "--weights",
        nargs="+",
        default=[],
        type=_weights,
        metavar="W,W[,W]",
        help="two numbers are the weights of dense and sparse in dense+sparse, three those of dense, sparse and colbert in"
        " all, as in 0.2,0.8 0.15,0.5,0.35 (default: 1,0.3 1,0.3,1)",
    )
    hybrid.add_argument(
        "--choose_weights",
        nargs="+",
        metavar="DEV",
        help="take the weights with the best mean nDCG@10 on these folders, which must be others than those of --data",
    )
    parser.add_argument(
        "--rerank",
        type=int,
        help=f"passages of dense's ranking that colbert and all rank again (default: the paper's {RERANK}; where"
        " neither dense nor a hybrid is among --functions, all)",
    )
    parser.add_argument("--max_length", type=int, help="tokens of a passage (default: the model's positions)")
    parser.add_argument("--query_max_length", type=int, help="tokens of a query (default: the model's positions)")
    flags = parser.parse_args(arguments)
    weights: dict[Hybrid, Weights] = dict(flags.weights)
    if len(weights) < len(flags.weights):
        parser.error("--weights takes two numbers once, for dense+sparse, and three once, for all")
    if unused := [by for by in ([*weights] or (HYBRIDS if flags.choose_weights else ())) if by not in flags.functions]:
        parser.error(f"weights are those of dense+sparse and all; {', '.join(unused)} is not among --functions")
    try:
        # The data first: reading it takes seconds, encoding it may take hours.
        tasks = read_tasks(flags.data)
        held_out = read_tasks(flags.choose_weights or [])
        if both := {Path(folder).resolve() for folder in flags.data} & {
            Path(folder).resolve() for folder in flags.choose_weights or []
        }:
            raise ValueError(
                f"weights are chosen on other queries than they are measured on, got {min(both)} for both --choose_weights"
                " and --data; give a dev folder to --choose_weights"
            )
        lengths = {"max_length": flags.max_length, "query_max_length": flags.query_max_length}
        m3 = m3jax.load(flags.model)
        if held_out:
            weights = _chosen(m3, held_out, RERANK if flags.rerank is None else flags.rerank, **lengths)
        done = []
        for task in tasks:
            if done:
                print()
            done.append(
                evaluate(
                    m3,
                    task,
                    functions=flags.functions,
                    weights=weights,
                    rerank=flags.rerank,
                    progress=True,
                    **lengths,
                )
            )
            print(done[-1].to_markdown(), flush=True)
            if flags.output is not None:
                done[-1].write(Path(flags.output) / task.name.replace("/", "-") if len(tasks) > 1 else flags.output)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if len(done) > 1:
        overall = mean(done)
        print(f"\n{overall.to_markdown()}")
        if flags.output is not None:
            overall.write(flags.output)


def _chosen(
    m3: M3, tasks: Sequence[Task], rerank: int, max_length: int | None, query_max_length: int | None
) -> dict[Hybrid, Weights]:
    """The weights of both hybrid functions that are best on these tasks; says how good they are there."""
    parts = [(task, encode_task(m3, task, FUNCTIONS, max_length, query_max_length, progress=True)) for task in tasks]
    encoded = [(task, part.queries, part.passages) for task, part in parts]
    chosen: dict[Hybrid, tuple[Weights, float]] = {by: choose_weights(by, encoded, rerank=rerank) for by in HYBRIDS}
    print(f"weights of dense, sparse, colbert, chosen on {', '.join(task.name for task in tasks)}:")
    for by, (weights, ndcg) in chosen.items():
        print(f"  {shown({by: weights})}: nDCG@10 {ndcg:.3f} there")
    print(flush=True)
    return {by: weights for by, (weights, _) in chosen.items()}


def _weights(text: str) -> tuple[Hybrid, Weights]:
    """What --weights takes: "0.2,0.8" are those of dense+sparse, "0.15,0.5,0.35" those of all."""
    try:
        numbers = [float(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (2, 3) or not all(map(math.isfinite, numbers)) or not any(numbers):
        raise argparse.ArgumentTypeError(
            f"expected two numbers (dense+sparse) or three (all) with commas between, finite and not all 0, got {text!r}"
        )
    by: Hybrid = "all" if len(numbers) == 3 else "dense+sparse"
    dense, sparse, colbert = (*numbers, 0.0)[:3]
    return by, (dense, sparse, colbert)


if __name__ == "__main__":
    main()
