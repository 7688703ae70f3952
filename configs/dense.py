"""The paper's stage 2: pairs, the other rows' passages as negatives, dense alone (PAPER §3).

Give `data.train` and `init_from`, a model of stage 1. What it leaves is the `init_from` of configs/unified.py.
One GPU: as it stands the batches are the paper's for one device (700 pairs of up to 500 tokens), with
`--config.dtype=bfloat16`; not measured. Two CPU cores, the demo set:
RESULTS.md, "Stages", has the command; dense went from 0.017 to 0.179 of nDCG@10 in 89 s.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """What stage 2 has otherwise than base.py."""
    config = base.get_config()
    config.name = "dense"
    config.output = "runs/dense"
    config.heads = "init"  # stage 1 trains none; those of sparse and colbert wait for stage 3
    config.functions = ("dense",)
    config.group_size = 1  # length_groups = () is then stage 2's
    config.shuffle_segments = 0.002
    config.learning_rate = 5e-5
    config.steps = 25000
    config.distill_start = -1  # one function has no hybrid to learn from
    config.keep_best = "dev/dense/ndcg_at_10"
    return config
