"""A trained model fine-tuned on rows of your own: dense, sparse and colbert, with self-distillation from the first step.

`python -m train.main --config configs/finetune.py --config.init_from=BAAI/bge-m3 --config.data.train=rows.jsonl` is enough.
Rows need no negatives. A twentieth of the queries is held out: the table at the end has their scores before and after, and if
`--config.data.test=FOLDER` names a general set, what was forgotten of that. For long texts: `--config.passage_max_length=8192
"--config.length_groups=((512, 32), (2048, 16), (8192, 8))"`. One GPU: as it is (not measured). Two CPU cores, a small model:
RESULTS.md, "Fine-tuning".
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """What fine-tuning has otherwise than base.py."""
    config = base.get_config()
    config.name = "finetune"
    config.output = "runs/finetune"
    config.data.held_out = 0.05
    config.passage_max_length = 512  # as in FlagEmbedding's example; longer texts are cut, and counted
    config.length_groups = ((512, 32),)  # whatever the devices: a few thousand rows make some hundred steps
    config.steps, config.epochs = 0, 2.0
    config.distill_start = 0
    config.dtype = "bfloat16"
    config.remat = "elements"
    config.evaluate_every = 200
    return config
