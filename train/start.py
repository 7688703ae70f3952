"""What a run starts from, checked: its settings, the sets that measure it, the model, its rows and their batches.

Not here: how rows are kept and drawn (data/), and the run itself (contrastive.py).
"""

import functools
import hashlib
import importlib.metadata
import math
import operator
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import numpy as np
from jax.sharding import Mesh

from m3jax import checkpoint, paths, sources, weights
from m3jax.config import M3Config
from m3jax.losses import PARTS
from m3jax.model import M3, init, shapes
from m3jax.retrieval import FUNCTIONS
from m3jax.sharding import make_mesh
from m3jax.tokenization import Tokenizer
from m3jax.xlm_roberta import Remat
from train import Config
from train.checkpoints import settings_of
from train.console import describe, say
from train.data import cldr, tfds_sets
from train.data.builders import RowSource, prepare
from train.data.held_out import hold_out
from train.data.pipeline import Batches
from train.data.streams import LengthGroup, weights_of
from train.files import written_once
from train.objective import OBJECTIVES, TEACHERS, measured_functions
from train.processes import first_then_others, rows_held
from train.results import METRICS
from train.tasks import Task, read_task, read_tasks

# Longest text in tokens → queries a device with hard negatives (in groups of 8) and without; PAPER §4, the reference's sizes.
PAPER_GROUPS = {
    500: (48, 700), 1000: (32, 570), 2000: (20, 388), 3000: (18, 288), 4000: (14, 224),
    5000: (14, 180), 6000: (12, 157), 7000: (10, 128), 8192: (8, 104),
}  # fmt: skip
_DEMO = "cldr"
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
        ("from 0 up", lambda x: 0 <= x < math.inf, "weight_decay seed sub_batch_tokens steps epochs"),
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
        f"learning_rate_scale.{name} = {scale}, but the {name} head is not trained; expected 1.0"
        for name, scale in config.learning_rate_scale.items()
        if name != "encoder" and scale != 1 and (name not in config.functions or name in config.frozen)
    ]
    if config.teacher_temperature != 1 and not config.teacher:
        wrong.append(f"teacher_temperature = {config.teacher_temperature}, but no teacher is set; expected 1.0")
    if {"encoder", *({"sparse", "colbert"} & {*config.functions})} <= {*config.frozen}:
        wrong.append(f"frozen = {config.frozen}, which leaves nothing to train")
    if len(config.functions) == 1 and config.distill_start >= 0:
        wrong.append(
            f"distill_start = {config.distill_start} with {config.functions[0]} alone, which has no hybrid to learn from; "
            "expected -1"
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
    for key in ("loss_weights", "hybrid_weights")[: len(trained)]:  # one function has no hybrid
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
        _warn_of_distill_start(config)


def _warn_of_distill_start(config: Config) -> None:
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


def listed(paths: str) -> list[str]:
    return [path.strip() for path in paths.split(",") if path.strip()]


def path_of(config: Config, path: str) -> Path:
    """A path of the config; those under "cldr" lie in the embedded demo set, which is written on first use, and rows of
    "tfds:NAME" are written as a file."""
    if path.startswith(tfds_sets.PREFIX):
        return tfds_sets.rows_file(path, Path(config.data.folder))
    if path.split("/")[0] != _DEMO:
        return Path(path)
    # One folder for each version of what writes it, and each seed; a folder is there when it is complete.
    made_by = Path(cldr.__file__).read_bytes()
    made_by += "".join(importlib.metadata.version(name) for name in ("Babel", "tokenizers")).encode()
    folder = Path(config.data.folder) / f"{_DEMO}-{hashlib.blake2b(made_by, digest_size=4).hexdigest()}-{config.seed}"
    if not folder.exists():
        say("writing the embedded demo set …")
        with written_once(folder) as partial:
            cldr.write_demo(partial, seed=config.seed)
    rows = "texts.jsonl" if config.stage == "retromae" else "train.jsonl"
    return folder / (path.removeprefix(_DEMO).removeprefix("/") or rows)


class DataPaths(NamedTuple):
    """What a run reads: datasets of training rows, and the folders that measure it."""

    train: list[Path]
    dev: Path | None
    tests: list[Path]


def data_paths(config: Config) -> DataPaths:
    """The paths of config.data; rows that are held out of the training rows are the first test, and dev where none is given.

    What is not there yet is written. Called once a run: it reads the training files, which may be others later.
    """
    if not config.data.train:
        raise ValueError('data.train names the training rows, JSONL files or folders, tfds:NAME, or "cldr"; got ""')
    train, tests = (
        [path_of(config, path) for path in listed(paths)] for paths in (config.data.train, config.data.test)
    )
    dev = path_of(config, config.data.dev) if config.data.dev else None
    if config.data.held_out:
        train, held_out = hold_out(train, config.data.folder, share=config.data.held_out, seed=config.seed)
        return DataPaths(train, dev or held_out, [held_out, *tests])
    return DataPaths(train, dev, tests)


def read_sets(found: DataPaths) -> tuple[Task | None, list[Task]]:
    """What measures the model during training and after it."""
    return found.dev and read_task(found.dev), read_tasks(found.tests)


def start_model(config: Config, *, values: bool = True) -> M3:
    """The model to train, its parameters float32: that of `init_from`, or random weights of the config's sizes.

    values: False gives the parameters as jax.ShapeDtypeStruct, and reads or draws none.
    """
    if config.init_from:
        if config.tokenizer:
            raise ValueError(f"init_from brings its tokenizer; got tokenizer={config.tokenizer!r} too, leave it out")
        m3 = _read(config) if values else _described(config)
        if config.model.colbert_dim not in (0, m3.config.colbert_dim):
            raise ValueError(
                f"model.colbert_dim is the width of a new colbert head, but that of {config.init_from} has "
                f"{m3.config.colbert_dim}, got {config.model.colbert_dim}; leave it out, or shorten it with "
                "matryoshka.colbert"
            )
    else:
        model, tokenizer = new_model(config)
        m3 = M3(model, init(model, jax.random.key(config.seed)) if values else shapes(model), tokenizer)
    for key in ("query_max_length", "passage_max_length"):
        if config[key] > m3.config.max_length:
            raise ValueError(f"{key} must fit the position table, at most {m3.config.max_length}, got {config[key]}")
    for function, most in (("dense", m3.config.hidden_size), ("colbert", m3.config.colbert_dim)):
        widths = config.matryoshka[function]
        if not all(isinstance(width, int) and 1 <= width < most for width in widths) or len({*widths}) < len(widths):
            raise ValueError(
                f"matryoshka.{function} holds widths from 1 to below the full one, {most}, each once; got {widths}"
            )
    return m3


def new_model(config: Config) -> tuple[M3Config, Tokenizer]:
    """The sizes of random weights, and their tokenizer: the demo set's where it is trained on; ValueError without one."""
    named = config.tokenizer
    if not named and any(path.split("/")[0] == _DEMO for path in listed(config.data.train)):
        named = str(path_of(config, f"{_DEMO}/tokenizer.json"))
    if not named:
        raise ValueError(
            "random weights need a tokenizer: give --config.tokenizer=tokenizer.json, or --config.init_from"
        )
    if not Path(named).is_file():
        raise ValueError(f"tokenizer names a tokenizer.json, got {named!r}, which is no file")
    tokenizer = Tokenizer.from_file(named)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in ("cls", "pad", "eos", "unk")}
    sizes = config.model.to_dict()
    sizes["colbert_dim"] = sizes["colbert_dim"] or sizes["hidden_size"]
    return M3Config(vocab_size=tokenizer.vocab_size, **sizes, **ids), tokenizer


def _read(config: Config) -> M3:
    # In host memory: `m3jax.load` would give each device a copy, beside the one that the mesh splits.
    model, params, tokenizer = sources.read(
        config.init_from, heads=config.heads, colbert_dim=config.model.colbert_dim or None, seed=config.seed
    )
    return M3(model, jax.tree.map(lambda x: np.asarray(x, np.float32), params), tokenizer)


def _described(config: Config) -> M3:
    with sources.local(config.init_from) as directory:
        if checkpoint.is_checkpoint(directory):
            model, tokenizer = checkpoint.describe(directory)
        else:  # mapped, not read
            model, _, tokenizer = weights.read(
                directory, heads=config.heads, colbert_dim=config.model.colbert_dim or None
            )
    return M3(model, shapes(model), tokenizer)


class Started(NamedTuple):
    """What `start_data` gives: the config with the length groups and the steps that hold, and what is trained on."""

    config: Config
    mesh: Mesh
    source: RowSource
    batches: Batches


def start_data(config: Config, datasets: Sequence[Path], m3: M3) -> Started:
    """The rows of `datasets` in batches for all devices here, which the user is told of."""
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    # Refused before the rows are tokenised.
    config = with_length_groups(config, rows_held(mesh)[1])
    weights_of(len(datasets), config.data.same_dataset, config.data.weights)
    source = read_rows(config, datasets, m3.tokenizer)
    batches = start_batches(config, source, mesh, m3.config)
    config = with_steps(config, batches)
    say(describe(config, m3, len(source), mesh.size))
    return Started(config, mesh, source, batches)


def read_rows(config: Config, datasets: Sequence[Path], tokenizer: Tokenizer) -> RowSource:
    """The rows to train on, prepared by process 0; ValueError where a teacher is asked for and no row has its scores."""
    source = first_then_others(
        lambda: prepare(
            datasets,
            tokenizer,
            data_dir=config.data.folder,
            query_max_length=config.query_max_length,
            passage_max_length=config.passage_max_length,
        ),
        "tokenise the training rows",
    )
    scored, rows = source.counts["rows_with_scores"], len(source)
    if config.teacher and not scored:
        raise ValueError(
            f"teacher = {config.teacher!r} needs rows with pos_scores and neg_scores, and none of the {rows} rows of "
            f"{config.data.train} has them. Give rows with scores, or leave --config.teacher out"
        )
    if config.teacher and scored < rows:
        warnings.warn(
            f"{rows - scored} of {rows} rows have no pos_scores and neg_scores: they are trained without the teacher.",
            stacklevel=2,
        )
    if scored and not config.teacher:
        warnings.warn(
            f"{scored} of {rows} rows carry pos_scores or neg_scores, which are not used: --config.teacher says how to.",
            stacklevel=2,
        )
    return source


def start_batches(config: Config, source: RowSource, mesh: Mesh, model: M3Config) -> Batches:
    """The batches of the run by step, of the config's length groups: of each the rows that this process holds."""
    held, row_groups = rows_held(mesh)
    return Batches(
        source,
        seed=config.seed,
        groups=[LengthGroup(*group) for group in config.length_groups],
        group_size=config.group_size,
        pad_id=model.pad_token_id,
        same_dataset=config.data.same_dataset,
        weights=config.data.weights,
        shuffle_segments=config.shuffle_segments,
        step=length_step(mesh, model),
        held=held,
        parts=row_groups,
    )


def with_steps(config: Config, batches: Batches) -> Config:
    """`config` with the steps of the run: its own, or those of its rounds of all rows, a multiple of `accumulate`."""
    if config.steps:
        return config
    config = config.copy_and_resolve_references()
    rounds = config.epochs * sum(stream.batches_a_round for stream in batches.streams)
    config.steps = max(1, round(rounds / config.accumulate)) * config.accumulate
    _warn_of_distill_start(config)
    return config


def length_step(mesh: Mesh, model: M3Config) -> int:
    """What lengths of rows are multiples of: attention on TPU has a kernel for rows of 128 tokens and their multiples alone."""
    return 128 if mesh.devices.flat[0].platform == "tpu" and model.max_length % 128 == 0 else 1


def checkpoints_of(config: Config) -> str:
    """Where the checkpoints of the run are."""
    return config.checkpoints or str(Path(config.output) / "checkpoints")


def with_length_groups(config: Config, rows: int) -> Config:
    """`config` with the length groups of the run: its own; else, where it goes on, those it began with; else the paper's.

    rows: the devices that share the rows of a batch. ValueError that lists each group whose batch does not divide by them.
    """
    groups = config.length_groups or settings_of(checkpoints_of(config)).get("length_groups")
    if not groups:
        pairs = config.group_size == 1
        groups = [(length, rows * a_device[pairs]) for length, a_device in PAPER_GROUPS.items()]
    for group in groups:
        if not (
            isinstance(group, tuple | list)
            and len(group) == 2
            and all(isinstance(x, int) and x >= least for x, least in zip(group, (2, 1), strict=True))
        ):
            raise ValueError(
                "length_groups holds pairs (longest text in tokens, from 2 up; queries in a batch, from 1 up), like "
                f"((128, 96), (512, 24)); got {config.length_groups}"
            )
    wrong = []
    for length, batch in groups:
        near = batch // rows * rows
        if near != batch:
            wrong.append(
                f"up to {length} tokens it is {batch}; the nearest sizes are {f'{near} and ' if near else ''}{near + rows}"
            )
    if wrong:
        raise ValueError(
            f"the batch of a length group must divide by the {rows} devices of the axes data × fsdp: "
            + "; ".join(wrong)
        )
    config = config.copy_and_resolve_references()
    config.length_groups = tuple(tuple(group) for group in groups)
    return config
