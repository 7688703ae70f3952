"""Files of training rows and evaluation folders out of DATA, which has load.py and its sets/: for qa.py and xquad.py."""

import importlib.util
from pathlib import Path
from typing import Any

from train.tasks import write_task


def load_py(data: Path) -> Any:
    """DATA/load.py as a module."""
    spec = importlib.util.spec_from_file_location("load", data / "load.py")
    assert spec and spec.loader
    load = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(load)
    return load


def write_one(load: Any, task: str, folder: Path) -> None:
    """A task of DATA as the folder that `train.evaluate --task custom` and data.dev take."""
    write_task(folder, *load.load_task(task))
