"""`python -m m3jax encode | inspect`: a file of texts to embeddings on disk, and what a directory of embeddings holds.

Not here: the work itself (corpus.py, shards.py), and training and conversion, which are programs of the repository.
"""

import argparse
import gzip
import itertools
import json
import sys
import time
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from m3jax import paths, shards
from m3jax.tokenization import utf8

_STDIN = "-"


def main(arguments: list[str] | None = None) -> None:
    """Run one program; what is wrong is told in one line that begins with `error:`."""
    parser = argparse.ArgumentParser(prog="python -m m3jax", description="BGE M3-Embedding in JAX and Flax.")
    programs = parser.add_subparsers(dest="program", required=True)
    _encode_arguments(
        programs.add_parser("encode", help="texts to a directory of embeddings; goes on where it stopped")
    )
    of = programs.add_parser("inspect", help="what a directory of embeddings holds")
    of.add_argument("path", help="a directory that encode or m3jax.encode_to wrote, finished or not")
    given = parser.parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
            print("\n".join(_inspect(given.path) if given.program == "inspect" else _encode(given)))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        raise SystemExit(130) from None  # as a shell counts what SIGINT ended


def _encode_arguments(parser: argparse.ArgumentParser) -> None:
    yes_no = argparse.BooleanOptionalAction
    parser.add_argument("model", help="a released directory, a checkpoint, a URL, or a name on the Hugging Face hub")
    parser.add_argument(
        "input", help=f"texts, one a line, or JSONL {{'text', 'title'?}}; .gz is opened; {_STDIN} is stdin"
    )
    parser.add_argument("output", help="directory of the embeddings, on a file system")
    parser.add_argument(
        "--format",
        choices=["text", "jsonl"],
        help="of INPUT; default: jsonl where its name ends in .jsonl or .jsonl.gz",
    )
    parser.add_argument("--dense", action=yes_no, default=True, help="[width] a text")
    parser.add_argument("--sparse", action=yes_no, default=True, help="a weight a term")
    parser.add_argument("--colbert", action=yes_no, default=False, help="[width] a token")
    parser.add_argument("--colbert-dtype", choices=shards.COLBERT_DTYPES, default="float16", help="default: float16")
    parser.add_argument("--max-length", type=int, help="tokens; longer texts are cut; default: the model's")
    parser.add_argument("--instruction", default="", help="prepended to every text, as it stands")
    parser.add_argument("--truncate-dim", type=int, help="numbers of dense and colbert vectors to keep")
    parser.add_argument("--mcls", action="store_true", help="a CLS token every 256 tokens, for long texts")
    parser.add_argument(
        "--shard-texts", type=int, default=8192, help="texts of a shard; a kill can lose two; default: 8192"
    )
    parser.add_argument("--batch-tokens", type=int, help="tokens that the device computes at once; default: encode's")
    parser.add_argument(
        "--dtype", help="float32, bfloat16 or float16; default: float32 on CPU, bfloat16 on GPU and TPU"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub name")


def _encode(given: argparse.Namespace) -> Iterator[str]:
    import m3jax  # here: who inspects does not wait for JAX

    start = time.perf_counter()
    jsonl = given.input.removesuffix(".gz").endswith(".jsonl") if given.format is None else given.format == "jsonl"
    texts = _texts(given.input, jsonl)
    m3 = m3jax.load(given.model, revision=given.revision, dtype=given.dtype)
    embeddings = m3jax.encode_to(
        given.output,
        m3,
        texts,
        dense=given.dense,
        sparse=given.sparse,
        colbert=given.colbert,
        colbert_dtype=given.colbert_dtype,
        max_length=given.max_length,
        instruction=given.instruction,
        truncate_dim=given.truncate_dim,
        mcls=given.mcls,
        batch_tokens=given.batch_tokens,
        shard_texts=given.shard_texts,
    )
    yield f"{given.output}: {embeddings}, {time.perf_counter() - start:.1f} s"


def _texts(source: str, jsonl: bool) -> Iterable[str]:
    """The texts of stdin, or of a pipe (`<(zcat …)`), as they come; of a file as often as they are asked for."""
    path = Path(source)
    if source == _STDIN:
        return _rows(sys.stdin.buffer, "stdin", jsonl)
    if path.exists() and not path.is_file():
        return _rows(_lines(path), source, jsonl)
    return _File(path, jsonl)


def _inspect(path: str) -> Iterator[str]:
    if paths.is_url(path):
        raise ValueError(f"{path}: embeddings are on a file system; copy the directory to a disk first")
    directory = Path(path)
    settings = shards.read_settings(directory)
    if settings is None:
        raise ValueError(
            f"{directory}: expected a directory that m3jax.encode_to wrote; there is no {shards.SETTINGS} in it"
        )
    finished = (directory / shards.FINISHED).is_file()
    found = shards.read_finished(directory) if finished else shards.summary(directory)
    if finished:
        shards.open_embeddings(directory)  # refuses one that has lost shards
        yield f"{directory}: finished"
    else:
        yield f"{directory}: NOT finished; the call that began it goes on where it stopped"
    cut = f", {found['cut']:,} of them cut to max_length" if found["cut"] else ""
    yield f"texts    {found['texts']:,} in {len(found['shards']):,} shards{cut}"
    for name, part in found["parts"].items():
        counts = "".join(f", {part[count]:,} {count}" for count in ("weights", "vectors") if count in part)
        yield f"{name:8} {part['width']:,} wide, {part['dtype']}{counts}: {part['bytes']:,} bytes"
    model = settings.pop("model")
    config = model["config"]
    yield (
        f"model    {config['num_hidden_layers']} layers × {config['hidden_size']}, {model['dtype']}, weights "
        f"{model['weights']}, tokenizer {model['tokenizer']}"
    )
    yield "settings " + ", ".join(
        f"{name} {x}" for name, x in settings.items() if name != "format" and x not in (None, "")
    )


class _File(Sequence[str]):
    """The texts of a file, as often as they are asked for; counted once, so that the room they need is known before."""

    def __init__(self, path: Path, jsonl: bool):
        self._path, self._jsonl = path, jsonl
        self._count = sum(1 for _ in self)  # and what is wrong with one is told before the model is loaded

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: Any) -> Any:
        return next(itertools.islice(self, range(len(self))[row], None))  # lines are found by counting

    def __iter__(self) -> Iterator[str]:
        return _rows(_lines(self._path), str(self._path), self._jsonl)


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield from file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file: {error}") from error


def _rows(lines: Iterable[bytes], name: str, jsonl: bool) -> Iterator[str]:
    """The text of each line, blank ones too; or of each JSON line the title, a space and the text, as in evaluation sets.

    In bytes, because only b"\\n" ends a line. ValueError with the line's place.
    """
    for number, line in enumerate(lines, 1):
        try:
            text = line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}:{number}: must be UTF-8; byte {error.start} of the line is not") from None
        if not jsonl:
            yield text
        elif text.strip():
            yield _text_of(text, f"{name}:{number}")


def _text_of(line: str, place: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        why = f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else error
        raise ValueError(f"{place}: must be one JSON object; {why}") from None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str) or not isinstance(row.get("title", ""), str):
        raise ValueError(f'{place}: must be {{"text": str}}, with "title": str if you like; {line:.80} came')
    text = f"{row.get('title', '')} {row['text']}".strip()
    utf8(text, f"{place}: text")  # JSON may spell half of a surrogate pair
    return text


if __name__ == "__main__":
    main()
