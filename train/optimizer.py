"""The optimiser of every stage: AdamW after clipping, with linear warm-up and decay, from the config.

Not here: the update itself (step.py). PAPER §3 has the numbers; the keys are in configs/base.py.
"""

from typing import Any

import jax
import optax

from m3jax.sharding import path_name
from train import Config


def learning_rate(config: Config) -> optax.Schedule:
    """Update → learning rate: linear up over the first `warmup` (share of all), then linear down to 0 at the end.

    An update follows each `accumulate` steps.
    """
    updates = config.steps // config.accumulate
    rising = round(config.warmup * updates)
    return optax.schedules.join_schedules(
        [
            optax.schedules.linear_schedule(0.0, config.learning_rate, rising),
            optax.schedules.linear_schedule(config.learning_rate, 0.0, updates - rising),
        ],
        [rising],
    )


def decayed(params: Any) -> Any:
    """Which parameters weight decay applies to: matrices, but not the pooler, which no loss ever moves."""
    return jax.tree_util.tree_map_with_path(lambda path, x: x.ndim > 1 and "pooler" not in path_name(path), params)


FROZEN = "frozen"


def parameter_groups(config: Config, params: Any) -> Any:
    """The group of each parameter, "encoder", "sparse" or "colbert", or FROZEN: what `frozen` names, and unused heads.

    A head whose function is not trained gets no gradient, and weight decay alone would wear it away.
    """
    frozen = {*config.frozen, *({"sparse", "colbert"} - {*config.functions})}

    def group(path: tuple[Any, ...], _: Any) -> str:
        name = path_name(path)
        if "position_embeddings" in name and "positions" in frozen:
            return FROZEN
        found = next((head for head in ("sparse", "colbert") if f"{head}_linear" in name), "encoder")
        return FROZEN if found in frozen else found

    return jax.tree_util.tree_map_with_path(group, params)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW; no decay on biases and LayerNorm; frozen parameters stay, without moments.

    The norm is that of the trained parameters' gradients, the mean over `accumulate` steps. `learning_rate_scale` is a factor
    of a group's learning rate.
    """

    def scaled(updates: Any, _: Any = None) -> Any:
        return jax.tree.map(
            lambda x, group: x * config.learning_rate_scale[group], updates, parameter_groups(config, updates)
        )

    trained = optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            learning_rate(config),
            b1=config.adam_b1,
            b2=config.adam_b2,
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
        optax.stateless(scaled),
    )
    optimizer = optax.partition(
        {"trained": trained, FROZEN: optax.set_to_zero()},
        lambda params: jax.tree.map(
            lambda group: FROZEN if group == FROZEN else "trained", parameter_groups(config, params)
        ),
    )
    if config.accumulate == 1:
        return optimizer
    return optax.MultiSteps(optimizer, config.accumulate).gradient_transformation()
