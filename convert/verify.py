"""`python -m convert verify A B`: whether two models answer alike; `verify --published DIR`: as BAAI published for bge-m3.

Not here: how PyTorch is asked (reference.py), the texts (texts.py) and the published scores (published.py).
"""

import argparse
import warnings
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np

import m3jax
from convert import published, reference
from convert.texts import default_texts
from m3jax import M3Config, checkpoint, sources
from m3jax.embeddings import Embeddings

_LENGTH = (
    512  # tokens, where --max-length does not say another: what two CPU cores encode in a minute or two at full size
)

# Of float32 with the same weights, on 1 − cosine and on a lexical weight (tests/parity compares with the same figures).
COSINE_TOLERANCE, WEIGHT_TOLERANCE = 1e-6, 1e-5


class Difference(NamedTuple):
    """The largest difference of one function, the text where it is, and what is allowed (None: nothing is asked of it)."""

    name: str
    largest: float
    text: int
    tolerance: float | None

    @property
    def passes(self) -> bool:
        """Whether it is within tolerance."""
        return self.tolerance is None or self.largest <= self.tolerance


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the subcommand."""
    parser.add_argument("models", nargs="*", help="A and B: released directories, Orbax checkpoints, hub names or URLs")
    for side in "ab":
        told = f"what runs {side.upper()}; without it, PyTorch runs a released directory where it is installed"
        parser.add_argument(f"--{side}-with", choices=["m3jax", "torch"], help=told)
    parser.add_argument("--texts", help="a UTF-8 file or URL with one text a line; without it, texts of our own")
    parser.add_argument("--max-length", type=int, help=f"tokens that a text is cut to; without it, {_LENGTH} at most")
    parser.add_argument(
        "--published", metavar="DIR", help="a copy of BAAI/bge-m3, to compare with its published scores"
    )


def run(given: argparse.Namespace) -> None:
    """Print the differences; SystemExit(1) where one is past its tolerance, ValueError where nothing can be compared."""
    if given.published is not None and not given.models:
        of_two = {"--texts": given.texts, "--max-length": given.max_length}
        of_two |= {"--a-with": given.a_with, "--b-with": given.b_with}
        if came := [name for name, value in of_two.items() if value is not None]:
            raise ValueError(f"--published runs texts of its own; {', '.join(came)} are for two models, leave them out")
        return published.check(given.published)
    if given.published is not None or len(given.models) != 2:
        raise ValueError(f"verify takes two models, or --published and its directory; got {len(given.models)} models")
    with ExitStack() as fetched:
        compare_models(given, [fetched.enter_context(sources.local(model)) for model in given.models])


def compare_models(given: argparse.Namespace, paths: Sequence[Path]) -> None:
    """Encode with both, which are in these directories, and print what differs."""
    longest = min(_config(path).max_length for path in paths)
    length = given.max_length or min(_LENGTH, longest)
    if not 2 <= length <= longest:
        raise ValueError(f"--max-length must be what both models can read, 2 to {longest} tokens, got {length}")
    texts = read_texts(given.texts) if given.texts else default_texts(length)
    answers = []
    for side, name, path, framework in zip("AB", given.models, paths, (given.a_with, given.b_with), strict=True):
        framework = framework or default_framework(path)
        print(f"{side}: {name}, run by {'PyTorch and transformers' if framework == 'torch' else 'm3jax'} in float32")
        answers.append(encode(path, framework, texts, length))
    print(f"{len(texts)} texts, cut to {length} tokens where they are longer")
    found = compare(*answers)
    for one in found:
        allowed = "" if one.tolerance is None else f"tolerance {one.tolerance:.0e}{'' if one.passes else '  PAST IT'}"
        print(f"{one.name:<20} {one.largest:8.1e}  {allowed:<28} text {one.text}: {texts[one.text]!r:.40}")
    past = sum(not one.passes for one in found)
    print(f"{past} past tolerance" if past else "alike within tolerance")
    if past:
        raise SystemExit(1)


def read_texts(path: str) -> list[str]:
    """The lines of a file or URL, each a text (an empty line is the empty text); ValueError where there are none."""
    opened: Any = fsspec.open(path, "rt", encoding="utf-8")  # fsspec names no type for what it opens
    try:
        with opened as file:
            texts = file.read().removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: texts are UTF-8, one a line; {error}") from error
    if texts == [""]:
        raise ValueError(f"{path}: expected texts, one a line, but the file is empty")
    return texts


def default_framework(path: Path) -> str:
    """What runs a model if nobody says: PyTorch a released directory, where it is installed; m3jax everything else."""
    return "torch" if reference.is_installed() and not checkpoint.is_checkpoint(path) else "m3jax"


def encode(path: Path, framework: str, texts: Sequence[str], max_length: int) -> Embeddings:
    """Dense, sparse and colbert of the texts in float32, by "torch" or "m3jax"."""
    if framework == "torch":
        if checkpoint.is_checkpoint(path):
            raise ValueError(f"{path}: PyTorch does not read Orbax; convert it with to-pytorch, or run it with m3jax")
        return reference.encode(path, texts, max_length)
    m3 = m3jax.load(path, dtype="float32")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* texts are longer than max_length")  # both sides cut, as asked
        return m3jax.encode(m3, texts, colbert=True, max_length=max_length)


def compare(a: Embeddings, b: Embeddings) -> list[Difference]:
    """The largest differences: dense 1 − cosine and absolute, lexical weights (of the union of terms), colbert 1 − cosine.

    ValueError where widths, vocabularies or numbers of tokens differ: such answers cannot be laid side by side.
    """
    assert a.dense is not None and b.dense is not None and a.terms is not None and b.terms is not None
    assert a.colbert is not None and b.colbert is not None
    for name, one, two in (
        ("widths of the dense vectors", a.dense.shape[1], b.dense.shape[1]),
        ("widths of the colbert vectors", a.colbert[0].shape[1], b.colbert[0].shape[1]),
        ("rows of the vocabulary", a.terms.shape[1], b.terms.shape[1]),  # pyright: ignore (scipy has no types)
    ):
        if one != two:
            raise ValueError(f"A and B must be of one geometry, but the {name} are {one} and {two}")
    if unlike := [
        (i, len(x), len(y)) for i, (x, y) in enumerate(zip(a.colbert, b.colbert, strict=True)) if len(x) != len(y)
    ]:
        text, one, two = unlike[0]
        raise ValueError(
            f"A and B must read the same tokens, but {len(unlike)} texts differ in their number: text {text} has "
            f"{one + 1} in A and {two + 1} in B; compare the tokenizer.json and tokenizer_config.json of both"
        )
    colbert = (_past_cosine(x, y).max() for x, y in zip(a.colbert, b.colbert, strict=True))
    weights = abs(a.terms - b.terms).max(axis=1).toarray()[:, 0]
    return [
        _largest("dense 1 − cosine", _past_cosine(a.dense, b.dense), COSINE_TOLERANCE),
        _largest("dense absolute", np.abs(a.dense - b.dense).max(axis=1), None),
        _largest("sparse absolute", weights, WEIGHT_TOLERANCE),
        _largest("colbert 1 − cosine", colbert, COSINE_TOLERANCE),
    ]


def _config(path: Path) -> M3Config:
    if checkpoint.is_checkpoint(path):
        return checkpoint.describe(path)[0]
    return M3Config.from_file(path / "config.json")


def _past_cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """1 − cosine of each row, in float64: in float32 it would be of the size of the tolerance's own rounding."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return 1 - (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def _largest(name: str, of_texts: Iterable[float], tolerance: float | None) -> Difference:
    values = np.fromiter(of_texts, np.float64)
    return Difference(name, float(values.max()), int(values.argmax()), tolerance)
