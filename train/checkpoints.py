"""Checkpoints of a run: model, optimiser and step together, saved while training goes on, restored onto any mesh.

Not here: the model's own part of a step, which `m3jax.load` reads too (m3jax/checkpoint.py).
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policy

from m3jax import checkpoint
from m3jax.config import M3Config
from m3jax.tokenization import Tokenizer
from train.processes import is_first
from train.step import TrainState

_OPTIMIZER, _RUN, _SCORES = "optimizer", "run", "metrics"  # folders of a step; the last is named by Orbax


class Checkpoints:
    """The checkpoints under one directory, local or gs://; a context manager that waits for the last save.

    The last `keep` stay, and the one with the highest score named `best` of those that have scores ("" keeps none for it).
    settings: what batches and their order follow from (seed, groups, data); a checkpoint of other settings is refused,
    because going on would replay or skip rows.
    """

    def __init__(self, directory: str | Path, *, keep: int, best: str = "", settings: dict[str, Any]):
        def score(scores: dict[str, float]) -> float:
            return scores.get(best, -math.inf)  # of a run that measured by other functions

        policies: list[Any] = [policy.LatestN(keep)]
        if best:
            policies.append(policy.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy.AnyPreservationPolicy(policies), best_fn=score if best else None, create=True
        )
        self._directory = checkpoint.place(directory)
        self._manager = ocp.CheckpointManager(self._directory, options=options)
        self._measure, self._keep = best, keep
        # The best step and its score, None before there is one. Orbax would read it from a step that is still being written.
        self.best: tuple[int, float] | None = None
        found = self._manager.best_step() if best else None
        if found is not None and best in (scores := self._manager.metrics(found) or {}):
            self.best = found, scores[best]
        self._settings = json.loads(json.dumps(settings))

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    @property
    def last(self) -> int | None:
        """The last finished step, None before the first."""
        return self._manager.latest_step()

    @property
    def measured(self) -> bool:
        """Whether the last finished step was saved with scores."""
        return self.last is not None and bool(self._manager.metrics(self.last))

    def is_best(self, scores: Mapping[str, float]) -> bool:
        """Whether a step with these scores would be the best so far; of equals it is the later one."""
        return self._measure in scores and (self.best is None or scores[self._measure] >= self.best[1])

    def save(
        self,
        model: M3Config,
        tokenizer: Tokenizer,
        state: TrainState,
        step: int,
        scores: Mapping[str, float] | None = None,
    ) -> None:
        """Save `state` as after `step` steps, in the background; a step that is there already is left as it is.

        scores: what this state reaches, by name, where it was measured.
        """
        if step == self.last:
            return
        items = checkpoint.arguments(model, state.params, tokenizer)
        items[_OPTIMIZER] = ocp.args.PyTreeSave(state.optimizer)
        items[_RUN] = ocp.args.JsonSave({"step": step, "settings": self._settings})
        self._manager.save(step, args=ocp.args.Composite(**items), metrics=dict(scores) if scores else None)
        if scores and self.is_best(scores):
            self.best = step, scores[self._measure]

    def add_scores(self, scores: Mapping[str, float]) -> None:
        """Give the last step, which was stopped before they were there, its scores, where Orbax looks for them."""
        step = self.last
        assert step is not None
        if is_first():
            folder = self._directory / str(step) / _SCORES
            folder.mkdir(exist_ok=True)
            partial = folder / f"{_SCORES}.partial"
            partial.write_text(json.dumps(dict(scores)))
            partial.replace(folder / _SCORES)
        multihost_utils.sync_global_devices("m3jax: the scores of the last step are there")
        self._manager.reload()
        if self.is_best(scores):
            if self.best and self.best[0] not in sorted(self._manager.all_steps())[-self._keep :]:
                self._manager.delete(self.best[0])  # as the next save would
            self.best = step, scores[self._measure]

    def check(self, model: M3Config) -> None:
        """ValueError where the last checkpoint is of another model or other settings."""
        step = self.last
        if step is None:
            return
        begun = _settings(self._manager, step)
        if begun != self._settings:
            differ = sorted(k for k in self._settings.keys() | begun.keys() if self._settings.get(k) != begun.get(k))
            raise ValueError(
                f"{self._directory}: a run goes on only with the settings it began with; these differ: "
                + "; ".join(f"{k} was {begun.get(k)!r}, is {self._settings.get(k)!r}" for k in differ)
                + ". Give the old ones, or another --config.output for a new run"
            )
        found, _ = checkpoint.describe(self._directory / str(step))
        if found != model:
            raise ValueError(f"{self._directory}: step {step} is of another model, {found}; this run has {model}")

    def restore(self, state: TrainState) -> TrainState:
        """The last checkpoint, which `check` accepts, as a state placed like `state`."""
        step = self.last
        assert step is not None
        folder = self._directory / str(step)
        _, params, _ = checkpoint.read(
            folder,
            sharding=lambda _: jax.tree.map(lambda x: x.sharding, state.params),
            shapes=lambda _: jax.eval_shape(lambda: state.params),
        )
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state.optimizer)
        restore = ocp.args.PyTreeRestore(target, restore_args=ocp.checkpoint_utils.construct_restore_args(target))
        moments = self._manager.restore(step, args=ocp.args.Composite(**{_OPTIMIZER: restore}))[_OPTIMIZER]
        return TrainState(params, moments, jax.device_put(jax.numpy.int32(step), state.step.sharding))


def settings_of(directory: str | Path) -> dict[str, Any]:
    """The settings that the run with its checkpoints under `directory` began with; {} where there is none."""
    place = checkpoint.place(directory)
    if not place.exists():
        return {}
    with ocp.CheckpointManager(place) as manager:
        step = manager.latest_step()
        return {} if step is None else _settings(manager, step)


def _settings(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    return manager.restore(step, args=ocp.args.Composite(**{_RUN: ocp.args.JsonRestore()}))[_RUN]["settings"]
