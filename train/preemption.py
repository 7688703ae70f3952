"""Being asked to stop: SIGTERM, which schedulers send some seconds before they kill, or under jax.distributed to any process.

Not here: what is saved then (loop.py), and what a kill without a word leaves (checkpoints.py).
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: to be tried again


class Stopped(Exception):
    """A run was asked to stop, and all that it saved stays; the text says where it stopped."""


class Preemption:
    """A context manager: within it SIGTERM raises `Stopped` at once, but for the block `deferred`, where it waits.

    Under jax.distributed the signal is jax's own, and processes can only stop together: all of them at the same one of the
    places where they ask whether it came, `reached` and `look`, and so all ask equally often.
    """

    def __init__(self) -> None:
        settings: Any = jax.config  # its attributes have no types
        self._distributed = jax.distributed.is_initialized()
        self._synchronised = self._distributed and settings.jax_enable_preemption_service
        # Python lets the main thread alone set a handler; a run in another one is stopped by the program around it.
        self._ours = not self._distributed and threading.current_thread() is threading.main_thread()
        self._before: Any = None
        self._deferred = self._asked = False
        self._places = 0  # where this process asked

    def __enter__(self) -> "Preemption":
        if self._ours:
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ours:
            signal.signal(signal.SIGTERM, self._before)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """A block of steps: the signal is kept until `reached` is asked, or the block ends."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self._asked:
            raise Stopped("stopped after the last step")

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within a block `deferred`, one that the signal breaks off with `Stopped`, even where it came just before.

        Under jax.distributed it goes on to where it looks.
        """
        self._deferred = False
        try:
            if self._asked:
                raise Stopped("stopped among the steps")
            yield
        finally:
            self._deferred = True

    def reached(self) -> bool:
        """Whether to stop here. Every process asks after each step."""
        if self._synchronised and not self._asked:
            self._places += 1
            self._asked = multihost_utils.reached_preemption_sync_point(self._places)
        return self._asked

    def look(self) -> None:
        """`Stopped` where processes that can only stop together are to stop; with one alone the signal itself breaks off what
        runs. For places within long work where nothing is at work on the devices."""
        if self._synchronised and self.reached():
            raise Stopped("stopped while it measured, where there is nothing to save")

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if not self._deferred:
            raise Stopped("stopped outside the steps, where there is nothing to save")
