"""Fixtures that more than one test file needs; what only one needs stands in that file."""

import atexit
import json
import math
import os
import shutil
import sys
import tempfile
import unicodedata
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

# Before anything imports JAX: no test writes into the user's cache folder (nor matplotlib its fonts). What takes XLA long is
# compiled once for all tests and for the processes that they start: most compile the same few programs.
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers have what the first process has
    os.environ["XDG_CACHE_HOME"] = os.environ["MPLCONFIGDIR"] = tempfile.mkdtemp(prefix="m3jax-tests-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "1"
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(os.environ["XDG_CACHE_HOME"], "compiled")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import pytest
import tokenizers
from jaxtyping import install_import_hook
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

if TYPE_CHECKING:
    from collections.abc import Iterator

    from m3jax.model import M3
    from m3jax.tokenization import Tokenizer

# Every call of the mathematics is checked against the shapes in its signature; before anything imports it.
_MATHEMATICS = ("attention", "heads", "kernels", "losses", "model", "retromae", "scores", "xlm_roberta")
install_import_hook([f"m3jax.{name}" for name in _MATHEMATICS], "beartype.beartype")

LINES = [
    "the quick brown fox jumps over a lazy dog and the small cat sees a red house near the old river",
    "what is the capital of france paris is the capital of france where does the fox live in the forest of stories",
    "der schnelle braune fuchs springt la ville de paris est belle",
    "東京 は 日本 の 首都 です Москва столица России",
]


_WORDS = [f"▁{word}" for line in LINES for word in unicodedata.normalize("NFKC", line).split()]


def _pieces() -> Counter[str]:
    """Every character of the words, and the two to six in a row that come at least three times, with how often they come."""
    found = Counter(
        word[i:j] for word in _WORDS for i in range(len(word)) for j in range(i + 1, min(i + 6, len(word)) + 1)
    )
    return Counter({piece: count for piece, count in found.items() if len(piece) == 1 or count >= 3})


@pytest.fixture(scope="session")
def tiny_tokenizer_json() -> str:
    """A tokenizer.json shaped as XLM-R's: ids 0 <s>, 1 <pad>, 2 </s>, 3 <unk>, <mask> last; unigram, Metaspace."""
    # Made by hand: UnigramTrainer gives other pieces in each process, and so other ids, lengths and numbers.
    pieces = [(sign, 0.0) for sign in ("<s>", "<pad>", "</s>", "<unk>")]
    counts = _pieces()
    pieces += [(piece, math.log(count / counts.total())) for piece, count in sorted(counts.items())]
    inner = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=3))
    inner.normalizer = normalizers.NFKC()
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    inner.decoder = decoders.Metaspace()
    inner.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>"])
    inner.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True, special=True)])
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return inner.to_str()


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_tokenizer_json: str) -> "Tokenizer":
    """The `Tokenizer` of `tiny_tokenizer_json`, 90 ids."""
    from m3jax.tokenization import Tokenizer  # here, as in all tests, after the hook

    return Tokenizer.from_json(tiny_tokenizer_json)


@pytest.fixture
def tiny_model(tiny_tokenizer: "Tokenizer") -> "M3":
    """A tiny model of random weights."""
    import jax

    import m3jax

    config = m3jax.M3Config.tiny(vocab_size=tiny_tokenizer.vocab_size)
    return m3jax.M3(config, m3jax.init(config, jax.random.key(0)), tiny_tokenizer)


@pytest.fixture(scope="module")
def compiled_quickly():
    """For a file of which XLA's optimisations would take half the time, and that asks for nothing they could change."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


_CORPUS = [
    {"id": "p1", "title": "Paris", "text": "is the capital of france"},
    {"id": "p2", "title": "", "text": "the quick brown fox"},
    {"id": "p3", "text": "東京 は 日本 の 首都 です"},
]
_QUERIES = [
    {"id": "q1", "text": "capital of france"},
    {"id": "q2", "text": "fox"},
    {"id": "q3", "text": "nobody judged this"},
    {"id": "q4", "text": "judged, nothing relevant"},
]
_QRELS = [
    {"qid": "q2", "docid": "p2", "relevance": 2},
    {"qid": "q1", "docid": "p1", "relevance": 1},
    {"qid": "q1", "docid": "p3", "relevance": 0},
    {"qid": "q4", "docid": "p2", "relevance": 0},
]
_FILES = {"corpus.jsonl": _CORPUS, "test_queries.jsonl": _QUERIES, "test_qrels.jsonl": _QRELS}


@pytest.fixture
def task_folder(tmp_path):
    """The demonstration task as the three files of a folder."""
    folder = tmp_path / "demo"
    folder.mkdir()
    for name, rows in _FILES.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / name).write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def small_data(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_json: str) -> Path:
    """A folder with the rows, evaluation sets and tokenizer of a run that takes seconds (small_run.py)."""
    from tests.small_run import write_set

    directory = tmp_path_factory.mktemp("data")
    write_set(directory, tiny_tokenizer_json)
    return directory


@contextmanager
def command_line(arguments: list[str]) -> "Iterator[None]":
    """With these as sys.argv, where ml_collections looks for the keys that are changed.

    It defines a flag for each of them, which the next command line of this process would find defined.
    """
    from absl import flags

    before = {*flags.FLAGS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        yield
    for name in {*flags.FLAGS} - before:
        delattr(flags.FLAGS, name)
