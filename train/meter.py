"""What is seen of the steps while they run: checked, timed, and written to the terminal and the log, one step late.

Not here: what a step measures (step.py), where the log keeps it (log.py).
"""

import logging
import math
import os
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from m3jax.losses import PARTS
from train import Config
from train.console import say
from train.data.pipeline import Batch, Batches
from train.log import Log
from train.optimizer import learning_rate
from train.processes import is_first

# Measures of the work of a step (step.work), which become rates.
_WORK = ("tokens", "places", "flops")
# A sparse head has collapsed when for so many steps running a query or a passage has less than one term with a weight above 0,
# on average. A trained head keeps several; and ReLU gives no gradient where it gives 0, so that a collapse does not heal.
_COLLAPSED_AFTER = 10
_SHOWN_ROWS = 8


class Meter:
    """A progress bar, and the measures of each step once it is done, which is while the next one runs. A context manager.

    first: the steps that are done. rate: FLOP/s that all devices together reach in matrix products (flops.matrix_rate).

    A line of the log holds the step's measures, and of all steps since the line before `steps_per_second`,
    `tokens_per_second` (padding is none), `padding` (the share of it in the rows) and `mfu`, model-FLOPs utilisation: the
    encoder's work on real tokens, forward and backward, without recomputation, over what matrix products would have done in
    that time. What a program took to compile, and dev sets to be measured, is in none of them.
    """

    def __init__(self, config: Config, log: Log, batches: Batches, *, first: int, rate: float):
        self._config = config
        self._log = log
        self._batches = batches
        self._rate = rate
        self._learning_rate = learning_rate(config)
        self._shapes: set[Any] = set()
        self._compiles = False  # the step that begins
        self._running: tuple[int, Mapping[str, jax.Array], bool] | None = None  # number, measures, was it compiled
        self._since = time.perf_counter()
        self._span = _Span()
        self._without_terms = 0
        # Redrawn twice a second on a terminal; in a file, where every redrawing stays, each half minute.
        interval = 0.5 if os.isatty(2) else 30
        self._bar = tqdm(
            total=config.steps, initial=first, unit="step", desc="train", mininterval=interval, disable=not is_first()
        )

    def __enter__(self) -> "Meter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def begin(self, batch: Batch) -> None:
        """A step on `batch` begins."""
        shape = tuple(batch.sides.values())
        self._compiles = shape not in self._shapes
        if self._compiles:
            self.finish()  # compiling is not its time
            self._shapes.add(shape)
        if self._running is None:  # what was done since the last one is not this one's time
            self._since = time.perf_counter()

    def run(self, number: int, measures: Mapping[str, jax.Array]) -> None:
        """Step `number` (from 1) runs on the devices, and will have these measures; the one before is finished meanwhile."""
        self.finish()
        self._running = number, measures, self._compiles

    def finish(self) -> None:
        """Wait for the step that runs, if any, and write what it measured; ValueError where that is not finite."""
        if self._running is None:
            return
        number, measures, compiled = self._running
        self._running = None
        values = {name: float(value) for name, value in jax.device_get(measures).items()}
        self._check(number, values)
        now = time.perf_counter()
        work = {name: values.pop(name) for name in _WORK}
        if not compiled:
            self._span.add(now - self._since, work)
        self._since = now
        self._warn_of_collapse(number, values)
        if number - 1 < self._config.distill_start or self._config.distill_start < 0:
            values = {name: value for name, value in values.items() if not name.startswith("distill/")}
        if number % self._config.log_every == 0 or number in (1, self._config.steps):
            values |= {"learning_rate": float(np.asarray(self._learning_rate((number - 1) // self._config.accumulate)))}
            values |= self._span.rates(self._rate)
            self._span = _Span()
            self._log.write(number, values)
            self._bar.set_postfix_str(_postfix(values), refresh=False)
        self._bar.update()

    def _check(self, number: int, values: Mapping[str, float]) -> None:
        wrong = ", ".join(name for name, value in values.items() if not math.isfinite(value))
        if not wrong:
            return
        group, places = self._batches.places(number - 1)
        logging.getLogger(__name__).error("the rows of step %d: %s", number, ", ".join(places))
        more = f" and {len(places) - _SHOWN_ROWS:,} more, all of them in log.txt" if len(places) > _SHOWN_ROWS else ""
        raise ValueError(
            f"every measure of a step must be finite, but in step {number} these are not: {wrong}. Its batch is of the length "
            f"group up to {group.max_length} tokens, rows {', '.join(places[:_SHOWN_ROWS])}{more}. The last checkpoint is as "
            "it was; lower learning_rate, or look at these rows"
        )

    def _warn_of_collapse(self, number: int, values: Mapping[str, float]) -> None:
        """One warning for a run: see _COLLAPSED_AFTER."""
        if self._without_terms >= _COLLAPSED_AFTER:
            return
        active = {name: value for name, value in values.items() if name.startswith("active_terms/")}
        self._without_terms = self._without_terms + 1 if any(value < 1 for value in active.values()) else 0
        if self._without_terms == _COLLAPSED_AFTER:
            shown = " and ".join(f"{value:.2f} a {name.split('/')[1]}" for name, value in active.items())
            say(
                f"warning: the sparse head has collapsed: for {_COLLAPSED_AFTER} steps, up to step {number}, texts had fewer "
                f"than one term with a weight above 0 ({shown}). It does not recover by itself: start again with a lower "
                "second number of loss_weights, or a lower learning_rate"
            )


class _Span:
    """Seconds and work of some steps together."""

    def __init__(self) -> None:
        self._steps = 0
        self._seconds = 0.0
        self._work = dict.fromkeys(_WORK, 0.0)

    def add(self, seconds: float, work: Mapping[str, float]) -> None:
        self._steps += 1
        self._seconds += seconds
        self._work = {name: value + work[name] for name, value in self._work.items()}

    def rates(self, peak: float) -> dict[str, float]:
        """As in a line of the log; nothing where there was no step."""
        if not self._steps:
            return {}
        return {
            "steps_per_second": self._steps / self._seconds,
            "tokens_per_second": self._work["tokens"] / self._seconds,
            "padding": 1 - self._work["tokens"] / self._work["places"],
            "mfu": self._work["flops"] / self._seconds / peak,
        }


def _postfix(values: Mapping[str, float]) -> str:
    """What the bar shows of a line, the widest last: a terminal cuts it at its edge."""
    shown = [f"loss={values['loss']:.3f}"]
    if "mfu" in values:
        shown += [f"{values['tokens_per_second']:,.0f} tokens/s", f"padding {values['padding']:.0%}"]
        shown += [f"MFU {values['mfu']:.0%}"]
    # jit has put them into the order of the alphabet
    parts = dict.fromkeys([f"loss/{part}" for part in (*PARTS, "hybrid")] + [*values])
    shown += [f"{name[5:]}={values[name]:.3f}" for name in parts if name.startswith("loss/") and name in values]
    shown += [f"{name}={value:.2g}" for name, value in values.items() if name.startswith("gradient_norm")]
    shown += [f"{name}={value:.1f}" for name, value in values.items() if name.startswith("active_terms/")]
    return ", ".join(shown)
