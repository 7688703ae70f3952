"""The numbers of a run as they come, kept twice: metrics.jsonl, which the report reads, and TensorBoard's event files.

Not here: what the numbers are (meter.py, evaluation.py), and how they look (report.py).
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from train.files import write_whole
from train.processes import is_first

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter


class Log:
    """metrics.jsonl, one JSON object a line, and tensorboard/ of a run's folder; what lies past the step that a run goes on
    from is taken out of the first, and hidden by TensorBoard in the second. A context manager.

    after: the steps that are done, 0 for a run from its beginning.
    """

    def __init__(self, run: Path, *, after: int):
        self._path = run / "metrics.jsonl"
        self._events: SummaryWriter | None = None
        if not is_first():  # which alone writes
            return
        # Here: it imports torch where that is installed, seconds that plans and the other processes do without.
        import tensorboardX

        kept = []
        if self._path.exists() and after:
            # A line without its end is one that a kill cut off.
            lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= after]
        write_whole(self._path, "".join(kept))
        # Named by the second too, which another one may begin in.
        folder, suffix = str(run / "tensorboard"), f".after-{after}"
        self._events = tensorboardX.SummaryWriter(folder, purge_step=after + 1, filename_suffix=suffix)
        self._began = time.perf_counter() - (json.loads(kept[-1])["seconds"] if kept else 0.0)

    def __enter__(self) -> "Log":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._events:
            self._events.close()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values of a step."""
        if self._events is None:
            return
        seconds = round(time.perf_counter() - self._began, 3)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "seconds": seconds} | dict(values)) + "\n")
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
