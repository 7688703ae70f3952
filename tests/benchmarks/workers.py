"""Contestants of encode.py at work, each in a process of its own that is asked over a pipe.

Not here: what they compute (contestants.py).
"""

import argparse
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import contestants

SPAWN = multiprocessing.get_context("spawn")


class Failed(Exception):
    """A contestant that cannot go on."""


class Worker:
    """A contestant at work in its own process; `told` is what it says of itself."""

    def __init__(self, name: str, given: argparse.Namespace, cache: bool = False):
        self.name = name
        folder = Path(tempfile.mkdtemp(dir=given.work))
        environment = {
            "HF_HUB_OFFLINE": "1",
            "XDG_CACHE_HOME": str(folder),
            "JAX_COMPILATION_CACHE_DIR": str(folder / "jax"),
            "JAX_ENABLE_COMPILATION_CACHE": str(cache).lower(),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # the others need memory too
        }
        self._connection, theirs = SPAWN.Pipe()
        self._log = folder / "log"
        arguments = (theirs, name, given.model, given.colbert, environment, self._log)
        self._process = SPAWN.Process(target=contestants.serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self.told = self._answer()

    def ask(self, method: str, *arguments: Any) -> Any:
        self._connection.send((method, arguments))
        return self._answer()

    def close(self) -> None:
        if self._process.is_alive():
            self._connection.send(None)
        self._process.join()

    def _answer(self) -> Any:
        try:
            answer = self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            lines = self._log.read_text(errors="replace").splitlines()
            answer = RuntimeError(
                f"its process ended with {self._process.exitcode}; {lines[-1] if lines else 'no output'}"
            )
        if isinstance(answer, Exception):
            raise Failed(f"{self.name}: {answer}")
        return answer


def apart(function: Any, *arguments: Any) -> Any:
    """The result of a function in a process of its own, which leaves nothing behind."""
    with ProcessPoolExecutor(1, mp_context=SPAWN) as pool:
        return pool.submit(function, *arguments).result()


def start(names: list[str], given: argparse.Namespace, cache: bool = False) -> list[Worker]:
    """Workers of those that can start; the others are named with the reason."""
    workers = []
    for name in names:
        module, _ = (contestants.CONTESTANTS | contestants.MATRIX)[name]
        try:
            if not find_spec(module):
                raise Failed(f"{name}: {module} is not installed")
            if name == "ONNX Runtime":
                prepare_onnx(given)
            workers.append(Worker(name, given, cache))
        except Failed as why:
            print(f"not measured: {why}", flush=True)
    return workers


def prepare_onnx(given: argparse.Namespace) -> None:
    if given.backend != "cpu":
        raise Failed("ONNX Runtime: compared on CPU only")
    if not contestants.onnx_path(given.model).exists():
        try:
            apart(contestants.export_onnx, given.model)
        except Exception as error:
            raise Failed(f"ONNX Runtime: the export failed, {type(error).__name__}: {error}") from error
