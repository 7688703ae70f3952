"""Shards of embeddings: what is written comes back, rows are read as NumPy would give them, and searching stays small."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from scipy.sparse import random as random_sparse

import m3jax
from m3jax import shards
from m3jax.embeddings import Embeddings

ROOT = Path(__file__).parents[1]
COUNTS = [5, 1, 7, 4]


def unit(rng, *shape):
    vectors = rng.normal(size=shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def rows(count=17, seed=0, width=16):
    rng = np.random.default_rng(seed)
    terms = random_sparse(count, 50, 0.2, "csr", np.float32, rng=rng)
    terms.data += np.float32(0.01)
    terms.sort_indices()
    return Embeddings(
        dense=unit(rng, count, width),
        terms=csr_matrix(terms),
        colbert=[unit(rng, int(n), width) for n in rng.integers(1, 9, count)],
    )


def write(directory, embeddings, counts=COUNTS, colbert_dtype="float32"):
    directory.mkdir(exist_ok=True)
    shards.write_json(directory / shards.SETTINGS, {"format": shards.FORMAT, "model": {}})
    start = 0
    for index, count in enumerate(counts):
        part = embeddings[start : start + count]
        shards.write_shard(directory, index, part, colbert_dtype=colbert_dtype, cut=0, digest="")
        start += count
    shards.finish(directory)
    return directory


def copy(directory, of, to, name):
    """The array of one shard in place of another's."""
    shutil.copy(directory / f"shard-{of:08d}" / f"{name}.npy", directory / f"shard-{to:08d}")


@pytest.fixture(scope="module")
def memory():
    return rows()


@pytest.fixture(scope="module")
def disk(memory, tmp_path_factory):
    return m3jax.open_embeddings(write(tmp_path_factory.mktemp("shards") / "all", memory))


INDICES = {
    "in one shard": slice(0, 3), "over three": slice(4, 14), "all": slice(None), "none": slice(9, 9), "step": slice(1, 16, 3),
    "backwards": slice(None, None, -1), "unordered": [16, 0, 5, 6, 0, 12], "negative": np.array([-1, 3, -17]),
    "mask": np.arange(17) % 3 == 1,
}  # fmt: skip


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_rows_are_those_of_numpy(memory, disk, index):
    np.testing.assert_array_equal(disk.dense_vecs[index], memory.dense[index])
    np.testing.assert_array_equal(disk.sparse[index].toarray(), memory.terms[index].toarray())
    got, expected = disk[index], memory[index]
    assert got.dense.tobytes() == expected.dense.tobytes() and got.lexical_weights == expected.lexical_weights
    assert [x.tolist() for x in got.colbert_vecs] == [x.tolist() for x in expected.colbert_vecs]


@pytest.mark.parametrize("row", [0, 4, 5, 6, 16, -1, -17, np.int64(7)])
def test_one_row(memory, disk, row):
    assert disk.dense_vecs[row].tolist() == memory.dense[row].tolist()
    assert disk.sparse[row].toarray().tolist() == memory.terms[[row]].toarray().tolist()
    assert disk.colbert_vecs[row].tolist() == memory.colbert[row].tolist()
    one = disk[row]
    assert one.single and one.lexical_weights == memory[row].lexical_weights


@pytest.mark.parametrize(
    ("index", "message"),
    [((3, 5), "got \\(3, 5\\)"), ([1.7], "got \\[1.7\\]"), ([[1, 2]], "got"), (None, "got None"), ((slice(3), 2), "columns"),
     (np.array([True, False]), "a mask must have one value for each of 17 rows, got 2")],
)  # fmt: skip
def test_what_is_no_row_is_refused(disk, index, message):
    for part in (disk.dense_vecs, disk.sparse):
        with pytest.raises(IndexError, match=message):
            part[index]


def test_past_the_end_and_iteration(memory, disk):
    for part in (disk, disk.dense_vecs, disk.sparse, disk.colbert_vecs):
        assert len(part) == 17
        for row in (17, -18):
            with pytest.raises(IndexError):
                part[row]
    for part in (disk.dense_vecs, disk.sparse):
        with pytest.raises(IndexError, match="rows go from 0 to 16, got 3 to 17"):
            part[[3, 17]]
    assert [x.tolist() for x in disk.dense_vecs] == memory.dense.tolist()
    assert [x.shape for x in disk.colbert_vecs] == [x.shape for x in memory.colbert]
    assert [one.lexical_weights for one in disk] == memory.lexical_weights == disk.lexical_weights
    np.testing.assert_array_equal(np.asarray(disk.dense_vecs), memory.dense)
    assert repr(disk) == repr(memory) == "Embeddings(17 texts: dense 16, sparse 50, colbert 16)"


@pytest.mark.parametrize("by", ["dense", "sparse", "dense+sparse", "colbert", "all"])
def test_search_is_that_in_memory(memory, disk, by):
    queries = rows(4, seed=1)
    for mine, theirs in ((queries, queries), (memory, disk)):
        expected, got = m3jax.search(mine, memory, by=by, k=9), m3jax.search(theirs, disk, by=by, k=9)
        np.testing.assert_array_equal(got.indices, expected.indices)
        np.testing.assert_array_equal(got.scores, expected.scores)


def test_scores_are_those_in_memory(memory, disk):
    for pairwise in (False, True):  # with both sides on disk
        got, expected = (m3jax.score(side, side, pairwise=pairwise) for side in (disk, memory))
        for name in ("dense", "sparse", "colbert", "hybrid"):
            np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))


@pytest.mark.parametrize("width", [16, 1024])
def test_colbert_in_fewer_bits(tmp_path, width):
    """Within what the documentation says, number by number; its measured errors are of width 1024."""
    memory = rows(40, width=width)
    for dtype in ("float16", "int8"):
        disk = m3jax.open_embeddings(write(tmp_path / dtype, memory, [25, 15], dtype))
        differences = []
        for stored, vectors in zip(disk.colbert_vecs, memory.colbert, strict=True):
            assert stored.dtype == np.float32
            most = (
                np.abs(vectors) * 2.0**-11 + 2.0**-25 if dtype == "float16" else np.abs(vectors).max(1)[:, None] / 254
            )
            assert (np.abs(stored - vectors) <= most * 1.0001).all()
            differences.append(stored - vectors)
        assert max(np.abs(x).max() for x in differences) > 1e-6  # it is stored in fewer bits
        expected = m3jax.score(memory, memory, weights=(0, 0, 1)).colbert
        got = m3jax.score(memory, disk, weights=(0, 0, 1)).colbert
        largest = np.abs(got - expected).max()
        print(dtype, width, largest)
        assert largest < {"float16": 3e-4, "int8": 6e-3}[dtype]


def test_a_vector_of_zeros_has_a_scale():
    with np.errstate(all="raise"):
        stored, scales = shards.quantise(np.zeros((1, 3), np.float32))
    assert stored.tolist() == [[0, 0, 0]] and scales.tolist() == [0]


def test_a_part_alone(tmp_path):
    memory = rows()
    for name in ("dense", "terms", "colbert"):
        disk = m3jax.open_embeddings(write(tmp_path / name, Embeddings(**{name: getattr(memory, name)})))
        assert len(disk) == 17 and [f for f in ("dense", "terms", "colbert") if getattr(disk, f) is not None] == [name]


def test_the_files_are_plain_numpy(memory, tmp_path):
    shard = write(tmp_path / "x", memory, colbert_dtype="int8") / "shard-00000002"
    names = ["colbert", "colbert_indptr", "colbert_scales", "dense", "sparse_data", "sparse_indices", "sparse_indptr"]
    assert sorted(p.name for p in shard.iterdir()) == sorted([f"{name}.npy" for name in names] + ["shard.json"])
    arrays = {name: np.load(shard / f"{name}.npy") for name in names}
    np.testing.assert_array_equal(arrays["dense"], memory.dense[6:13])
    terms = csr_matrix(tuple(arrays[f"sparse_{x}"] for x in ("data", "indices", "indptr")), shape=(7, 50))
    np.testing.assert_array_equal(terms.toarray(), memory.terms[6:13].toarray())
    some = slice(*arrays["colbert_indptr"][3:5])
    np.testing.assert_allclose(
        arrays["colbert"][some] * arrays["colbert_scales"][some, None], memory.colbert[9], atol=4e-3
    )


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda d: (d / "finished.json").unlink(), "not finished: 4 shards are there; call encode_to again"),
        (lambda d: (d / "settings.json").unlink(), "expected a directory that m3jax.encode_to wrote"),
        (lambda d: (d / "shard-00000001").rename(d / "x"), "1 are not there, shard-00000001 first; copy the directory"),
        (lambda d: (d / "finished.json").write_text('{"texts": 3'), "finished.json: expected a JSON object"),
        (lambda d: (d / "settings.json").write_text('{"format": "m3jax embeddings 2"}'), "the format must be 'm3jax"),
        (
            lambda d: os.truncate(d / "shard-00000001" / "dense.npy", 150),
            r"dense.npy: expected the array that encode_to",
        ),
        (
            lambda d: (d / "shard-00000003" / "sparse_indptr.npy").unlink(),
            r"shard-00000003.sparse_indptr.npy: expected the array that encode_to wrote \(it is not there\)",
        ),
        (lambda d: (d / "finished.json").write_text('{"parts": {}, "cut": 0}'), "finished.json: .*no texts, shards"),
        (lambda d: (d / "settings.json").write_text("{}"), "settings.json: .*no format"),
        (lambda d: (d / "settings.json").write_text(json.dumps({"format": shards.FORMAT, "model": 3})), "no model"),
        (
            lambda d: (d / "finished.json").write_text('{"texts": 3, "parts": [], "cut": 0, "shards": 5}'),
            "parts, shards",
        ),
        (lambda d: copy(d, 0, 1, "dense"), r"00001.dense.npy: .*must have the shape \(1, 16\), but has \(5, 16\)"),
        (lambda d: np.save(d / "shard-00000000" / "dense.npy", np.zeros((5, 8), np.float32)), r"but has \(5, 8\)"),
    ],
)
def test_what_is_not_whole_is_refused(tmp_path, memory, break_it, message):
    directory = write(tmp_path / "x", memory)
    break_it(directory)
    with pytest.raises(ValueError, match=message):
        m3jax.open_embeddings(directory).dense_vecs[:]


@pytest.mark.parametrize("name", ["sparse_indptr", "sparse_data", "sparse_indices", "colbert", "colbert_indptr"])
def test_an_array_of_another_shard_is_refused(tmp_path, memory, name):
    directory = write(tmp_path / "x", memory)
    copy(directory, 3, 0, name)
    found = m3jax.open_embeddings(directory)
    with pytest.raises(ValueError, match=rf"shard-00000000.{name.split('_')[0]}.*.npy: .*must have the shape"):
        found[:3].sparse if name.startswith("sparse") else found.colbert_vecs[0]


def test_a_url_is_refused():
    with pytest.raises(ValueError, match="directory must be on a file system, got gs://bucket/x; copy it to a disk"):
        m3jax.open_embeddings("gs://bucket/x")


def test_a_record_that_is_not_whole_is_refused(tmp_path, memory):
    directory = write(tmp_path / "x", memory)
    (directory / "shard-00000002" / "shard.json").write_text('{"texts": 3}')
    with pytest.raises(ValueError, match=r"shard-00000002.shard.json: .*no parts, cut, digest"):
        shards.summary(directory)


def test_a_shard_is_never_half_there(tmp_path, memory, monkeypatch):
    save, saved = np.save, []

    def full(file, array):
        saved.append(file)
        if len(saved) == 3:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        save(file, array)

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(ValueError, match=r"make room and call encode_to again .* \(.*No space"):
        shards.write_shard(tmp_path, 0, memory, colbert_dtype="int8", cut=0, digest="")
    assert list(tmp_path.iterdir()) == []
    shards.write_shard(tmp_path, 0, memory, colbert_dtype="int8", cut=0, digest="")
    with pytest.raises(ValueError, match=r"shard-00000000 cannot be written .*; does another run write here"):
        shards.write_shard(tmp_path, 0, memory, colbert_dtype="int8", cut=0, digest="")
    assert [path.name for path in tmp_path.iterdir()] == ["shard-00000000"]


@pytest.mark.parametrize("room", [300, 1000])
def test_a_file_that_the_disk_cuts_short_is_an_error(tmp_path, memory, room):
    """Also where the system takes less than NumPy's own writing would notice."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(ValueError, match=r"shard-00000000 takes .* make room and call .* \(.*File too large"):
            shards.write_shard(tmp_path, 0, memory, colbert_dtype="int8", cut=0, digest="")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


SEARCH = """
import json, sys, threading
import numpy as np
import m3jax
from m3jax.embeddings import Embeddings

def resident():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon"))

def run(dense, tokens):
    dense, tokens = m3jax.open_embeddings(dense), m3jax.open_embeddings(tokens)
    found = m3jax.search(Embeddings(np.eye(1, 256, dtype=np.float32)), dense, k=3)
    scores = m3jax.score(Embeddings(colbert=[np.eye(2, 256, dtype=np.float32)]), tokens, weights=(0, 0, 1))
    return found.indices.tolist(), scores.colbert.shape

small, *large = sys.argv[1:]
run(small, small)  # what compiling and threads take is not the corpus's
before, peak, ended = resident(), 0, threading.Event()

def watch():
    global peak
    while not ended.wait(0.001):
        peak = max(peak, resident())

thread = threading.Thread(target=watch)
thread.start()
given = run(*large)
ended.set()
thread.join()
print(json.dumps([*given, max(peak, before) - before]))
"""


# Mapped pages are what is measured: of these no portable counter tells. Never skipped on Linux, as in CI.
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads a process's memory from Linux's /proc")
def test_searching_takes_the_memory_of_a_block(tmp_path):
    """670 MB of dense vectors and 600 MB of colbert's in float32, of which some blocks of 8 MB are in memory."""
    rng = np.random.default_rng(0)
    vectors = unit(rng, 8192, 256)
    write(tmp_path / "small", Embeddings(dense=vectors[:8], colbert=[vectors[:9]] * 8), [8], "int8")
    write(tmp_path / "dense", Embeddings(dense=vectors), [8192])
    write(
        tmp_path / "colbert", Embeddings(colbert=[vectors[start : start + 100] for start in range(500)]), [500], "int8"
    )
    for name, count in (("dense", 80), ("colbert", 12)):
        for index in range(1, count):  # the other shards are the same files by other names
            os.makedirs(tmp_path / name / f"shard-{index:08d}")
            for path in (tmp_path / name / "shard-00000000").iterdir():
                os.link(path, tmp_path / name / f"shard-{index:08d}" / path.name)
        shards.finish(tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-c", SEARCH, *(str(tmp_path / name) for name in ("small", "dense", "colbert"))],
        capture_output=True, text=True, timeout=600, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found, shape, more = json.loads(done.stdout)
    assert found == [[found[0][0] + shard * 8192 for shard in range(3)]]  # the best row, of the first shards
    assert shape == [1, 6000]
    assert more < 240e6  # about 110e6; a busy machine returns what threads hold later
