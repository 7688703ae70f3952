"""The command-line converter between PyTorch directories and Orbax checkpoints: `python -m convert`."""
