"""encode_to: the embeddings of a corpus of any size to files, shard by shard, going on where it was stopped.

Not here: the files (shards.py), the embeddings themselves (embedder.py).
"""

import hashlib
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from itertools import chain, islice
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils
from tqdm import tqdm

from m3jax import paths, provenance, room, shards
from m3jax.arguments import bar_hidden, make_plan, whole_number
from m3jax.collected import Arrays
from m3jax.embeddings import Embeddings
from m3jax.encoding import run, say_cut
from m3jax.model import M3
from m3jax.shards import COLBERT_DTYPES, ColbertDtype
from m3jax.tokenization import utf8

# A shard with colbert is closed before its vectors could take more than this in float32, if every character were a token:
# a shard is in memory whole, and 8192 texts of 8192 tokens and width 1024 would be 256 GiB.
COLBERT_BYTES = 2 << 30
# Any shard is closed before its texts have more characters than this: five shards of texts may be in memory.
SHARD_CHARACTERS = 1 << 27
# Texts that are tokenised to say how much disk the rest will take: the mean length is then within about 6% where the
# lengths' deviation is their mean, and 256 x 8192 tokens take 2 seconds.
SAMPLE = 256


def encode_to(
    directory: str | Path,
    m3: M3,
    texts: Iterable[str],
    *,
    dense: bool = True,
    sparse: bool = True,
    colbert: bool = False,
    colbert_dtype: ColbertDtype = "float16",
    max_length: int | None = None,
    instruction: str = "",
    truncate_dim: int | None = None,
    mcls: bool = False,
    batch_tokens: int | None = None,
    shard_texts: int = 8192,
    progress: bool | None = None,
) -> Embeddings:
    """Encode texts into files, in their order, and open them: a corpus of any size.

    While a shard is written, the next is computed and the texts of up to three more are read and tokenised, so that the devices
    wait for nothing but a disk or a source that is slower than they are. Memory is that of two shards and the texts of five.

    The bytes that each output takes are said on stderr first, dense exactly and the others estimated from a sample. What was
    stopped, by a kill, Ctrl-C or a full disk, goes on with the same call: texts whose shards are there are read and compared
    by a digest, not encoded. A directory is finished when all texts are in it; until then `open_embeddings` refuses it.

    directory: on a file system; shards.py tells what is in it. texts: any iterable of str; one that knows its length must
    give as many, and is checked against the free disk before it begins, others shard by shard; a sequence is first looked
    through for what is no text. colbert_dtype: what colbert
    vectors are stored in; they are read as float32. "float16" is within 2⁻¹¹ of each number, "int8" within max|x| / 254 of
    the vector, a quarter of float32's bytes. shard_texts: texts of a shard, of which a kill can lose two, one that is written
    and one that is computed; fewer where colbert would take more than 2 GiB, or the texts have more than 2²⁷ characters. The
    other arguments are those of `encode`; batch_tokens may be another when it goes on.

    Under jax.distributed every process passes the same texts and one directory that all see. Shards are dealt out by
    process; parameters that span processes make all encode each shard together. The number of processes may change between
    calls. Every process returns when all is written.

    Raises ValueError where what is there was made from other texts, settings or another model (naming what differs), where
    other numbers of texts come than their length says, where the disk is too small, and as `encode` does.

    >>> encode_to("embeddings", m3, (line.strip() for line in open("corpus.txt")))  # doctest: +SKIP
    Embeddings(1000000 texts: dense 1024, sparse 250002)
    """
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        raise ValueError(f"encode_to: texts must be an iterable of str, got {texts!r:.80}; of one text pass [text]")
    if paths.is_url(directory):
        raise ValueError(f"encode_to: directory must be on a file system, got {directory}; write to a disk and copy it")
    if colbert_dtype not in COLBERT_DTYPES:
        raise ValueError(f"encode_to: colbert_dtype must be one of {', '.join(COLBERT_DTYPES)}, got {colbert_dtype!r}")
    if colbert_dtype != "float16" and not colbert:
        raise ValueError(f"encode_to: colbert_dtype is of colbert, which is not asked for; got {colbert_dtype!r}")
    shard_texts = whole_number("encode_to: shard_texts", shard_texts)
    if shard_texts < 1:
        raise ValueError(f"encode_to: shard_texts must be at least 1, got {shard_texts}")
    # Refuses what `encode` refuses before anything is written.
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
    hidden = bar_hidden(progress)
    count = _length(texts)
    again = count is not None and hasattr(texts, "__getitem__")  # what has a length alone may be tqdm of a generator
    for row, text in enumerate(texts if again else ()):  # of an iterator when its turn comes
        utf8(text, f"encode_to: text {row}")
    directory = Path(directory)
    settings = provenance.settings(m3, plan, colbert_dtype, shard_texts)
    _make(directory, settings)
    done = shards.there(directory)
    finished = (directory / shards.FINISHED).is_file()
    if finished:
        shards.open_embeddings(directory)  # refuses one that has lost shards
    most = COLBERT_BYTES // (4 * (plan.asked.width or m3.config.colbert_dim)) if colbert else None
    groups = _groups(
        texts, count, shard_texts, lambda text: min(len(instruction) + len(text) + 2, plan.max_length), most
    )
    first = next(groups)
    if not finished:
        # Over all texts, where they can be read once more, as a file's first may be of another kind than its last.
        all_of_them = texts if again else first.texts
        sample = [*islice(all_of_them, 0, None, (count or len(first.texts)) // SAMPLE + 1)]
        sizes = room.bytes_a_text(m3, sample, plan, colbert_dtype)
        came = sum(shards.read_record(directory, index)["texts"] for index in done)
        room.check(directory, count, sizes, came, say=jax.process_index() == 0)
    _begin(directory, settings)

    # Parameters that span processes are computed with by all at once, and each then holds all rows.
    together = not all(getattr(x, "is_fully_addressable", True) for x in jax.tree.leaves(m3.params))
    if jax.process_index() > 0:
        hidden = True
    needed: set[int] = set()
    with _Writer(directory, colbert_dtype) as writer, tqdm(total=count, unit="text", disable=hidden) as bar:

        def to_encode() -> Iterator[tuple[_Group | None, list[str]]]:
            """The texts of each group that this process encodes, under the group where it also writes it."""
            missing = 0
            for group in chain([first], groups):
                needed.add(group.index)
                if there := group.index in done:
                    _check_same(directory, group)
                elif finished:
                    raise ValueError(
                        f"{directory}: it is finished with {group.row} texts, but more came; take another directory for them"
                    )
                if group.last and max(done, default=0) > group.index:
                    raise ValueError(
                        f"{directory}: shard number {max(done)} is there, but the texts that came end in number {group.index}; "
                        "pass the same texts in the same order, or another directory"
                    )
                if not there:
                    mine = missing % jax.process_count() == jax.process_index()
                    missing += 1
                    if mine or together:
                        yield group if mine else None, group.texts
                        continue
                bar.update(len(group.texts))

        run(m3, to_encode(), plan, deliver=writer.put, taken_in=bar.update)
    # By looking, because one process may wait for another's shard for hours, which is no time for a collective.
    _until(lambda: needed <= shards.there(directory))
    if jax.process_index() == 0 and not finished:
        shards.finish(directory)
    _until((directory / shards.FINISHED).is_file)
    total = shards.read_finished(directory)
    if total["cut"]:
        warnings.warn(say_cut(total["cut"], total["texts"], plan), stacklevel=2)
    return shards.open_embeddings(directory)


def _length(texts: Iterable[str]) -> int | None:
    """What len says; None where it says nothing, as of an iterator, or of a tqdm of one without a total."""
    try:
        return len(texts)  # pyright: ignore[reportArgumentType]
    except TypeError:
        return None


def _make(directory: Path, settings: dict[str, Any]) -> None:
    """Make the directory where it is not there, and refuse what encode_to did not begin, or began with other settings."""
    if jax.process_index() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        # A kill before settings.json leaves at most its partial file.
        other = sorted(path.name for path in directory.iterdir() if not path.name.startswith(shards.PARTIAL))
        if other and shards.read_settings(directory) is None:
            raise ValueError(
                f"{directory}: expected an empty directory or one that encode_to began, found {other[0]}; give another "
                "directory"
            )
    multihost_utils.sync_global_devices("m3jax.encode_to: the directory is there")
    if not directory.is_dir():
        raise ValueError(f"{directory}: process {jax.process_index()} does not see it; give a directory that all share")
    _check_settings(directory, settings)
    if jax.process_index() == 0:
        shards.clear(directory)  # now, as it takes room on the disk; none writes before `_begin`


def _begin(directory: Path, settings: dict[str, Any]) -> None:
    """Write what the rows are made with where they are not begun: after all that can be refused before them, so that another
    call may have other settings then."""
    if jax.process_index() == 0 and shards.read_settings(directory) is None:
        shards.write_json(directory / shards.SETTINGS, settings)
    multihost_utils.sync_global_devices("m3jax.encode_to: begun, and every process knows which shards are there")
    if shards.read_settings(directory) is None:
        raise ValueError(
            f"{directory}: process {jax.process_index()} does not see what is in it; give one that all share"
        )
    _check_settings(directory, settings)


def _check_settings(directory: Path, settings: dict[str, Any]) -> None:
    there = shards.read_settings(directory)
    if there is not None and (differing := list(provenance.differences(there, settings))):
        raise ValueError(
            f"{directory}: what is there was encoded with {'; '.join(differing)}. Pass what it was begun with to go on, or "
            "another directory to begin anew"
        )


class _Group(NamedTuple):
    """The texts of one shard."""

    index: int
    row: int  # of the first text
    texts: list[str]
    digest: str
    last: bool


def _groups(
    texts: Iterable[str], count: int | None, shard_texts: int, tokens_of: Callable[[str], int], most: int | None
) -> Iterator[_Group]:
    """The texts of each shard, a function of the texts and settings alone; one shard of none where there are none.

    A shard has at most SHARD_CHARACTERS and, where it is given, `most` tokens, but for a single text. A text counts for as
    many tokens as it has characters, which are not fewer but in rare scripts, and are known without tokenising it twice.
    ValueError, before the last shard, where not `count` texts came.
    """
    group: list[str] = []
    digest = hashlib.blake2b(digest_size=16)
    index = start = tokens = characters = 0
    row = -1
    for row, text in enumerate(texts):
        encoded = utf8(text, f"encode_to: text {row}")
        own = tokens_of(text)
        too_many = most is not None and tokens + own > most
        if group and (len(group) == shard_texts or too_many or characters + len(text) > SHARD_CHARACTERS):
            yield _Group(index, start, group, digest.hexdigest(), last=False)
            index, start, tokens, characters, group = index + 1, row, 0, 0, []
            digest = hashlib.blake2b(digest_size=16)
        group.append(text)
        tokens += own
        characters += len(text)
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    if count is not None and row + 1 != count:
        raise ValueError(
            f"encode_to: texts must be as many as len(texts) says, {count:,}, but {row + 1:,} came; pass all of them, or an "
            "iterator of what there is"
        )
    yield _Group(index, start, group, digest.hexdigest(), last=True)


def _check_same(directory: Path, group: _Group) -> None:
    record = shards.read_record(directory, group.index)
    if (record["texts"], record["digest"]) != (len(group.texts), group.digest):
        raise ValueError(
            f"{directory}: texts {group.row} to {group.row + record['texts'] - 1} are there already, but others came in "
            f"their place ({len(group.texts)} of them); pass the same texts in the same order to go on, or another directory"
        )


class _Writer:
    """Writes a shard on a thread while the next ones are encoded; `put` waits for the one before, so that two shards are in
    memory, and leaving for the last one. Ctrl-C does not wait: what is then being written does not appear."""

    def __init__(self, directory: Path, colbert_dtype: ColbertDtype):
        self._directory = directory
        self._dtype: ColbertDtype = colbert_dtype
        self._stop = Event()
        self._writing: Future[None] | None = None

    def __enter__(self) -> "_Writer":
        return self

    def put(self, group: _Group | None, arrays: Arrays, cut: int) -> None:
        """Take the embeddings of a group's texts; None is for another process to write."""
        self._wait()
        if group is not None:
            self._writing = Future()
            # A daemon, for which a process that ends does not wait.
            Thread(target=self._write, args=(self._writing, group, arrays, cut), daemon=True).start()

    def _write(self, writing: Future[None], group: _Group, arrays: Arrays, cut: int) -> None:
        about: dict[str, Any] = {"colbert_dtype": self._dtype, "cut": cut, "digest": group.digest}
        try:
            shards.write_shard(self._directory, group.index, Embeddings(*arrays), go_on=self._go_on, **about)
        except BaseException as error:
            writing.set_exception(error)
        else:
            writing.set_result(None)

    def _go_on(self) -> None:
        if self._stop.is_set():
            raise CancelledError

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is None:
            self._wait()
        elif not isinstance(error, Exception):
            self._stop.set()
        elif self._writing is not None:
            self._writing.exception()  # waits; the error that ended the block is the one to tell


def _until(ready: Callable[[], bool]) -> None:
    while not ready():
        time.sleep(0.5)
