"""What a configuration says of the loss: the objective's version with its weights, the teacher, what is trained and measured.

Not here: the losses themselves (m3jax/losses.py), and what they are given (step.py).
"""

from typing import Any

from m3jax.losses import LOSS_WEIGHTS, PARTS
from m3jax.retrieval import FUNCTIONS, Function
from m3jax.scores import HYBRID_WEIGHTS
from train import Config

# w and λ of dense, sparse, colbert; PAPER §2.
_WEIGHTS = {"v4": (HYBRID_WEIGHTS, LOSS_WEIGHTS), "v1": ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0))}
OBJECTIVES = tuple(_WEIGHTS)
TEACHERS = ("", "group", "sequential")


def hybrid_weights(config: Config) -> tuple[float, float, float]:
    """w of dense, sparse, colbert: the config's, or where it has none its objective's."""
    return tuple(config.hybrid_weights) or _WEIGHTS[config.objective][0]


def loss_arguments(config: Config) -> dict[str, Any]:
    """The arguments of `m3_loss` that are settings of a run."""
    return {
        "temperature": config.temperature,
        "loss_weights": tuple(config.loss_weights) or _WEIGHTS[config.objective][1],
        "summed": config.objective == "v1",
        "teacher": config.teacher,
        "teacher_temperature": config.teacher_temperature,
    }


def measured_functions(config: Config) -> tuple[Function, ...]:
    """Those of the five functions whose every part is trained: what a run is measured by."""
    parts: dict[str, set[str]] = {"dense+sparse": {"dense", "sparse"}, "all": {*PARTS}}
    return tuple(function for function in FUNCTIONS if parts.get(function, {function}) <= {*config.functions})
