"""The terminal of a run: our own lines and warnings on it, everything that libraries say in a log file.

Not here: tables and pages of results (report.py).
"""

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from train import Config
from train.processes import is_first

_OURS = ("m3jax", "train", "convert", "configs")


def say(text: str) -> None:
    """One line on the terminal, above any progress bar; of several processes the first one speaks."""
    if is_first():
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


@contextlib.contextmanager
def libraries_to(path: Path) -> Iterator[None]:
    """While it holds, log records and warnings of other libraries go to the file `path`; our own warnings to the terminal."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root.handlers[:] = [handler]
    logger = logging.getLogger("warnings")
    root.setLevel(logging.INFO)

    def show(
        message: Any, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        if set(_OURS) & set(Path(filename).parts[-3:]) and issubclass(category, UserWarning):
            say(f"warning: {message}")
        logger.warning("%s:%s: %s: %s", filename, lineno, category.__name__, message)

    shown, warnings.showwarning = warnings.showwarning, show
    try:
        yield
    finally:
        warnings.showwarning = shown
        root.handlers[:] = before
        root.setLevel(level)
        handler.close()


def describe(config: Config, model: Any, rows: int, devices: int) -> str:
    """The configuration in a few lines."""
    groups = ", ".join(f"{batch} × {config.group_size} up to {length} tokens" for length, batch in config.length_groups)
    start = f"from {config.init_from}" if config.init_from else "from random weights"
    distill = (
        f"self-distillation from step {config.distill_start}" if config.distill_start >= 0 else "no self-distillation"
    )
    distill += f", teacher's scores by {config.teacher}" if config.teacher else ""
    return (
        f"{config.name}: {model}, {start}\n"
        f"  data      {rows:,} rows of {config.data.train}\n"
        f"  batches   {groups} on {devices} {'device' if devices == 1 else 'devices'}\n"
        f"  training  {config.steps:,} steps, learning rate {config.learning_rate:g}, temperature "
        f"{config.temperature:g}, {distill}\n"
        f"  output    {config.output}"
    )
