"""Stage 3 of the paper: dense, sparse and colbert trained together with self-distillation, on rows with hard negatives.

The defaults of base.py are this stage, with the paper's batches for each device of 80 GB. Give at least
`--config.data.train=rows.jsonl` and `--config.init_from=DIRECTORY` (or a `--config.tokenizer` for random weights). A geometry
for two CPU cores, and what it reached on real sets, is in RESULTS.md with its command.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """base.py as it stands, under its own name."""
    config = base.get_config()
    config.name = "unified"
    config.output = "runs/unified"
    return config
