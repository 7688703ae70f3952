"""Configurations for `python -m train.main --config`: base.py lists every key, the others say what differs."""
