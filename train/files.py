"""Files that are read line by line with their place in every error, and files that are there only when they are whole.

What a row must hold is said where it is used: data/rows.py, tasks.py, results.py.
"""

import contextlib
import gzip
import json
import shutil
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """("path:line", bytes) of each line that is not blank; a name that ends in .gz is opened as gzip.

    In bytes, because only b"\\n" ends a JSON line. ValueError for a gzip file that is not whole.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file: {error}") from error


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Each row as a JSON line; the folder need not be there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def parse_object(text: bytes) -> dict[str, Any]:
    """One JSON object; ValueError says the rule and what came, without the place.

    >>> parse_object(b'{"id": "a"}')
    {'id': 'a'}
    """
    try:
        row = json.loads(text.decode("utf-8").rstrip())
    except UnicodeDecodeError as error:
        raise ValueError(f"must be UTF-8; byte {error.start} is not") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"must be one JSON object; {error.msg} at character {error.pos + 1} of {text[:60]!r}"
        ) from None
    if not isinstance(row, dict):
        raise ValueError(f"must be one JSON object; {came(row)}")
    try:
        # Half a surrogate pair is no character: it can be written in JSON as \ud800, and in no encoding of Unicode.
        json.dumps(row, ensure_ascii=False).encode("utf-8") if b"\\u" in text else None
    except UnicodeEncodeError as error:
        raise ValueError(f"a text must be valid Unicode; lone surrogate {error.object[error.start]!a} came") from None
    return row


def came(value: Any) -> str:
    """What came, for an error: JSON, shortened.

    >>> came(["a", 1])
    '["a", 1] came'
    """
    text = json.dumps(value, ensure_ascii=False)
    return f"{text if len(text) <= 60 else text[:57] + '...'} came"


def write_whole(path: Path, text: str) -> None:
    """Write a file beside its place and move it there, so that an interruption never leaves half of it."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def written_once(folder: Path) -> Iterator[Path]:
    """A place to write a folder in, which is moved to `folder` when the block ends well; where another process was first, its
    folder stays."""
    partial = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: Path, content: Any) -> None:
    """`write_whole` of indented JSON."""
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False, default=list) + "\n")
