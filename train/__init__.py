"""Programs of this repository: `python -m train.main` trains, `python -m train.evaluate` measures."""
