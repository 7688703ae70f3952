"""Programs of this repository: `python -m train.main` trains, `python -m train.evaluate` measures."""

from typing import Any

# An ml_collections ConfigDict of configs/: locked, so that no key is unknown, but without static types.
Config = Any
