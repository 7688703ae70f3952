"""Training in a process of its own, for the tests of runs that are interrupted and of runs that several processes share.

Not here: the settings of small runs (small_run.py).
"""

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import CACHED

ROOT = Path(__file__).parents[1]
# train.main as a machine without torch runs it, which is what the extra `train` installs: tensorboardX would import it, for
# more than a second of each start.
_MAIN = (
    "import runpy, sys; sys.modules['torch'] = None; {}"
    "runpy.run_module('train.main', run_name='__main__', alter_sys=True)"
)


def start_training(settings, *, devices=1, first="", stderr=subprocess.PIPE):
    """The process that trains with `settings`, keys of configs/base.py and values, after the statement `first`.

    XLA leaves most optimisations out: half the time, and the same mathematics.
    """
    variables = {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    return subprocess.Popen(
        [sys.executable, "-c", _MAIN.format(first), "--config=configs/base.py", *flags],
        cwd=ROOT,
        env=os.environ | CACHED | variables,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )
