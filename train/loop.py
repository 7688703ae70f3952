"""The story of a run: prepare → build → restore → (step, log, evaluate, save)* → release → report.

Not here: what it starts from (start.py), what it would take (plan.py), what a step computes (step.py) and what is seen of it
(meter.py), what a measure means (evaluation.py), how results look (report.py).
"""

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

import m3jax
from m3jax.card import CARD
from m3jax.config import M3Config
from m3jax.model import M3, cast
from m3jax.sharding import make_mesh
from train import Config
from train.checkpoints import Checkpoints
from train.compiled import CompiledStep
from train.console import describe, say
from train.data.pipeline import prefetch
from train.evaluation import Evaluation, evaluate
from train.example import worked_example
from train.files import write_json, write_whole
from train.flops import matrix_rate
from train.log import Log
from train.meter import Meter
from train.objective import hybrid_weights, loss_arguments, measured_functions
from train.optimizer import make_optimizer
from train.plan import plan
from train.preemption import Preemption, Stopped
from train.processes import agreed, first_then_others, is_first, on_host, placed, rows_held
from train.release import card_of_run
from train.start import (
    DataPaths,
    check,
    checkpoints_of,
    data_paths,
    read_rows,
    read_sets,
    start_batches,
    start_model,
    with_length_groups,
    with_steps,
)
from train.step import TrainState, make_state, make_step
from train.sub_batch import SubBatches
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
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    config = with_length_groups(config, rows_held(mesh)[1])  # refused before the rows are tokenised
    source = read_rows(config, data.train, m3.tokenizer)
    batches = start_batches(config, source, mesh, m3.config)
    config = with_steps(config, batches)
    say(describe(config, m3, len(source), mesh.size))
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


def run_steps(
    config: Config,
    m3: M3,
    batches: Any,
    make: Callable[[TrainState, SubBatches], Any],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    settings: dict[str, Any],
    best: str,
    begin: Callable[[M3, int], None],
    measure: Callable[[M3], dict[str, float]] | None,
    clock: "Clock",
    preemption: Preemption,
) -> tuple[M3, int, tuple[int, float] | None]:
    """All steps of a run, of whatever stage: the model after them, the step they went on from, and the best one and its score.

    make: the jitted step for states placed like one, in sub-batches. settings: what a run goes on only with. begin: called with
    the model before the first step, and the number of steps that are done. measure: scores of a model by name, for the log and
    for what is the `best` checkpoint. The parameters of `m3` are dropped for the state's.
    """
    run = Path(config.output)
    with (
        jax.set_mesh(mesh),
        Checkpoints(checkpoints_of(config), keep=config.keep_checkpoints, best=best, settings=settings) as saved,
    ):
        saved.check(m3.config)  # before anything is written
        state = make_state(m3.params, optimizer, mesh)
        m3.params.clear()  # the state has them; random ones lay whole on one device
        first = saved.last or 0
        begin(_model(m3, state), first)
        clock.lap("evaluate")
        if first:
            state = saved.restore(state)
            say(f"going on after step {first}")
        step = CompiledStep(
            lambda sub_batches: make(state, sub_batches),
            row_groups=batches.parts,
            sub_batch_tokens=config.sub_batch_tokens,
        )
        rate = matrix_rate(mesh, config.dtype)
        with (
            Log(run, after=first) as log,
            Meter(config, log, batches, first=first, rate=rate) as meter,
            preemption.deferred(),
        ):
            if measure and first and _at(config.evaluate_every, first, config) and not saved.measured:
                with preemption.at_once():
                    scores = measure(_model(m3, state))
                log.write(first, scores)
                saved.add_scores(m3.config, m3.tokenizer, state, first, scores)
            for done, rows in enumerate(prefetch(batches, first, config.steps), first + 1):
                batch = placed(rows, mesh)
                meter.begin(batch)
                state, measures = step(state, batch)
                meter.run(done, measures)
                measuring = measure is not None and _at(config.evaluate_every, done, config)
                saving = _at(config.save_every, done, config)
                stopping = preemption.reached()
                if measuring or saving or stopping:
                    meter.finish()  # the state must be finite, and the line written
                scores = {}
                if measure and measuring and not stopping:
                    clock.lap("train")
                    try:
                        with preemption.at_once():
                            scores = measure(_model(m3, state))
                        log.write(done, scores)
                    except Stopped:  # the run that goes on measures it
                        stopping = True
                    clock.lap("evaluate")
                if saving or stopping or saved.is_best(scores):
                    saved.save(m3.config, m3.tokenizer, state, done, scores)
                if stopping:
                    raise Stopped(f"stopped after step {done:,}, which is saved")
        trained = _model(m3, state)
    clock.lap("train")
    return trained, first, saved.best


def hardware(mesh: Mesh) -> str:
    """The devices of a run and their host, for a reader."""
    return f"{mesh.size} × {jax.devices()[0].device_kind} ({platform.machine()}, {os.cpu_count()} CPU cores)"


def versions() -> dict[str, str]:
    """Of the packages that numbers depend on."""
    return {name: importlib.metadata.version(name) for name in ("m3jax", "jax", "flax", "optax")}


def _at(every: int, done: int, config: Config) -> bool:
    """Whether something that happens `every` so many steps, and at the end, happens after `done` steps."""
    return done % every == 0 or done == config.steps


class Clock:
    """Seconds of a run by what they went to."""

    def __init__(self) -> None:
        self._began = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """The time since the last lap went to `name`."""
        now = time.perf_counter()
        self._laps[name] = self._laps.get(name, 0.0) + now - self._last
        self._last = now

    @property
    def total(self) -> float:
        return self._last - self._began

    def seconds(self, *, whole: bool) -> dict[str, float]:
        """Seconds by name; with their "total" only where this process did the whole run."""
        total = {"total": self.total} if whole else {}
        return {name: round(value, 1) for name, value in (self._laps | total).items()}


def _model(m3: M3, state: TrainState) -> M3:
    """The model as trained so far; it shares the state's buffers, which the next step takes over."""
    return dataclasses.replace(m3, params=cast(state.params, "float32"))


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
    weights: dict[Hybrid, Weights] = {"dense+sparse": (dense, sparse, 0.0), "all": (dense, sparse, colbert)}
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
        commands.append(f"python -m train.evaluate --model {quoted} --task custom --data {shlex.quote(str(folder))}")
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
