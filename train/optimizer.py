"""The optimiser of every stage: AdamW after clipping, with linear warm-up and decay, from the config.

Not here: the update itself (step.py). PAPER §3 has the numbers; the keys are in configs/base.py.
"""

from typing import Any

import jax
import optax

from m3jax.sharding import path_name
from train import Config


def learning_rate(config: Config) -> optax.Schedule:
    """Step → learning rate: linear up over the first `warmup` (share of all steps), then linear down to 0 at the end."""
    rising = round(config.warmup * config.steps)
    return optax.schedules.join_schedules(
        [
            optax.schedules.linear_schedule(0.0, config.learning_rate, rising),
            optax.schedules.linear_schedule(config.learning_rate, 0.0, config.steps - rising),
        ],
        [rising],
    )


def decayed(params: Any) -> Any:
    """Which parameters weight decay applies to: matrices, but not the pooler, which no loss ever moves."""
    return jax.tree_util.tree_map_with_path(lambda path, x: x.ndim > 1 and "pooler" not in path_name(path), params)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW; no decay on biases and LayerNorm."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            learning_rate(config),
            b1=config.adam_b1,
            b2=config.adam_b2,
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )
