"""Stage 3 of the paper: dense, sparse and colbert trained together with self-distillation, on rows with hard negatives.

The defaults of base.py are this stage, with the paper's batches for each device of 80 GB. Give at least
`--config.data.train=rows.jsonl` and `--config.init_from=DIRECTORY` (or a `--config.tokenizer` for random weights).
One GPU: as it stands the batches are the paper's for one device (48 queries of up to 500 tokens, 8 passages each), with
`--config.dtype=bfloat16`; its step is in RESULTS.md, a whole run is not measured. Two CPU cores, a model of one layer of 128:
`--config.query_max_length=24 --config.passage_max_length=64 --config.length_groups='((64, 64),)' --config.group_size=2
--config.temperature=0.05 --config.steps=400 --config.learning_rate=4e-3 --config.distill_start=80` gave nDCG@10 of 0.21
by dense, 0.56 by sparse and 0.46 by colbert on questions in five languages in five to seven minutes (RESULTS.md, "Stages").
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """base.py as it stands, under its own name."""
    config = base.get_config()
    config.name = "unified"
    config.output = "runs/unified"
    return config
