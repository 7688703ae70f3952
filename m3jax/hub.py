"""The name of a model on the Hugging Face hub to a local directory: only the files that `load` reads, through its cache.

Not here: what is in the files (weights.py), and uploads. Cache, tokens, mirrors and offline mode are huggingface_hub's, with
its environment variables (HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE).
"""

import json
import re
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

# An owner and a name; the two models of the family that are older than owners are still asked for without one.
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*|xlm-roberta-(base|large)", re.ASCII)

_ALWAYS = ("config.json", "tokenizer.json")
INDEX = "model.safetensors.index.json"
WEIGHTS = ("model.safetensors", INDEX, "pytorch_model.bin")  # the first that is there, in the order of weights.read
_HEADS = ("sparse_linear.pt", "colbert_linear.pt")
_MODULES = ("modules.json", "1_Pooling/config.json")  # two small files, by which weights.read knows a mean over tokens


def is_name(source: str | Path) -> bool:
    """Whether source is a name on the hub: a path that is there, whatever it looks like, is none.

    >>> is_name("BAAI/bge-m3"), is_name("xlm-roberta-large"), is_name("runs/a/model")
    (True, True, False)
    """
    return isinstance(source, str) and bool(_NAME.fullmatch(source)) and not Path(source).exists()


def fetch(source: str | Path, *, revision: str | None = None) -> Path:
    """The local directory of a model: `source` itself where it is a directory, else what the hub has under this name.

    A name is `owner/name`, or xlm-roberta-base or -large.

    Fetched are config.json, tokenizer.json, one form of the weights (model.safetensors, else its shards, else
    pytorch_model.bin), and where they exist the two head files and two configs of sentence-transformers; what the cache has
    already is not fetched again, and the bytes of the rest are said on stderr first. revision: a branch, tag or commit; None
    is main. Offline (HF_HUB_OFFLINE=1), or where the hub does not answer, the cached copy serves; only the latter is said.

    Raises ValueError where source is neither a directory nor a name, where the hub has no such repository, revision or file,
    where there is no answer and no cached copy, and on a download that breaks or comes short, which leaves no file behind.
    """
    if Path(source).is_dir():
        if revision is not None:
            raise ValueError(
                f"revision is for names on the hub, but {str(source)!r} is a directory; leave revision out"
            )
        return Path(source)
    if not isinstance(source, str) or not is_name(source):
        raise ValueError(
            f"expected a directory with a model or a checkpoint, or a name on the hub such as 'BAAI/bge-m3', got "
            f"{str(source)!r}, which is neither; look for a typing error"
        )
    # Imported here: who loads from a directory does not wait for it.
    from huggingface_hub import HfApi, constants, errors

    at = f"{source} at revision {revision or 'main'}"
    try:
        info = HfApi().model_info(source, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except errors.RevisionNotFoundError as error:
        raise ValueError(
            f"{source}: the repository has no revision {revision!r}; give a branch, tag or commit that it has, or leave "
            "revision out for main"
        ) from error
    except errors.HfHubHTTPError as error:
        # A 401 is also what the hub answers for names that it does not have, to who is not logged in.
        if error.response.status_code not in (401, 404):
            return _cached(source, revision, at, error)
        raise ValueError(
            f"{source!r} is neither a directory here nor a repository that {constants.ENDPOINT} shows; look for a typing "
            "error, or log in if it is private (`hf auth login`, or HF_TOKEN)"
        ) from error
    except Exception as error:  # the HTTP client's, which is httpx in huggingface_hub 1 and another in 2
        return _cached(source, revision, at, error)

    sizes = {file.rfilename: file.size for file in info.siblings or []}
    needed = _needed(
        at,
        sizes,
        lambda: Path(_download(source, INDEX, info.sha)),
        "take a revision or repository that has them, or make a directory with them (the tokenizer.json is what "
        "transformers' AutoTokenizer writes with save_pretrained)",
    )
    planned = [_download(source, file, info.sha, dry_run=True) for file in needed]
    coming = [one.file_size or 0 for one in planned if one.will_download]
    if coming:
        print(f"{at}: downloading {sum(coming):,} bytes in {len(coming)} files", file=sys.stderr, flush=True)
    for file in needed:
        path = Path(_download(source, file, info.sha))
        came = path.stat().st_size
        if sizes[file] not in (None, came):
            raise ValueError(
                f"{at}: {file} must have the {sizes[file]:,} bytes that the hub names, but has {came:,}; remove "
                f"{path.resolve()} and load again"
            )
    # By the revision's name only now: till here an older copy serves offline, from here this one, which is whole.
    _download(source, _ALWAYS[0], revision)
    return Path(_download(source, _ALWAYS[0], info.sha)).parent


def _download(source: str, file: str, revision: str | None, *, dry_run: bool = False) -> Any:
    """The path of one file in the cache, once it is there; with dry_run, what there would be to do."""
    from huggingface_hub import errors, hf_hub_download

    try:
        return hf_hub_download(source, file, revision=revision, dry_run=dry_run)
    except errors.GatedRepoError as error:
        raise ValueError(
            f"{source}: the repository is gated; accept its conditions on its page and log in (`hf auth login`, or HF_TOKEN)"
        ) from error
    except Exception as error:  # the HTTP client's or hf_xet's, and a full disk
        raise ValueError(
            f"{source}: the download broke off at {file} ({_first_line(error)}); load again: files that arrived whole are "
            "kept, this one is fetched anew"
        ) from error


def _needed(at: str, there: Collection[str], index: Callable[[], Path], advice: str) -> list[str]:
    """The files to have, from the names of those that are there; index gives the path of the sharded weights' index."""
    weights = next((form for form in WEIGHTS if form in there), None)
    needed = [*_ALWAYS, weights or " or ".join(WEIGHTS)]
    if weights == INDEX:
        needed += _shards(at, index())
    missing = [file for file in needed if file not in there]
    if missing:
        names = ", ".join(sorted(there)[:20]) or "nothing"
        raise ValueError(f"{at}: a model needs {', '.join(missing)}; found {names}. To do: {advice}")
    return needed + [file for file in (*_HEADS, *_MODULES) if file in there]


def _shards(at: str, index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{at}: {INDEX} must be JSON {{"weight_map": {{tensor: file}}}}, but is not ({error!r}); take another revision'
        ) from error


def _cached(source: str, revision: str | None, at: str, error: Exception) -> Path:
    """The cached copy, where the hub gave no answer but `error`."""
    from huggingface_hub import constants, errors, try_to_load_from_cache

    offline = isinstance(error, errors.OfflineModeIsEnabled)
    why = "HF_HUB_OFFLINE is set" if offline else f"{constants.ENDPOINT} does not answer ({_first_line(error)})"
    advice = "load once with the hub in reach" + (" and HF_HUB_OFFLINE unset" if offline else "")
    config = try_to_load_from_cache(source, _ALWAYS[0], revision=revision)
    if not isinstance(config, str):
        raise ValueError(
            f"{source!r} is no directory here; {why}, and the cache {constants.HF_HUB_CACHE} has no copy of {at}; {advice}, "
            "or give a directory"
        ) from error
    directory = Path(config).parent
    there = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    _needed(f"{why}, and of {at} the cache has a part only", there, lambda: directory / INDEX, advice)
    without = [head for head in _HEADS if head not in there]
    if not offline or without:
        # A copy that another program fetched may lack heads that the repository has.
        lacking = f", without {' and '.join(without)}" if without else ""
        print(f"{at}: {why}; taking the cached copy{lacking}", file=sys.stderr, flush=True)
    return directory


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
