"""Orbax checkpoints of a model: parameters, config and tokenizer of one step, for load, training and conversion.

Not here: optimiser state and steps (train/checkpoints.py), and released directories (weights.py). Orbax is imported
inside the functions: encoding from released weights does not need it.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from m3jax.config import M3Config
from m3jax.model import M3, Params, check_tree, flatten, shapes, unflatten
from m3jax.tokenization import Tokenizer

MODEL, PARAMS = "m3", "params"  # the two items of a step that make a model


def is_checkpoint(directory: str | Path) -> bool:
    """Whether a directory is an Orbax step of ours, or the folder of such steps."""
    return _step(Path(directory)) is not None


def arguments(config: M3Config, params: Params, tokenizer: Tokenizer) -> dict[str, Any]:
    """The items of a model for `orbax.checkpoint.args.Composite`."""
    import orbax.checkpoint as ocp

    described = {"config": dataclasses.asdict(config), "tokenizer": tokenizer.json}
    return {PARAMS: ocp.args.StandardSave(_string_keys(params)), MODEL: ocp.args.JsonSave(described)}


def write(m3: M3, directory: str | Path) -> None:
    """Write a model as one Orbax step; Orbax moves it into place when it is complete. An existing one is refused."""
    import orbax.checkpoint as ocp

    directory = Path(directory).absolute()
    if directory.exists():
        raise ValueError(f"{directory} must be new, but exists; choose another name or remove it")
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(directory, ocp.args.Composite(**arguments(m3.config, m3.params, m3.tokenizer)))


def describe(directory: str | Path) -> tuple[M3Config, Tokenizer]:
    """Config and tokenizer of a step, or of the last step in a folder of steps; ValueError where it is none of ours."""
    step = _step(Path(directory).absolute())
    if step is None:
        raise ValueError(
            f"{directory} must be an Orbax checkpoint of m3jax: a step with the items {PARAMS} and {MODEL}"
        )
    path = step / MODEL / "metadata"
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        return M3Config(**described["config"]), Tokenizer.from_json(described["tokenizer"])
    except (json.JSONDecodeError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{path}: expected config and tokenizer of a model, {error}; take another step") from error


def read(directory: str | Path, *, sharding: Any = None) -> tuple[M3Config, Params, Tokenizer]:
    """Config, parameters and tokenizer of a step, or of the last step in a folder of steps, in the dtype stored.

    sharding: a function from the tree of shapes to a tree of shardings; None puts everything on the first device.
    Raises ValueError that lists every parameter missing, left over or misshapen.
    """
    import orbax.checkpoint as ocp

    config, tokenizer = describe(directory)
    step = _step(Path(directory).absolute())
    assert step is not None
    handlers = {PARAMS: ocp.StandardCheckpointHandler(), MODEL: ocp.JsonCheckpointHandler()}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as checkpointer:
        stored = flatten(checkpointer.metadata(step).item_metadata[PARAMS].tree)
        expected = shapes(config)
        check_tree(
            {path: x.shape for path, x in stored.items()},
            {path: x.shape for path, x in flatten(expected).items()},
            source=step,
        )
        if sharding is None:
            one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            places = jax.tree.map(lambda _: one, expected)
        else:
            places = sharding(expected)
        # Orbax casts to the target's dtype without a word, so the target takes the stored one.
        target = {
            path: jax.ShapeDtypeStruct(x.shape, np.dtype(stored[path].dtype), sharding=place)
            for (path, x), place in zip(flatten(expected).items(), jax.tree.leaves(places), strict=True)
        }
        wanted = {PARAMS: ocp.args.StandardRestore(_string_keys(unflatten(target)))}
        params = checkpointer.restore(step, args=ocp.args.Composite(**wanted))[PARAMS]
    return config, unflatten(flatten(params)), tokenizer


def parts(directory: str | Path) -> dict[str, tuple[jax.ShapeDtypeStruct, Callable[[], np.ndarray]]]:
    """Each parameter's shape and dtype by its path, and a function that reads it alone (a few hundredths of a second each).

    Of a step, or of the last step in a folder of steps, in whatever geometry; ValueError where it is no checkpoint of ours.
    """
    import orbax.checkpoint as ocp

    describe(directory)
    step = _step(Path(directory).absolute())
    assert step is not None
    handlers: Any = {PARAMS: ocp.PyTreeCheckpointHandler(), MODEL: ocp.JsonCheckpointHandler()}
    checkpointer = ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers))
    place = ocp.ArrayRestoreArgs(sharding=jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))

    def read_one(path: str, one: jax.ShapeDtypeStruct) -> np.ndarray:
        item, args = (_string_keys(unflatten({path: x})) for x in (one, place))
        wanted = {PARAMS: ocp.args.PyTreeRestore(item=item, restore_args=args, partial_restore=True)}
        restored = checkpointer.restore(step, args=ocp.args.Composite(**wanted))[PARAMS]
        return np.asarray(flatten(restored)[path])

    metadata: Any = checkpointer.metadata(step).item_metadata
    stored = flatten(metadata[PARAMS].tree)
    sizes = {path: jax.ShapeDtypeStruct(x.shape, np.dtype(x.dtype)) for path, x in stored.items()}
    return {path: (one, functools.partial(read_one, path, one)) for path, one in sizes.items()}


def _string_keys(params: Params) -> dict[str, Any]:
    """The tree with layer numbers as strings, the only keys that Orbax gives back as they were."""
    return {str(k): _string_keys(v) if isinstance(v, dict) else v for k, v in params.items()}


def _step(directory: Path) -> Path | None:
    if (directory / PARAMS).is_dir() and (directory / MODEL).is_dir():
        return directory
    if not directory.is_dir():
        return None
    steps = [p for p in directory.iterdir() if p.name.isdecimal() and (p / PARAMS).is_dir() and (p / MODEL).is_dir()]
    return max(steps, key=lambda p: int(p.name), default=None)
