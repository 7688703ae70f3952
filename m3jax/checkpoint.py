"""Orbax checkpoints of a model: parameters, config and tokenizer of one step, for load, training and conversion.

Not here: optimiser state and steps (train/checkpoints.py), and released directories (weights.py). Orbax is imported
inside the functions: encoding from released weights does not need it.
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from m3jax import layout, paths
from m3jax.config import M3Config
from m3jax.model import M3, Params, check_tree, flatten, shapes, unflatten
from m3jax.tokenization import Tokenizer

MODEL, PARAMS = "m3", "params"  # the two items of a step that make a model
LM_HEAD = "lm_head"  # and what a conversion keeps beside them of a masked-language model, for stage 1
_MARKER = f"{MODEL}/metadata"  # where there is this file, the step is whole
_ITEMS = (f"{MODEL}/", f"{PARAMS}/", f"{LM_HEAD}/")
_WRITTEN = (*_ITEMS, "_CHECKPOINT_METADATA", "commit_success.txt")  # what a step's files begin with
# A hundred files of 16 MiB take half as long as ten of 200: the system writes small pieces faster, and several at a time.
_CHUNK_BYTES = _FILE_BYTES = 16 * 2**20


def is_checkpoint(directory: str | Path) -> bool:
    """Whether a directory is an Orbax step of ours, or the folder of such steps."""
    return _step(Path(directory)) is not None


def needed(files: Sequence[str]) -> list[str]:
    """Of the relative names of a folder's files those of the last step's model; [] where the folder is no checkpoint.

    >>> needed(["8/m3/metadata", "8/optimizer/a", "8/params/b", "16/m3/metadata", "16/params/b"])
    ['16/m3/metadata', '16/params/b']
    """
    steps = {name.removesuffix(_MARKER) for name in files if f"/{name}".endswith(f"/{_MARKER}")}
    steps = {step for step in steps if step.rstrip("/").isdecimal() or not step}
    last = max(steps, key=lambda step: int(step.rstrip("/") or 0), default=None)
    if last is None:
        return []
    return [name for name in files if name.startswith(tuple(last + item for item in _ITEMS))]


def arguments(config: M3Config, params: Params, tokenizer: Tokenizer) -> dict[str, Any]:
    """The items of a model for `orbax.checkpoint.args.Composite`."""
    import orbax.checkpoint as ocp

    return {
        PARAMS: ocp.args.StandardSave(_string_keys(params)),
        MODEL: ocp.args.JsonSave(_description(config, tokenizer)),
    }


def write(
    m3: M3, directory: str | Path, *, lm_head: Params | None = None, replace: bool = False, progress: bool = False
) -> None:
    """Write a model as one Orbax step, in parameters' own dtype. The directory (or URL) appears when it is complete.

    lm_head: of a masked-language model (weights.read_lm_head), kept beside the model for who trains it further.
    ValueError where it exists, unless `replace` and it holds nothing but what an earlier write left there: a run's folder of
    steps, with its optimiser, is not that. progress shows a bar on stderr.
    """
    import orbax.checkpoint as ocp

    foreign = [name for name in paths.files(directory) if not name.startswith(_WRITTEN)]
    if foreign or (paths.exists(directory) and not replace):
        came = f"there is {', '.join(foreign[:5])}" if replace else "it exists"
        raise ValueError(
            f"{directory} must be new{' or hold what an earlier conversion wrote' * replace}, but {came}; choose another "
            "name, or move that elsewhere"
        )
    # tensorstore takes ten times as long over transposed views as over rows, which it writes without a copy
    params = _string_keys(layout.row_major(jax.tree.map(np.asarray, m3.params)))
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    # Without compression, which gains 7% on weights and takes most of the time; in chunks that a mesh can read in parts;
    # and without the copy of all arrays that Orbax makes for callers who go on changing them.
    failed: list[Exception] = []
    arrays = _writing_all(failed)
    handler = ocp.PyTreeCheckpointHandler(
        use_compression=False,
        save_concurrent_gb=1,
        type_handler_registry=ocp.type_handlers.create_type_handler_registry(
            (np.ndarray, arrays), (jax.Array, ocp.type_handlers.ArrayHandler())
        ),
    )
    chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), params)
    items = {
        PARAMS: ocp.args.PyTreeSave(params, save_args=chunks, ocdbt_target_data_file_size=_FILE_BYTES),
        MODEL: ocp.args.JsonSave(_description(m3.config, m3.tokenizer)),
    }
    handlers = {PARAMS: handler, MODEL: ocp.JsonCheckpointHandler()}
    if lm_head is not None:
        items[LM_HEAD] = ocp.args.PyTreeSave(layout.row_major(jax.tree.map(np.asarray, lm_head)))
        handlers[LM_HEAD] = ocp.PyTreeCheckpointHandler()

    def save() -> None:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as checkpointer:
            checkpointer.save(folder, ocp.args.Composite(**items), force=True)

    # Ctrl-C would leave Orbax's threads at work on a folder that is being removed, so it waits for this one.
    with (
        paths.writing(directory, last=_MARKER, size=size, progress=progress) as folder,
        ThreadPoolExecutor(1) as executor,
    ):
        try:
            executor.submit(save).result()
        finally:
            if failed:
                raise _of_system(failed[0]) from failed[0]


def _writing_all(failed: list[Exception]) -> Any:
    """Orbax's handler of NumPy arrays, which goes on where one cannot be written, and tells it in `failed`.

    Orbax would leave the others to themselves: they go on in a folder that is being removed, and each prints a traceback.
    """
    import orbax.checkpoint as ocp

    class WritingAll(ocp.type_handlers.NumpyHandler):
        async def _open_and_write(self, *given: Any) -> None:
            try:
                await super()._open_and_write(*given)
            except ValueError as error:
                failed.append(error)

    return WritingAll(deepcopy_host_arrays=False)


def _of_system(error: Exception) -> Exception:
    """An error of tensorstore as the OSError that it tells of, such as of a full disk."""
    number = re.search(r"os_error_code='(\d+)'", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else error


def place(directory: str | Path) -> Any:
    """A path as Orbax wants it: absolute, or of a store one of its own paths. Only in gs:// does it mark what is whole; in
    others it renames, which is no single act there (orbax-checkpoint 0.12.8, `atomicity_defaults`)."""
    if not paths.is_url(directory):
        return Path(directory).absolute()
    from etils import epath

    return epath.Path(directory)


def describe(directory: str | Path) -> tuple[M3Config, Tokenizer]:
    """Config and tokenizer of a step, or of the last step in a folder of steps; ValueError where it is none of ours."""
    step = _step(place(directory))
    if step is None:
        raise ValueError(
            f"{directory} must be an Orbax checkpoint of m3jax: a step with the items {PARAMS} and {MODEL}"
        )
    path = step / MODEL / "metadata"
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        return M3Config(**described["config"]), Tokenizer.from_json(described["tokenizer"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{path}: expected config and tokenizer of a model, {error}; take another step") from error


def read(
    directory: str | Path, *, sharding: Any = None, shapes: Callable[[M3Config], Params] = shapes
) -> tuple[M3Config, Params, Tokenizer]:
    """Config, parameters and tokenizer of a step, or of the last step in a folder of steps, in the dtype stored.

    shapes: the tree of the parameters, that of a model with its heads by default; in stage 1 it is another (retromae.py).
    sharding: a function from the tree of shapes to a tree of shardings; None gives NumPy arrays.
    Raises ValueError that lists every parameter missing, left over or misshapen.
    """
    import orbax.checkpoint as ocp
    from etils import epath  # Orbax's paths

    config, tokenizer = describe(directory)
    step = _step(place(directory))
    assert step is not None
    # Two gigabytes in flight are more than the largest table of any released model, and bound what a restore takes beside it:
    # for jax.Array. NumPy arrays Orbax reads all at once, with what is stored of each beside it, so they come in turn here.
    registry = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, _in_turn()), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=2, type_handler_registry=registry)
    folder = epath.Path(step / PARAMS)
    stored = stored_shapes(directory)
    expected = shapes(config)
    check_tree(
        {path: x.shape for path, x in stored.items()},
        {path: x.shape for path, x in flatten(expected).items()},
        source=step,
    )
    if sharding is None:
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), expected)
    else:
        # Orbax casts to the target's dtype without a word, so the target takes the stored one.
        places = flatten(sharding(expected))
        how = unflatten(
            {
                path: ocp.ArrayRestoreArgs(sharding=places[path], global_shape=x.shape, dtype=stored[path].dtype)
                for path, x in flatten(expected).items()
            }
        )
    params = handler.restore(folder, args=ocp.args.PyTreeRestore(restore_args=_string_keys(how)))
    return config, unflatten(flatten(params)), tokenizer


def read_lm_head(directory: str | Path) -> Params | None:
    """The language-model head beside the model of a step, or of the last step in a folder, as NumPy arrays; None without."""
    import orbax.checkpoint as ocp
    from etils import epath

    step = _step(place(directory))
    if step is None or not (step / LM_HEAD).is_dir():
        return None
    handler, folder = ocp.PyTreeCheckpointHandler(), epath.Path(step / LM_HEAD)
    how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(folder).tree)
    return handler.restore(folder, args=ocp.args.PyTreeRestore(restore_args=how))


def _in_turn() -> Any:
    """Orbax's handler of NumPy arrays, reading one after the other."""
    import orbax.checkpoint as ocp

    class InTurn(ocp.type_handlers.NumpyHandler):
        async def deserialize(self, infos: Any, args: Any = None) -> Any:
            read = super().deserialize
            args = args or [ocp.RestoreArgs()] * len(infos)
            return [x for info, arg in zip(infos, args, strict=True) for x in await read([info], [arg])]

    return InTurn()


def _description(config: M3Config, tokenizer: Tokenizer) -> dict[str, Any]:
    return {"config": dataclasses.asdict(config), "tokenizer": tokenizer.json}


def stored_shapes(directory: str | Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of each parameter of a step by its path, in whatever geometry, without reading a value."""
    import orbax.checkpoint as ocp
    from etils import epath

    step = _step(place(directory))
    assert step is not None, "callers ask is_checkpoint first"
    tree = ocp.PyTreeCheckpointHandler().metadata(epath.Path(step / PARAMS)).tree
    return {path: jax.ShapeDtypeStruct(x.shape, np.dtype(x.dtype)) for path, x in flatten(tree).items()}


def _string_keys(params: Params) -> dict[str, Any]:
    """The tree with layer numbers as strings, the only keys that Orbax gives back as they were."""
    return {str(k): _string_keys(v) if isinstance(v, dict) else v for k, v in params.items()}


def _step(directory: Any) -> Any:
    """The step of a place, itself or the last in it, None where there is none."""
    if (directory / PARAMS).is_dir() and (directory / MODEL).is_dir():
        return directory
    if not directory.is_dir():
        return None
    steps = [p for p in directory.iterdir() if p.name.isdecimal() and (p / PARAMS).is_dir() and (p / MODEL).is_dir()]
    return max(steps, key=lambda p: int(p.name), default=None)
