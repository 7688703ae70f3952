"""The settings of a run that hold whatever its data and devices are: each rule, and what it says of a setting that breaks it.

Not here: what depends on the rows, the model or the mesh, which is checked where they are made (start.py, data/).
"""

import functools
import math
import operator
import warnings
from collections.abc import Sequence
from typing import Any, get_args

from m3jax import paths
from m3jax.losses import PARTS
from m3jax.retrieval import FUNCTIONS
from m3jax.xlm_roberta import Remat
from train import Config
from train.objective import OBJECTIVES, TEACHERS, measured_functions
from train.results import METRICS

_FREEZABLE = ("encoder", "positions", "sparse", "colbert")


def check(config: Config) -> None:
    """ValueError that lists every setting that no run can have; what depends on data and devices is checked with them."""
    rules = (
        (
            "at least 1",
            lambda x: x >= 1,
            "log_every evaluate_every save_every keep_checkpoints group_size accumulate",
        ),
        ("above 0", lambda x: 0 < x < math.inf, "learning_rate clip temperature teacher_temperature adam_eps"),
        ("from 0 up", lambda x: 0 <= x < math.inf, "weight_decay sub_batch_tokens steps epochs"),
        ("from 0 to below 2**32", lambda x: 0 <= x < 2**32, "seed"),  # jax.random.key drops what is above
        ("from 0 to 1", lambda x: 0 <= x <= 1, "warmup shuffle_segments"),
        ("from 0 to below 1", lambda x: 0 <= x < 1, "dropout adam_b1 adam_b2 data.held_out"),
        ("a step, or -1 for never", lambda x: x >= -1, "distill_start"),
        ("three numbers from 0 up, or ()", _three_from_0_or_none, "hybrid_weights loss_weights"),
        (f"some of {PARTS}", lambda x: x and _some_of(PARTS, x), "functions"),
        (f"some of {_FREEZABLE}", lambda x: _some_of(_FREEZABLE, x), "frozen"),
        *(
            (f"one of {choices}", lambda x, choices=choices: x in choices, key)
            for key, choices in (
                ("objective", OBJECTIVES),
                ("teacher", TEACHERS),
                ("remat", get_args(Remat)),
                ("dtype", ("float32", "bfloat16")),
                ("heads", ("require", "init")),
            )
        ),
    )
    wrong = [
        f"{key} = {value!r}, expected {rule}"
        for rule, holds, keys in rules
        for key in keys.split()
        if not holds(value := functools.reduce(operator.getitem, key.split("."), config))
    ]
    if (config.steps > 0) == (config.epochs > 0):
        wrong.append(
            f"steps = {config.steps} and epochs = {config.epochs}, of which one is to be above 0 and the other 0"
        )
    wrong += [
        f"learning_rate_scale.{name} = {scale}, expected above 0 (frozen = ({name!r},) for none)"
        for name, scale in config.learning_rate_scale.items()
        if not 0 < scale < math.inf
    ]
    wrong += [
        f"learning_rate_scale.{name} = {scale}, but {name} is not trained; expected 1.0"
        for name, scale in config.learning_rate_scale.items()
        if scale != 1 and (name in config.frozen or name not in ("encoder", *config.functions))
    ]
    if config.teacher_temperature != 1 and not config.teacher:
        wrong.append(f"teacher_temperature = {config.teacher_temperature}, but no teacher is set; expected 1.0")
    if config.teacher and config.group_size == 1:
        wrong.append(
            f"teacher = {config.teacher!r} with group_size = 1, but a teacher tells a row's passages apart; expected "
            "group_size of 2 or more, or teacher = ''"
        )
    if {"encoder", *({"sparse", "colbert"} & {*config.functions})} <= {*config.frozen}:
        wrong.append(f"frozen = {config.frozen}, which leaves nothing to train")
    if len(config.functions) == 1 and config.distill_start >= 0:
        wrong.append(
            f"distill_start = {config.distill_start} with {config.functions[0]} alone, which has no hybrid to learn from; "
            "expected -1"
        )
    if len(config.functions) == 1 and tuple(config.hybrid_weights):
        wrong.append(
            f"hybrid_weights = {config.hybrid_weights} with {config.functions[0]} alone, which has no hybrid; expected ()"
        )
    wrong += [
        f"matryoshka.{function} = {widths}, but {function} is not among functions"
        for function, widths in config.matryoshka.items()
        if widths and function not in config.functions
    ]
    if config.steps % max(1, config.accumulate):
        wrong.append(f"steps = {config.steps}, expected a multiple of accumulate = {config.accumulate}")
    functions = measured_functions(config) if config.data.dev or config.data.held_out else FUNCTIONS
    measures = [f"dev/{function}/{metric}" for function in functions for metric in METRICS]
    if config.keep_best not in ("", *measures):
        wrong.append(f"keep_best = {config.keep_best!r}, expected '' or one of {', '.join(measures)}")
    if paths.is_url(config.checkpoints) and not config.checkpoints.startswith("gs://"):
        wrong.append(
            f"checkpoints = {config.checkpoints!r}, expected a local folder or gs://…, the one store where Orbax marks "
            "a checkpoint as whole; it renames in others, s3:// too, which is no single act there: write to a disk, and copy"
        )
    wrong += [
        f"{key} = {value!r}, expected a local folder (checkpoints may lie in gs://…)"
        for key, value in (("output", config.output), ("data.folder", config.data.folder))
        if paths.is_url(value)
    ]
    trained = [PARTS.index(function) for function in config.functions if function in PARTS]
    for key in ("loss_weights", "hybrid_weights"):
        if _three_from_0_or_none(config[key]) and config[key] and not any(config[key][place] for place in trained):
            wrong.append(f"{key} = {config[key]}, which is 0 for all of functions = {config.functions}")
    if config.stage != "retromae":
        wrong += [
            f"{key} = {config[key]}, which is of stage 1 alone; expected {nothing}"
            for key, nothing in (("encoder_mask", 0.3), ("decoder_seen", 0.5))
            if config[key] != nothing
        ]
    if wrong:
        raise ValueError("settings that no run can have: " + "; ".join(wrong))
    if config.steps:
        warn_of_distill_start(config)


def warn_of_distill_start(config: Config) -> None:
    if config.distill_start >= config.steps:
        warnings.warn(
            f"distill_start = {config.distill_start} is not reached in {config.steps} steps: this run is without "
            "self-distillation. Lower it, or say so with --config.distill_start=-1.",
            stacklevel=3,
        )


def _some_of(names: Sequence[str], given: Sequence[str]) -> bool:
    return not isinstance(given, str) and {*given} <= {*names} and len({*given}) == len(given)


def _three_from_0_or_none(weights: Any) -> bool:
    return len(weights) in (0, 3) and all(isinstance(x, int | float) and 0 <= x < math.inf for x in weights)
