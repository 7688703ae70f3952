"""Stage 1 of the paper: RetroMAE, masked auto-encoding of plain texts, before any pairs of texts are needed.

The defaults are the paper's, for 32 devices of 40 GB. Give `--config.data.train=texts.jsonl` (or .txt, a folder, "cldr",
tfds:NAME) and `--config.init_from=DIRECTORY`, which `python -m convert from-pytorch FacebookAI/xlm-roberta-large DIRECTORY
--heads init --extend-positions 8194` writes (or a `--config.tokenizer` for random weights). One GPU:
`--config.dtype=bfloat16`, and as many texts as one has time for (`--config.length_groups`; sub-batches hold the memory); not
measured. Two CPU cores, a model of one layer of 128: `--config.length_groups='((24, 128), (64, 64))'
--config.passage_max_length=64 --config.steps=300 --config.learning_rate=1e-3`, five to nine minutes, too short to help: such
an encoder knows of a text its language and little more (RESULTS.md, "Stages"). The run releases the encoder alone; stage 2,
configs/dense.py, starts from it with `--config.init_from=runs/retromae/model`.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """What stage 1 has otherwise than base.py."""
    config = base.get_config()
    config.name = "retromae"
    config.output = "runs/retromae"
    config.stage = "retromae"
    # PAPER §3: 32 texts a device × 16 accumulated × 32 devices; of one length group at a time, as in its later stages (§4).
    # Sub-batches take the place of accumulating.
    config.length_groups = tuple((length, 16384) for length in (500, 1000, 2000, 3000, 4000, 5000, 6000, 7000, 8192))
    config.steps = 20000  # PAPER §3
    config.learning_rate = 7e-5  # PAPER §3
    config.distill_start = -1
    config.keep_best = ""
    return config
