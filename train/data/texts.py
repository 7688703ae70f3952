"""Plain texts (JSONL, .txt or a TFDS data set) tokenised once and kept as array_record, and the batches of stage 1.
Rows of queries and passages are not here (`rows`, `builders`, `pipeline`), nor what is masked of a text: the step draws that.
"""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from m3jax import paths
from m3jax.batching import bucket_length, pad
from m3jax.tokenization import Tokenizer
from train.data.order import Order
from train.data.streams import LengthGroup, group_of_each
from train.data.tfds_sets import PREFIX, digest_of, examples, open_set, prepare_once
from train.files import came, parse_object, read_lines

_TEXTS_PER_ENCODE = 256
_SUFFIXES = (".jsonl", ".jsonl.gz", ".txt", ".txt.gz")

Lines = Callable[[], Iterator[tuple[str, str]]]  # (where it stands, the text) of each text, from the first on


class TextBatch(NamedTuple):
    """One step's texts of one length group, padded; True = real token."""

    ids: np.ndarray  # int32 [B, L]
    mask: np.ndarray  # bool [B, L]

    @property
    def sides(self) -> dict[str, tuple[int, int]]:
        """The rows and the length of what is encoded."""
        return {"texts": self.ids.shape}


def parse_text(line: bytes) -> str:
    """The text of a JSONL line {"text": str}, whose other fields are passed over; ValueError says the rule and what came."""
    row = parse_object(line)
    if "text" not in row:
        raise ValueError(f"the field `text` is required; the row has {', '.join(row) or 'none'}")
    if not (isinstance(row["text"], str) and row["text"].strip()):
        raise ValueError(f"`text` must be a non-empty str; {came(row['text'])}")
    return row["text"]


def _parse_line(line: bytes) -> str:
    try:
        return line.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"must be UTF-8; byte {error.start} is not") from None


def _of_file(path: Path) -> Iterator[tuple[str, str]]:
    parse = parse_text if ".jsonl" in path.suffixes else _parse_line
    for where, line in read_lines(path):
        try:
            yield where, parse(line)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


def _of_tfds(name: str, data_dir: Path) -> tuple[Lines, str]:
    """The texts of "tfds:NAME" and what they are known by; ValueError where there is no such set, or it has no texts."""
    builder = open_set(name, data_dir, "text")

    def lines() -> Iterator[tuple[str, str]]:
        for where, example in examples(builder, name, ["text"]):
            if not isinstance(text := example["text"], str):
                raise ValueError(f"{where}: `text` must be a str; {came(text)}")
            if text.strip():
                yield where, text

    return lines, digest_of(builder)


def _source(path: str, data_dir: Path) -> tuple[Lines, str]:
    """The texts of a path or TFDS name, and a digest of what they are."""
    if path.startswith(PREFIX):
        return _of_tfds(path, data_dir)
    files = [Path(path)]
    if Path(path).is_dir():
        files = sorted(file for file in Path(path).rglob("*") if file.name.endswith(_SUFFIXES) and file.is_file())
    if not files or not files[0].is_file():
        raise ValueError(f"{path}: no such file or folder of texts ({', '.join(_SUFFIXES)}), nor {PREFIX}NAME.")
    if wrong := [file for file in files if not file.name.endswith(_SUFFIXES)]:
        raise ValueError(f"{wrong[0]}: texts are read from {', '.join(_SUFFIXES)}; rename it or convert it.")
    digest = hashlib.blake2b(digest_size=8)
    for file in files:
        digest.update(file.suffix.encode())
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "blake2b").digest())
    return lambda: itertools.chain.from_iterable(map(_of_file, files)), digest.hexdigest()


class Texts:
    """Prepared texts by index; `len` is their number, `lengths` int32 their ids, `name` a hash of what they are."""

    def __init__(self, builders: Sequence["TextRecords"], sources: Sequence[Lines]):
        self._records: list[Any] = [builder.as_data_source(split="train") for builder in builders]  # pyright: ignore[reportCallIssue] (a wrapped method)
        self._sources = sources
        self._starts = np.cumsum([0, *map(len, self._records)])
        self.lengths = np.concatenate([np.load(builder.data_path / _LENGTHS) for builder in builders])
        self.cut = sum((builder.info.metadata or {})["cut"] for builder in builders)
        names = repr([_config(builder).name for builder in builders])
        self.name = hashlib.blake2b(names.encode(), digest_size=8).hexdigest()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def ids(self, indices: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """The ids of the texts of these indices, in their order."""
        found = []
        for index in np.asarray(indices).tolist():
            of = int(np.searchsorted(self._starts, index, side="right")) - 1
            found.append(self._records[of][index - int(self._starts[of])]["ids"])
        return found

    def places(self, indices: Sequence[int] | np.ndarray) -> list[str]:
        """Where these texts stand, path:line, in their order; the files are read again up to the last of them."""
        wanted = {int(index) for index in indices}
        lines = enumerate(where for source in self._sources for where, _ in source())
        found = {text: where for text, where in itertools.islice(lines, max(wanted) + 1) if text in wanted}
        return [found[int(index)] for index in indices]


def prepare_texts(paths: Sequence[str], tokenizer: Tokenizer, *, data_dir: Path, max_length: int) -> Texts:
    """Checks, tokenises and stores the texts of each path, unless that is done already, and warns of those that were cut.

    A path is a file `.jsonl` ({"text": str} a line) or `.txt` (a text a line), each also `.gz`, a folder that is searched for
    them, or "tfds:NAME", a data set of tensorflow_datasets with a feature `text`, whose split "train" is taken; it is prepared
    under `data_dir`, where what is stored is found again by the texts, the tokenizer and `max_length`, in ids. Blank lines are
    none. ValueError names the first bad line as path:line, and a source of no texts.
    """
    sources = [_source(path, data_dir) for path in paths]
    builders = []
    for path, (lines, digest) in zip(paths, sources, strict=True):
        whole = "\n".join((digest, tokenizer.json, str(max_length)))
        name = hashlib.blake2b(whole.encode(), digest_size=8).hexdigest()
        config = _Config(name=name, lines=lines, tokenizer=tokenizer, max_length=max_length)
        builder = TextRecords(data_dir=data_dir, config=config, file_format="array_record")
        if not builder.data_path.exists():
            if next(lines(), None) is None:  # a bad line stops TFDS, which leaves nothing behind
                raise ValueError(f"{path}: holds no texts")
            tfds.disable_progress_bar()
            with contextlib.redirect_stdout(io.StringIO()):  # as in builders.prepare
                prepare_once(builder)
            # Made again: a builder reads what is known of its texts when it is made.
            builder = TextRecords(data_dir=data_dir, config=config, file_format="array_record")
        builders.append(builder)
    texts = Texts(builders, [lines for lines, _ in sources])
    if texts.cut:
        warnings.warn(
            f"{texts.cut} of {len(texts)} texts were cut to {max_length} token ids. Raise passage_max_length to keep them "
            "whole.",
            stacklevel=2,
        )
    return texts


_LENGTHS = "lengths.npy"


@dataclasses.dataclass(eq=False, kw_only=True)
class _Config(tfds.core.BuilderConfig):
    lines: Lines = dataclasses.field(repr=False)
    tokenizer: Tokenizer
    max_length: int


class TextRecords(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Texts as token ids; VERSION changes with the record's layout."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # as in builders.Rows

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"ids": tfds.features.Tensor(shape=(None,), dtype=np.int32)})
        return tfds.core.DatasetInfo(
            builder=self, features=features, metadata=tfds.core.MetadataDict(), disable_shuffling=True
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        config, lengths, cut = _config(self), [], 0
        texts = (text for _, text in config.lines())
        with tqdm(desc="tokenising", unit=" texts", disable=None) as progress:
            while chunk := list(itertools.islice(texts, _TEXTS_PER_ENCODE)):
                encoded, more = config.tokenizer.encode(chunk, config.max_length)
                cut += more
                for ids in encoded:
                    lengths.append(len(ids))
                    yield len(lengths) - 1, {"ids": ids}
                progress.update(len(chunk))
        assert self.info.metadata is not None
        self.info.metadata["cut"] = cut
        paths.write_array(Path(self.data_path / _LENGTHS), np.array(lengths, np.int32))


def _config(builder: TextRecords) -> _Config:
    config = builder.builder_config
    assert isinstance(config, _Config)
    return config


class TextBatches:
    """Step → `TextBatch`, by index, a pure function of (seed, step): `prefetch` reads ahead in it.

    A batch is of one length group; texts too few for a batch of theirs go with the next longer group. All texts of a length
    group come once in an epoch of it (`order`), and its batches have one length, that of its longest text in `bucket_length`
    and a multiple of `step`. Of the `parts` equal parts of a batch's rows, one after another, come those numbered in `held`.
    ValueError for texts that no group takes, and for too few texts for a batch of the last one.
    """

    def __init__(
        self,
        texts: Texts,
        *,
        seed: int,
        groups: Sequence[LengthGroup],
        pad_id: int,
        step: int = 1,
        held: Sequence[int] = (0,),
        parts: int = 1,
    ):
        self._texts, self._pad_id, self._held, self.parts = texts, pad_id, list(held), parts
        group_of = group_of_each(texts.lengths, groups)
        streams = [(group, np.flatnonzero(group_of == number)) for number, group in enumerate(groups)]
        self._streams = [(group, members) for group, members in streams if len(members)]
        self._lengths = [
            -(-min(bucket_length(int(texts.lengths[members].max())), group.max_length) // step) * step
            for group, members in self._streams
        ]
        self._order = Order(
            seed, [len(members) for _, members in self._streams], [group.batch_size for group, _ in self._streams]
        )

    def places(self, step: int) -> tuple[LengthGroup, list[str]]:
        """The length group of a step's batch, and where its texts stand in their files, in the batch's order."""
        draw = self._order.draw(step)
        group, members = self._streams[draw.stream]
        return group, self._texts.places(members[draw.places])

    def __getitem__(self, step: int) -> TextBatch:
        draw = self._order.draw(step)
        everyone = self._streams[draw.stream][1][draw.places]
        mine = everyone.reshape(self.parts, -1)[self._held].ravel()
        return TextBatch(*pad(self._texts.ids(mine), len(mine), self._lengths[draw.stream], self._pad_id))
