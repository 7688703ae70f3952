"""load, save and encode: a directory or a hub name to a model, a model to a directory, texts to Embeddings.

Not here: the mathematics (model.py), where models come from (sources.py), scoring and search (retrieval.py).
"""

import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from m3jax import sources, weights
from m3jax.arguments import bar_hidden, make_plan
from m3jax.collected import Arrays
from m3jax.embeddings import Embeddings
from m3jax.encoding import run, say_cut
from m3jax.model import M3, cast
from m3jax.sharding import make_mesh
from m3jax.tokenization import utf8

_DTYPES = ("float32", "bfloat16", "float16")


def load(
    directory: str | Path,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    heads: Literal["require", "init"] = "require",
) -> M3:
    """A model from a released directory (PyTorch weights), an Orbax checkpoint of ours, or a hub name, ready to encode.

    Every device of this process gets a copy; `encode` then splits its batches over them. What JAX compiles is kept in the
    user's cache folder (~/.cache/m3jax) for the next process, unless JAX's own settings say where
    (jax_compilation_cache_dir), or that nothing is to be kept (JAX_ENABLE_COMPILATION_CACHE=0).

    directory: a path, or a URL in an object store ("gs://…", "s3://…"). A str that is no directory is a name on the Hugging
    Face hub ("BAAI/bge-m3"), and revision a branch, tag or commit there (None is main); `m3jax.hub.fetch` says what is
    downloaded. On CPU the parameters may be views of the mapped files: replace a model's files, do not write into them, while
    it is in use (`save` replaces).

    dtype: "float32", "bfloat16" or "float16", in which the matrix products run; None is float32 on CPU and bfloat16 on
    GPU and TPU, whatever is stored. heads: "init" draws heads at random where the directory has none, to train them.

    Raises ValueError where files are missing (naming them), where tensors are missing, left over or misshapen (listing
    all), where tokenizer and embedding table do not fit, and where the hub does not give the files.
    """
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)} or None, got {dtype!r}")
    if heads not in ("require", "init"):
        raise ValueError(f"heads must be 'require' or 'init', got {heads!r}")
    _keep_compilations()
    config, params, tokenizer = sources.read(directory, revision=revision, heads=heads)
    devices = jax.local_devices()
    copies = NamedSharding(make_mesh(devices=devices), PartitionSpec()) if len(devices) > 1 else None
    return M3(config, cast(jax.device_put(params, copies), dtype), tokenizer)


def _keep_compilations() -> None:
    config: Any = jax.config  # its attributes have no types
    if not config.jax_enable_compilation_cache:
        return
    if config.jax_persistent_cache_min_compile_time_secs == 1.0:  # JAX's default
        # A layer compiles in less than the second from which JAX keeps things, but a corpus needs dozens of them.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    if config.jax_compilation_cache_dir is None:
        try:
            caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        except RuntimeError:
            warnings.warn(
                "this user has no home folder, so what JAX compiles is not kept for the next process; set XDG_CACHE_HOME, or "
                "JAX_ENABLE_COMPILATION_CACHE=0 to say that nothing is to be",
                stacklevel=3,
            )
            return
        jax.config.update("jax_compilation_cache_dir", str(caches / "m3jax"))
        compilation_cache.reset_cache()  # JAX looks for the folder once, at the first compilation, which may have been


def save(m3: M3, directory: str | Path, *, card: str | None = None) -> None:
    """Write a model as a released directory, which `load`, transformers and FlagEmbedding read.

    directory: a path or a URL, as for `load`; it appears when it is complete. The heads are the two `.pt` files, where
    FlagEmbedding and vLLM look.

    card: the text of README.md, the model card on the hub. None makes one of what the model itself tells: its sizes, and how
    to use it. The card of a directory that the model was loaded from is not taken over: what it says of results and data may
    not hold of the model that is saved. Pass it as card where it does.

    Raises ValueError where the directory holds what no save wrote. A card that you wrote or changed counts as that, so a save
    never replaces it; one that a save made, it does.
    """
    weights.write(m3, directory, card=card)


def encode(
    m3: M3,
    texts: str | Iterable[str],
    *,
    dense: bool = True,
    sparse: bool = True,
    colbert: bool = False,
    max_length: int | None = None,
    instruction: str = "",
    truncate_dim: int | None = None,
    mcls: bool = False,
    batch_tokens: int | None = None,
    progress: bool | None = None,
) -> Embeddings:
    """The representations of texts, in their order; what is not asked for is None.

    max_length: tokens, `<s>` and `</s>` included; None is the model's (8192 for bge-m3). A longer text is cut to it, with
    one warning that counts such texts (Python shows the same warning of the same line once, unless
    `warnings.simplefilter("always")` says otherwise). One str gives unbatched values. `[]` gives Embeddings of no rows; `""` is
    the text of no tokens: a dense vector, no lexical weight, one colbert vector (that of `</s>`).

    instruction: prepended to every text as it stands, for models trained with one ("query: "); bge-m3 has none. truncate_dim:
    keep the first numbers of dense and colbert vectors and normalise again, for models trained for it. mcls: a CLS token before
    every 256 tokens, the dense vector from all of them (PAPER §5), better on long texts that the model was not trained on;
    they count toward max_length; a text of up to 256 tokens has its plain vector, to the bit in a call that has no longer one
    (longer ones have more tokens than without mcls, so batches are others, and rounding as from batch to batch).

    batch_tokens bounds the tokens that the devices compute at once, padding included, but for one row on each, as long as the
    longest text needs; None is 1024 on CPU, where a batch then stays in the caches, else 16384 a device. A batch that does not
    fit into the device's memory is halved, with a warning. progress shows a bar on stderr; None shows one on a terminal after
    some seconds.

    Texts are tokenised, computed and taken in beside each other. Where the parameters lie on a mesh (`load` puts them on all
    devices of the process), rows are split over it. Under jax.distributed, parameters on a mesh of several processes mean that
    all processes pass the same texts and get all rows; otherwise each encodes what it is given. On such a mesh a batch that
    does not fit is not halved: JAX's error comes through in the process where it happened, with a note on what to do, and
    JAX ends the others once that process has ended, within its shutdown timeout of 5 minutes.

    A text has the same numbers alone, in any batch and at any place: within 1e-5 in float32. In bfloat16, from batch to batch
    and beside float32, dense and colbert vectors of random models from 4 × 256 to 24 × 1024 have a cosine above 1 − 1e-3, and
    lexical weights, large and small, of up to 1 are within 0.02; at 2 × 64 above 1 − 1e-2 and within 0.07. Measured on CPU:
    5.0e-4 and 0.016 of 24 models of 4 × 256, 8e-6 and 0.004 of 2 of 24 × 1024, 6.9e-3 and 0.047 of 40 of 2 × 64. GPU and TPU
    round the result of each linear layer too; so rounded on CPU, 2.0e-4 and 0.010 of 3 of 4 × 256 (RESULTS.md).

    Raises ValueError where max_length exceeds the position table, nothing is asked for, or an item is not a str.
    """
    plan = make_plan(
        m3.config,
        dense=dense,
        sparse=sparse,
        colbert=colbert,
        max_length=max_length,
        instruction=instruction,
        truncate_dim=truncate_dim,
        mcls=mcls,
        batch_tokens=batch_tokens,
    )
    if isinstance(texts, bytes) or not isinstance(texts, Iterable):
        raise ValueError(f"encode: texts must be a str or an iterable of str, got {texts!r:.80}")
    hidden = bar_hidden(progress)
    rows = [texts] if isinstance(texts, str) else list(texts)
    for index, text in enumerate(rows):  # all of them first: a corpus is not to fail halfway
        utf8(text, f"texts[{index}]")
    whole: list[tuple[Arrays, int]] = []
    # A bar that is asked for shows at once, by itself if the work takes a while.
    with tqdm(total=len(rows), unit="text", desc="encode", disable=hidden, delay=0 if progress else 3) as bar:
        run(m3, [(None, rows)], plan, deliver=lambda _, *given: whole.append(given), taken_in=bar.update)
    [(arrays, cut)] = whole
    if cut:
        warnings.warn(say_cut(cut, len(rows), plan), stacklevel=2)
    return Embeddings(*arrays, single=isinstance(texts, str))
