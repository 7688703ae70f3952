"""The steps of a run, of whatever stage: restore → (step, log, measure, save)*.

Not here: what comes before and after them (contrastive.py, pretrain.py), what a step computes (step.py, reconstruction.py), and
what is seen of it (meter.py).
"""

import dataclasses
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from m3jax.model import M3, cast
from train import Config
from train.checkpoints import Checkpoints
from train.compiled import CompiledStep
from train.console import say
from train.data.pipeline import prefetch
from train.flops import matrix_rate
from train.log import Log
from train.meter import Meter
from train.preemption import Preemption, Stopped
from train.processes import placed
from train.start import checkpoints_of
from train.step import TrainState, make_state
from train.sub_batch import SubBatches


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
    clock: Clock,
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
                _report(log, first, scores)
                saved.add_scores(scores)
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
                        _report(log, done, scores)
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


def _report(log: Log, step: int, scores: dict[str, float]) -> None:
    log.write(step, scores)
    say(f"step {step:,}: {', '.join(f'{name} {score:.3f}' for name, score in scores.items())}")


def _model(m3: M3, state: TrainState) -> M3:
    """The model as trained so far; it shares the state's buffers, which the next step takes over."""
    return dataclasses.replace(m3, params=cast(state.params, "float32"))
