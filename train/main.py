"""`python -m train.main --config configs/quickstart.py`: one training run from its configuration.

Not here: what a run does (contrastive.py, pretrain.py) and what its keys mean (configs/base.py).
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", help_string="A file of configs/; --config.KEY=VALUE changes a key.")


def main(arguments: Sequence[str]) -> None:
    """Run the configuration; what a user can cause ends in one line, not in a traceback, and SIGTERM in the exit code 75."""
    if len(arguments) > 1:
        raise app.UsageError(f"every option starts with --config, got {' '.join(arguments[1:])}")
    config = _CONFIG.value
    try:
        # Imported after the flags are read, so that a typo answers at once, and what libraries say is caught.
        from train.console import libraries_to, say
        from train.processes import join, log_file

        join(config.distributed)
        log = Path(os.devnull) if config.plan_only else Path(config.output, log_file())
        log.parent.mkdir(parents=True, exist_ok=True)
        with libraries_to(log):
            from train.contrastive import train
            from train.preemption import EXIT_CODE, Stopped
            from train.pretrain import pretrain

            try:
                {"contrastive": train, "retromae": pretrain}[stage_of(config)](config)
            except Stopped as stopped:
                say(f"{stopped}; start the same command again to go on")
                raise SystemExit(EXIT_CODE) from stopped
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


def stage_of(config: Any) -> str:
    """The config's stage; ValueError where there is none of that name."""
    if config.stage not in ("contrastive", "retromae"):
        raise ValueError(f"stage is 'contrastive' or 'retromae', got {config.stage!r}; take it from a file of configs/")
    return config.stage


def parse(arguments: Sequence[str]) -> list[str]:
    """absl's parser, with a mistyped key answered in one line ("Did you mean …") instead of a traceback."""
    try:
        left = flags.FLAGS(list(arguments))
        _CONFIG.value.lock()  # a file that cannot be read is noticed at the first look
        return left
    except AttributeError as error:
        raise SystemExit(
            f"error: --config has the keys of configs/base.py and no other: {' '.join(str(error).split())}"
        ) from error
    except (flags.Error, OSError, TypeError, ValueError) as error:
        raise SystemExit(f"error: {' '.join(str(error).split())}") from error


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse)
