"""Real processes for tests: they can be interrupted, they find each other.

Not here: the settings of small runs (small_run.py).
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Put before the command of a process that is to be interrupted: what runs in a shell's background ignores Ctrl-C, and so would
# its children.
HEEDING = [
    sys.executable,
    "-c",
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])",
]

# train.main as a machine without torch runs it, which is what the extra `train` installs: tensorboardX would import it, for
# more than a second of each start.
_MAIN = (
    "import runpy, sys; sys.modules['torch'] = None; {}"
    "runpy.run_module('train.main', run_name='__main__', alter_sys=True)"
)


def free_address():
    """HOST:PORT at which the first of several processes can be found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def start_training(settings, *, config="base", devices=1, first="", stderr=subprocess.PIPE):
    """The process that trains with `settings`, keys of the config of that name and values, after the statement `first`.

    XLA leaves most optimisations out: half the time, and the same mathematics.
    """
    variables = {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    return subprocess.Popen(
        [sys.executable, "-c", _MAIN.format(first), f"--config=configs/{config}.py", *flags],
        cwd=ROOT,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


def train_on_two(settings, *, config="base", first="", code=0):
    """What two processes of two devices each say that train together, as `start_training` starts them, and that end with the
    code."""
    address = free_address()
    processes = [
        start_training(
            settings | {"distributed": f"{address},2,{index}"},
            config=config,
            devices=2,
            first=first.format(index=index),
        )
        for index in (0, 1)
    ]
    done = [process.communicate(timeout=600) for process in processes]
    for process, (out, error) in zip(processes, done, strict=True):
        assert process.returncode == code, out[-2000:] + error[-3000:]
    # Gloo, which carries what CPUs send each other, says on stdout that it is there.
    return ["".join(line for line in out.splitlines(True) if "peer ranks" not in line) for out, _ in done]
