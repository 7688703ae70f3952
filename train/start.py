"""What a run starts from, checked: its settings, the sets that measure it, the model, its rows and their batches.

Not here: how rows are kept and drawn (data/), and the run itself (loop.py).
"""

import hashlib
import importlib.metadata
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from m3jax import checkpoint, paths, sources, weights
from m3jax.config import M3Config
from m3jax.model import M3, init, shapes
from m3jax.retrieval import FUNCTIONS
from m3jax.tokenization import Tokenizer
from train import Config
from train.console import say
from train.data import cldr
from train.data.builders import RowSource, prepare
from train.data.pipeline import Batches, LengthGroup
from train.results import METRICS
from train.tasks import Task, read_task, read_tasks

_DEMO = "cldr"


def check(config: Config) -> None:
    """ValueError that lists every setting that no run can have; what depends on data and devices is checked with them."""
    rules = (
        ("at least 1", lambda x: x >= 1, "steps log_every evaluate_every save_every keep_checkpoints group_size"),
        ("above 0", lambda x: 0 < x < math.inf, "learning_rate clip temperature adam_eps"),
        ("from 0 up", lambda x: 0 <= x < math.inf, "weight_decay seed"),
        ("from 0 to 1", lambda x: 0 <= x <= 1, "warmup"),
        ("from 0 to below 1", lambda x: 0 <= x < 1, "dropout adam_b1 adam_b2"),
        ("a step, or -1 for never", lambda x: x >= -1, "distill_start"),
        ("three numbers from 0 up", _three_from_0, "hybrid_weights loss_weights"),
    )
    wrong = [
        f"{key} = {config[key]}, expected {rule}"
        for rule, holds, keys in rules
        for key in keys.split()
        if not holds(config[key])
    ]
    measures = [f"dev/{function}/{metric}" for function in FUNCTIONS for metric in METRICS]
    if config.keep_best not in ("", *measures):
        wrong.append(f"keep_best = {config.keep_best!r}, expected '' or one of {', '.join(measures)}")
    if paths.is_url(config.checkpoints) and not config.checkpoints.startswith("gs://"):
        wrong.append(
            f"checkpoints = {config.checkpoints!r}, expected a local folder or gs://…, the one store that Orbax writes to "
            "itself: mount another one as a folder"
        )
    if config.dtype not in ("float32", "bfloat16"):
        wrong.append(f"dtype = {config.dtype!r}, expected 'float32' or 'bfloat16'")
    if jax.process_count() > 1:
        wrong.append(f"{jax.process_count()} processes: this version trains with one, over all of its devices")
    if wrong:
        raise ValueError("settings that no run can have: " + "; ".join(wrong))


def _three_from_0(weights: Any) -> bool:
    return len(weights) == 3 and all(isinstance(x, int | float) and 0 <= x < math.inf for x in weights)


def listed(paths: str) -> list[str]:
    return [path.strip() for path in paths.split(",") if path.strip()]


def path_of(config: Config, path: str) -> Path:
    """A path of the config; those under "cldr" lie in the embedded demo set, which is written on first use."""
    if path.split("/")[0] != _DEMO:
        return Path(path)
    # One folder for each version of what writes it, and each seed; a folder is there when it is complete.
    made_by = Path(cldr.__file__).read_bytes()
    made_by += "".join(importlib.metadata.version(name) for name in ("Babel", "tokenizers")).encode()
    folder = Path(config.data.folder) / f"{_DEMO}-{hashlib.blake2b(made_by, digest_size=4).hexdigest()}-{config.seed}"
    if not folder.exists():
        say("writing the embedded demo set …")
        partial = folder.with_name(folder.name + ".partial")
        cldr.write_demo(partial, seed=config.seed)
        partial.rename(folder)
    return folder / (path.removeprefix(_DEMO).removeprefix("/") or "train.jsonl")


def read_sets(config: Config) -> tuple[Task | None, list[Task]]:
    dev = read_task(path_of(config, config.data.dev)) if config.data.dev else None
    return dev, read_tasks([path_of(config, path) for path in listed(config.data.test)])


def start_model(config: Config, *, values: bool = True) -> M3:
    """The model to train, its parameters float32: that of `init_from`, or random weights of the config's sizes.

    values: False gives the parameters as jax.ShapeDtypeStruct, and reads or draws none.
    """
    if not config.data.train:
        raise ValueError('data.train names the training rows, JSONL files or folders, or "cldr"; got ""')
    if config.init_from:
        if config.tokenizer:
            raise ValueError(f"init_from brings its tokenizer; got tokenizer={config.tokenizer!r} too, leave it out")
        m3 = _read(config) if values else _described(config)
    else:
        named = config.tokenizer
        if not named and _DEMO in listed(config.data.train):
            named = str(path_of(config, f"{_DEMO}/tokenizer.json"))
        if not named:
            raise ValueError(
                "random weights need a tokenizer: give --config.tokenizer=tokenizer.json, or --config.init_from"
            )
        if not Path(named).is_file():
            raise ValueError(f"tokenizer names a tokenizer.json, got {named!r}, which is no file")
        tokenizer = Tokenizer.from_file(named)
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in ("cls", "pad", "eos", "unk")}
        sizes = {"colbert_dim": config.model.hidden_size} | config.model.to_dict()
        model = M3Config(vocab_size=tokenizer.vocab_size, **sizes, **ids)
        m3 = M3(model, init(model, jax.random.key(config.seed)) if values else shapes(model), tokenizer)
    for key in ("query_max_length", "passage_max_length"):
        if config[key] > m3.config.max_length:
            raise ValueError(f"{key} must fit the position table, at most {m3.config.max_length}, got {config[key]}")
    return m3


def _read(config: Config) -> M3:
    # In host memory: `m3jax.load` would give each device a copy, beside the one that the mesh splits.
    model, params, tokenizer = sources.read(config.init_from, heads=config.heads)
    return M3(model, jax.tree.map(lambda x: np.asarray(x, np.float32), params), tokenizer)


def _described(config: Config) -> M3:
    with sources.local(config.init_from) as directory:
        if checkpoint.is_checkpoint(directory):
            model, tokenizer = checkpoint.describe(directory)
        else:  # mapped, not read
            model, _, tokenizer = weights.read(directory, heads=config.heads)
    return M3(model, shapes(model), tokenizer)


def read_rows(config: Config, tokenizer: Tokenizer) -> RowSource:
    """The training rows, tokenised when these files, lengths and tokenizer come for the first time."""
    return prepare(
        [path_of(config, path) for path in listed(config.data.train)],
        tokenizer,
        data_dir=config.data.folder,
        query_max_length=config.query_max_length,
        passage_max_length=config.passage_max_length,
    )


def start_batches(config: Config, source: RowSource, mesh: Mesh, *, pad_id: int) -> Batches:
    """The batches of the run by step."""
    return Batches(
        source,
        seed=config.seed,
        groups=length_groups(config, mesh.shape["data"] * mesh.shape["fsdp"]),
        group_size=config.group_size,
        pad_id=pad_id,
    )


def length_groups(config: Config, rows: int) -> list[LengthGroup]:
    """The config's length groups; ValueError where a batch does not divide by the devices that share its rows."""
    for group in config.length_groups:
        if not (isinstance(group, tuple | list) and len(group) == 2 and all(isinstance(x, int) for x in group)):
            raise ValueError(
                "length_groups holds pairs (longest text in tokens, queries in a batch), like ((128, 96), (512, 24)); "
                f"got {config.length_groups}"
            )
        length, batch = group
        if batch % rows:
            near = batch // rows * rows
            raise ValueError(
                f"the batch of a length group must divide by the {rows} devices of the axes data × fsdp: up to {length} "
                f"tokens it is {batch}; the nearest sizes are {f'{near} and ' if near else ''}{near + rows}"
            )
    return [LengthGroup(*group) for group in config.length_groups]
