"""Checkpoints of a run: model, optimiser and step together, saved while training goes on, restored onto any mesh.

Not here: the model's own part of a step, which `m3jax.load` reads too (m3jax/checkpoint.py).
"""

import json
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp

from m3jax import checkpoint
from m3jax.config import M3Config
from m3jax.tokenization import Tokenizer
from train.step import TrainState

_OPTIMIZER, _RUN = "optimizer", "run"


class Checkpoints:
    """The checkpoints under one directory; a context manager that waits for the last save.

    settings: what batches and their order follow from (seed, groups, data); a checkpoint of other settings is refused,
    because going on would replay or skip rows.
    """

    def __init__(self, directory: Path, *, keep: int, settings: dict[str, Any]):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)
        self._directory = directory
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

    def save(self, model: M3Config, tokenizer: Tokenizer, state: TrainState, step: int) -> None:
        """Save `state` as after `step` steps, in the background; a step that is there already is left as it is."""
        if step == self.last:
            return
        items = checkpoint.arguments(model, state.params, tokenizer)
        items[_OPTIMIZER] = ocp.args.PyTreeSave(state.optimizer)
        items[_RUN] = ocp.args.JsonSave({"step": step, "settings": self._settings})
        self._manager.save(step, args=ocp.args.Composite(**items))

    def check(self, model: M3Config) -> None:
        """ValueError where the last checkpoint is of another model or other settings."""
        step = self.last
        if step is None:
            return
        stored = self._manager.restore(step, args=ocp.args.Composite(**{_RUN: ocp.args.JsonRestore()}))[_RUN]
        if stored["settings"] != self._settings:
            differ = sorted(
                k
                for k in self._settings.keys() | stored["settings"].keys()
                if self._settings.get(k) != stored["settings"].get(k)
            )
            raise ValueError(
                f"{self._directory}: a run goes on only with the settings it began with; these differ: "
                + "; ".join(f"{k} was {stored['settings'].get(k)!r}, is {self._settings.get(k)!r}" for k in differ)
                + ". Give the old ones, or another --config.output for a new run"
            )
        found, _ = checkpoint.describe(self._directory.absolute() / str(step))
        if found != model:
            raise ValueError(f"{self._directory}: step {step} is of another model, {found}; this run has {model}")

    def restore(self, state: TrainState) -> TrainState:
        """The last checkpoint, which `check` accepts, as a state placed like `state`."""
        step = self.last
        assert step is not None
        folder = self._directory.absolute() / str(step)
        _, params, _ = checkpoint.read(folder, sharding=lambda _: jax.tree.map(lambda x: x.sharding, state.params))
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state.optimizer)
        restore = ocp.args.PyTreeRestore(target, restore_args=ocp.checkpoint_utils.construct_restore_args(target))
        moments = self._manager.restore(step, args=ocp.args.Composite(**{_OPTIMIZER: restore}))[_OPTIMIZER]
        return TrainState(params, moments, jax.device_put(jax.numpy.int32(step), state.step.sharding))
