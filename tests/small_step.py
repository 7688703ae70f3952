"""A model, settings and a batch for tests of the training step and its loss.

Not here: whole runs (small_run.py).
"""

import numpy as np

from configs import base
from m3jax.config import M3Config
from train.data.pipeline import Batch

MODEL = M3Config.tiny(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=10,
)
ROWS, GROUP, LENGTH = 4, 2, 8
PARTS = ("dense", "sparse", "colbert")


def config(**changes):
    """base.py with weights of which no two are equal, so that none can stand for another."""
    settings = base.get_config()
    settings.update(steps=10, learning_rate=1e-2, warmup=0.0, weight_decay=0.1, temperature=0.1, remat="elements")
    settings.update(hybrid_weights=(0.7, 0.4, 1.1), loss_weights=(0.9, 0.2, 1.3), **changes)
    return settings


def texts(count, seed):
    """`count` padded rows of 4 to 8 tokens below 30, some of them repeated, and their mask."""
    random = np.random.default_rng(seed)
    mask = np.arange(LENGTH) < random.integers(4, LENGTH + 1, (count, 1))
    ids = np.where(mask, random.integers(4, 30, (count, LENGTH)), MODEL.pad_token_id).astype(np.int32)
    ids[:, 0] = MODEL.cls_token_id
    return ids, mask


def batch(known=None):
    """Four rows of two passages; row i knows its own positive, and those that `known` names by their columns."""
    identity = np.random.default_rng(2).integers(2**32, size=(ROWS * GROUP, 2), dtype=np.uint32)
    columns = np.repeat(np.arange(ROWS)[:, None] * GROUP, ROWS * GROUP, axis=1)
    for row, others in (known or {}).items():
        columns[row, : len(others)] = others
    present, own_group = np.ones(ROWS * GROUP, bool), np.zeros(ROWS, bool)
    no_scores = np.full((ROWS, GROUP), -np.inf, np.float32)
    return Batch(*texts(ROWS, 0), *texts(ROWS * GROUP, 1), identity, identity[columns], present, own_group, no_scores)


def total(parts, distill):
    """The loss of PAPER §2 from its parts."""
    contrastive = (0.9 * parts["dense"] + 0.2 * parts["sparse"] + 1.3 * parts["colbert"] + parts["hybrid"]) / 4
    distilled = sum(w * parts[f"distill/{name}"] for w, name in zip((0.9, 0.2, 1.3), PARTS, strict=True)) / 3
    return (contrastive + distilled) / 2 if distill else contrastive
