"""The story of a run of stages 2 and 3: prepare → build → steps → release → measure → report.

Not here: what it starts from (start.py), what it would take (plan.py), its steps (loop.py) and what one computes (step.py),
what a measure means (evaluation.py), how results look (report.py).
"""

import dataclasses
import datetime
import hashlib
import json
import os
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import FrozenConfigDict

import m3jax
from m3jax.card import CARD
from m3jax.config import M3Config
from m3jax.model import M3
from m3jax.retrieval import FUNCTIONS
from train import Config
from train.console import say
from train.evaluation import Evaluation, evaluate
from train.example import worked_example
from train.files import write_json, write_whole
from train.loop import Clock, hardware, run_steps, versions
from train.objective import hybrid_weights, loss_arguments, measured_functions
from train.optimizer import make_optimizer
from train.plan import plan
from train.preemption import Preemption
from train.processes import agreed, first_then_others, is_first, on_host
from train.release import card_of_run
from train.settings import check
from train.start import (
    DataPaths,
    checkpoints_of,
    data_paths,
    read_sets,
    start_data,
    start_model,
)
from train.step import make_step
from train.tables import format_changes, format_example, format_table
from train.tasks import Task
from train.tuning import Hybrid, Weights

# A run goes on only with these as it began, and with the same data: all but how often it is looked at and where.
_KEPT = (
    *("seed", "init_from", "length_groups", "group_size", "shuffle_segments", "accumulate", "functions", "frozen"),
    *("matryoshka", "steps", "learning_rate", "learning_rate_scale", "warmup", "weight_decay", "clip", "adam_b1"),
    *("adam_b2", "adam_eps", "temperature", "objective", "hybrid_weights", "loss_weights", "teacher"),
    *("teacher_temperature", "distill_start", "dropout", "dtype"),
)


def train(config: Config) -> dict[str, Any]:
    """Run `config` (every key is in configs/base.py) from its beginning or its last checkpoint to its report.

    Returns the content of results.json on the first of several processes, or with `plan_only` the plan alone, which leaves no
    run. Raises ValueError, before training starts, on data, sizes or settings that cannot be trained, and during it on a loss
    that is not finite; Stopped when SIGTERM asks for it, with the last step saved.
    """
    check(config)
    if config.plan_only:
        return plan(config)
    with Preemption() as preemption:
        return _run(config, preemption)


def _run(config: Config, preemption: Preemption) -> dict[str, Any]:
    run = Path(config.output)
    run.mkdir(parents=True, exist_ok=True)
    clock = Clock()
    data = first_then_others(lambda: data_paths(config), "write what is made of the data")
    dev, tests = first_then_others(lambda: read_sets(data), "read the sets that measure")
    m3 = first_then_others(lambda: start_model(config), "read or make the model")
    config, mesh, source, batches = start_data(config, data.train, m3)
    clock.lap("prepare")
    every = config.to_dict()
    kept = {key: every[key] for key in _KEPT} | {key: every["data"][key] for key in ("same_dataset", "weights")}
    kept |= {"hybrid_weights": hybrid_weights(config), "loss_weights": loss_arguments(config)["loss_weights"]}
    settings = kept | {"data": source.name}
    optimizer = make_optimizer(config)
    untrained: list[dict[str, Any]] = []

    def begin(m3: M3, first: int) -> None:
        untrained.extend(_untrained(config, run, m3, tests, preemption.look, going_on=first > 0))

    fixed = FrozenConfigDict(config)
    trained, first, reached = run_steps(
        config,
        m3,
        batches,
        lambda state, sub_batches: make_step(m3.config, fixed, optimizer, mesh, state, sub_batches),
        optimizer,
        mesh,
        settings=settings,
        best=config.keep_best if dev else "",
        begin=begin,
        measure=None if dev is None else lambda m3: _dev_scores(config, m3, dev, preemption.look),
        clock=clock,
        preemption=preemption,
    )
    known = {
        "name": config.name,
        "config": config.to_dict(),
        "parameters": sum(x.size for x in jax.tree.leaves(trained.params)),
        "rows": len(source),
    }
    # The model is there before it is measured, which may take longer or fail; its card says how good it is in the end.
    whole = dataclasses.replace(trained, params=on_host(trained.params))
    if is_first():
        m3jax.save(whole, run / "model", card=card_of_run(trained.config, known, kept))
    evaluations = [_evaluate(config, trained, task, "trained", preemption.look) for task in tests]
    if not is_first():
        return {}
    example = None
    if tests:
        example = worked_example(
            whole,
            tests[0],
            evaluations[0].runs,
            config.example.query,
            config.example.language,
            lengths=(config.query_max_length, config.passage_max_length),
        )
    clock.lap("evaluate")
    results = known | {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": clock.seconds(whole=first == 0),
        "hardware": hardware(mesh),
        "versions": versions(),
        "commands": _next_commands(config, trained.config, run, data),
        "model": "model",
        "evaluations": [one.to_dict() | {"model": "trained"} for one in evaluations] + untrained,
        "example": example,
    }
    write_json(run / "results.json", results)
    write_whole(run / "model" / CARD, card_of_run(trained.config, results, kept))
    # Here: it imports matplotlib, half a second that neither a plan nor the start of a run waits for.
    from train.report import write_report

    report = write_report(run)
    took = f" after going on from step {first}" if first else ""
    better = ""
    if reached and reached[0] != config.steps:
        better = f"best    {checkpoints_of(config)}/{reached[0]}, {config.keep_best} {reached[1]:.3f}\n"
    say("\n" + format_table(results))
    if config.init_from and (changes := format_changes(results)):
        say("\n" + changes)
    if example:
        say("\n" + format_example(example, bold=os.isatty(1)))
    say(f"\nmodel   {run / 'model'}\n{better}report  {report}\nin {clock.total:.0f} s{took}; to try next:")
    for command in results["commands"]:
        say(f"  {command}")
    return results


def _untrained(
    config: Config, run: Path, m3: M3, tests: list[Task], look: Callable[[], None], *, going_on: bool
) -> list[dict[str, Any]]:
    """Scores before the first step; a run that goes on, and so began with this model, keeps what it measured of these tasks."""
    if not (config.evaluate_untrained and tests):
        return []
    kept = run / "untrained.json"
    # By what the folders hold, not by their names: a folder may have been written anew.
    content = json.dumps([[task.name, task.corpus, task.queries, task.qrels] for task in tests]).encode()
    of = {"tests": hashlib.blake2b(content, digest_size=8).hexdigest()}
    of |= {key: config[key] for key in ("query_max_length", "passage_max_length")}
    known = json.loads(kept.read_text(encoding="utf-8")) if going_on and kept.exists() else {}
    if agreed(known.get("of") == of):
        return known.get("evaluations", [])
    say("measuring the model before training …")
    measured = [_evaluate(config, m3, task, "untrained", look).to_dict() | {"model": "untrained"} for task in tests]
    if is_first():
        write_json(kept, {"of": of, "evaluations": measured})
    return measured


def _evaluate(
    config: Config,
    m3: M3,
    task: Task,
    name: str,
    look: Callable[[], None],
    weights: Mapping[Hybrid, Weights] | None = None,
) -> Evaluation:
    """What is trained, of the five functions, on one set; BM25, which no training changes, beside the trained model only."""
    return evaluate(
        m3,
        task,
        functions=measured_functions(config),
        weights=weights,
        max_length=config.passage_max_length,
        query_max_length=config.query_max_length,
        baseline=name == "trained",
        look=look,
    )


def _dev_scores(config: Config, m3: M3, dev: Task, look: Callable[[], None]) -> dict[str, float]:
    # By the run's own weights: so the weighted sum is the teacher of self-distillation. Test sets are measured as search ranks.
    dense, sparse, colbert = hybrid_weights(config)
    weights: dict[Hybrid, Weights] = {"all": (dense, sparse, colbert)}
    if dense or sparse:  # where both are 0, it is ranked as search ranks
        weights["dense+sparse"] = (dense, sparse, 0.0)
    scores = _evaluate(config, m3, dev, "dev", look, weights).scores
    return {f"dev/{function}/{metric}": value for function, of in scores.items() for metric, value in of.items()}


def _next_commands(config: Config, sizes: M3Config, run: Path, data: DataPaths) -> list[str]:
    """Commands that work as they stand on what the run left: encode, measure and take along; of a model that had a parent,
    merge with it, which wins back what was forgotten, and serve."""
    model, quoted = run / "model", shlex.quote(str(run / "model"))
    shown = "m3jax.encode(m, 'Kenya').dense_vecs"
    if "sparse" in config.functions:
        shown = "m.tokens(m3jax.encode(m, 'Kenya').lexical_weights)"
    commands = [
        f"python -c \"import m3jax; m = m3jax.load('{model}'); print({shown})\"",
    ]
    for folder in [*data.tests[-1:], *([data.dev] if data.dev else [])][:1]:
        # As the run measured it: another command would give other numbers, of heads too that are not trained.
        lengths = f"--max_length {config.passage_max_length} --query_max_length {config.query_max_length}"
        measured = measured_functions(config)
        functions = "" if measured == FUNCTIONS else f" --functions {' '.join(measured)}"
        commands.append(
            f"python -m train.evaluate --model {quoted} --task custom --data {shlex.quote(str(folder))} {lengths}{functions}"
        )
    if not config.init_from or config.heads == "init":  # an encoder without heads is no parent to merge with
        return [*commands, f"python -m convert from-pytorch {quoted} {shlex.quote(str(run / 'orbax'))}"]
    parent, merged = shlex.quote(config.init_from), shlex.quote(str(run / "merged"))
    commands.append(f"python -m convert merge {quoted} {parent} --weights 0.5,0.5 {merged}")
    if sizes.colbert_dim == sizes.hidden_size:  # vLLM knows no other; the card has the servers that do
        commands.append(
            f"vllm serve {quoted} --runner pooling --pooler-config.task embed "
            """--hf-overrides '{"architectures": ["BgeM3EmbeddingModel"]}'  # more ways: """ + f"{model / CARD}"
        )
    return commands
