"""What a run starts from, checked: the sets that measure it, the model, its rows and their batches.

Not here: settings that depend on none of these (settings.py), how rows are kept and drawn (data/), and the run itself
(contrastive.py).
"""

import hashlib
import importlib.metadata
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from m3jax import checkpoint, sources, weights
from m3jax.config import M3Config
from m3jax.model import M3, init, shapes
from m3jax.sharding import make_mesh
from m3jax.tokenization import Tokenizer
from train import Config
from train.checkpoints import settings_of
from train.console import describe, say
from train.data import cldr, tfds_sets
from train.data.builders import RowSource, prepare
from train.data.held_out import hold_out
from train.data.pipeline import Batches
from train.data.streams import LengthGroup, weights_of
from train.files import written_once
from train.processes import first_then_others, rows_held
from train.settings import warn_of_distill_start
from train.tasks import Task, read_task, read_tasks

# Longest text in tokens → queries a device with hard negatives (in groups of 8) and without; PAPER §4, the reference's sizes.
PAPER_GROUPS = {
    500: (48, 700), 1000: (32, 570), 2000: (20, 388), 3000: (18, 288), 4000: (14, 224),
    5000: (14, 180), 6000: (12, 157), 7000: (10, 128), 8192: (8, 104),
}  # fmt: skip
_DEMO = "cldr"


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
        ours, theirs = M3Config(), m3.config  # the sizes that configs/base.py has are those of M3Config
        if wrong := {
            name: size
            for name, size in config.model.items()
            if name != "colbert_dim" and size not in (getattr(ours, name), getattr(theirs, name))
        }:
            has = ", ".join(f"{name} = {getattr(theirs, name)}" for name in wrong)
            raise ValueError(
                f"config.model sizes random weights, but {config.init_from} has {has}, got {wrong}; leave it out"
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
    warn_of_distill_start(config)
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
