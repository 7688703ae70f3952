"""`python -m convert verify`: models that are alike pass, one that is not fails by the function that it differs in."""

import json
import re
import shutil

import fsspec
import jax
import numpy as np
import pytest
import safetensors.numpy
from scipy.sparse import csr_matrix

import m3jax
from convert import reference, texts, verify
from convert.__main__ import main
from m3jax import checkpoint, pickles, weights
from m3jax.config import M3Config
from m3jax.embeddings import Embeddings
from m3jax.model import M3, flatten, shapes, unflatten
from m3jax.tokenization import Tokenizer

NAMES = ("dense 1 − cosine", "dense absolute", "sparse absolute", "colbert 1 − cosine")


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_json):
    """The tiny tokenizer with every character of the default texts in its vocabulary."""
    content = json.loads(tiny_tokenizer_json)
    vocabulary = content["model"]["vocab"]
    known = {piece for piece, _ in vocabulary}
    vocabulary += [[c, -9.0] for c in sorted(set("".join(texts.SENTENCES))) if c not in known]
    mask = next(token for token in content["added_tokens"] if token["content"] == "<mask>")
    mask["id"] = len(vocabulary)
    return Tokenizer.from_json(json.dumps(content))


@pytest.fixture(scope="module")
def released(tokenizer, tmp_path_factory):
    """A released directory whose attention is not flat and about half of whose token weights are positive."""
    config = M3Config.tiny(vocab_size=tokenizer.vocab_size, hidden_size=32, colbert_dim=8, max_position_embeddings=100)
    rng = np.random.default_rng(0)
    params = {}
    for path, x in flatten(shapes(config)).items():
        spread = 1.5 * x.shape[0] ** -0.5 if path.endswith("kernel") else 0.3
        noise = rng.normal(size=x.shape).astype(np.float32) * np.float32(spread)
        params[path] = 1 + noise if path.endswith("scale") else noise
    directory = tmp_path_factory.mktemp("released") / "model"
    weights.write(M3(config, unflatten(params), tokenizer), directory)
    return directory


def verified(capsys, *arguments):
    """(exit status, {function: (largest difference, whether it is past tolerance)}, all that was printed)."""
    status = 0
    try:
        main(["verify", *map(str, arguments)])
    except SystemExit as end:
        status = end.code
    text = capsys.readouterr().out
    found = re.findall(rf"^({'|'.join(NAMES)}) +(\S+)(.*)$", text, re.MULTILINE)
    return status, {name: (float(value), "PAST IT" in rest) for name, value, rest in found}, text


def test_torch_and_m3jax_are_alike(released, capsys):
    status, found, text = verified(capsys, released, released, "--a-with", "torch", "--b-with", "m3jax")
    assert status == 0 and text.endswith("alike within tolerance\n"), text
    assert list(found) == list(NAMES) and not any(past for _, past in found.values())
    assert 0 < found["dense absolute"][0] < 1e-5  # two computations, not one
    assert f"A: {released}, run by PyTorch" in text and f"B: {released}, run by m3jax" in text
    assert "37 texts, cut to 98 tokens" in text


def test_by_default_torch_runs_released_directories(released, tmp_path, capsys, monkeypatch):
    pytest.importorskip("orbax.checkpoint", reason="Orbax checkpoints need the train extra")
    main(["from-pytorch", str(released), str(tmp_path / "orbax")])
    status, _, text = verified(capsys, released, tmp_path / "orbax", "--max-length", 20)
    assert status == 0 and "model, run by PyTorch" in text and "orbax, run by m3jax" in text
    with pytest.raises(SystemExit, match=r"error: .*PyTorch does not read Orbax"):
        main(["verify", str(released), str(tmp_path / "orbax"), "--b-with", "torch"])
    monkeypatch.setattr(reference, "find_spec", lambda name: None)
    _, _, text = verified(capsys, released, tmp_path / "orbax", "--max-length", 20)
    assert "model, run by m3jax" in text
    with pytest.raises(SystemExit, match="error: the PyTorch side needs torch"):
        main(["verify", str(released), str(released), "--a-with", "torch"])


def ours(released, other):
    """Arguments that compare two directories by m3jax, on texts short enough to be quick."""
    return released, other, "--a-with", "m3jax", "--b-with", "m3jax", "--max-length", 20


def changed(released, folder, file, name, change):
    """A copy of the released directory with one tensor changed."""
    directory = shutil.copytree(released, folder / "changed")
    path = directory / file
    tensors = pickles.read(path) if path.suffix == ".pt" else safetensors.numpy.load_file(path)
    tensors = {k: np.ascontiguousarray(change(x) if k == name else x) for k, x in tensors.items()}
    if path.suffix == ".pt":
        path.unlink()
        pickles.write(path, tensors)
    else:
        safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize(
    ("file", "name", "past"),
    [
        ("sparse_linear.pt", "bias", {"sparse absolute"}),
        ("colbert_linear.pt", "weight", {"colbert 1 − cosine"}),
        ("model.safetensors", "encoder.layer.1.output.LayerNorm.bias", set(NAMES) - {"dense absolute"}),
        ("model.safetensors", "pooler.dense.bias", set()),  # which M3 does not use
    ],
)
def test_the_function_that_differs_fails(released, tmp_path, capsys, file, name, past):
    other = changed(released, tmp_path, file, name, lambda x: x + 0.01 * np.cos(np.arange(x.size)).reshape(x.shape))
    other = changed(released, tmp_path / "2", file, name, lambda x: np.float32(x + 0.01)) if name == "bias" else other
    status, found, text = verified(capsys, *ours(released, other))
    assert {name for name, (_, is_past) in found.items() if is_past} == past
    assert status == bool(past)
    assert text.endswith(f"{len(past)} past tolerance\n" if past else "alike within tolerance\n")


def test_what_torch_would_make_up_is_an_error(released, tmp_path):
    """transformers draws a missing tensor at random and says so in a log only."""
    other = shutil.copytree(released, tmp_path / "other")
    tensors = safetensors.numpy.load_file(other / "model.safetensors")
    del tensors["encoder.layer.0.output.dense.bias"]
    tensors["something.weight"] = np.zeros(3, np.float32)
    safetensors.numpy.save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        SystemExit, match=r"(?s)error: .*missing: encoder\.layer\.0\.output\.dense\.bias.*something"
    ) as end:
        main(["verify", str(other), str(released), "--a-with", "torch"])
    assert "pooler" not in str(end.value)
    shutil.copy(released / "model.safetensors", other / "model.safetensors")
    (other / "sparse_linear.pt").unlink()
    with pytest.raises(SystemExit, match=r"error: .*sparse_linear\.pt is not there"):
        main(["verify", str(other), str(released), "--a-with", "torch"])


def test_models_that_cannot_be_compared(released, tokenizer, tmp_path):
    m3 = M3(*weights.read(released))
    content = json.loads(tokenizer.json)
    content["model"]["vocab"] = [[piece, -99.0 if len(piece) > 2 else x] for piece, x in content["model"]["vocab"]]
    weights.write(M3(m3.config, m3.params, Tokenizer.from_json(json.dumps(content))), tmp_path / "tokens")
    with pytest.raises(SystemExit, match=r"error: A and B must read the same tokens, .* texts differ in their number"):
        main(["verify", *map(str, ours(released, tmp_path / "tokens")), "--max-length", "98"])
    config = M3Config.tiny(vocab_size=tokenizer.vocab_size, hidden_size=32, colbert_dim=4)
    params = jax.tree.map(lambda x: np.full(x.shape, 0.1, np.float32), shapes(config))
    weights.write(M3(config, params, tokenizer), tmp_path / "narrow")
    with pytest.raises(SystemExit, match=r"error: .* widths of the colbert vectors are 8 and 4"):
        main(["verify", *map(str, ours(released, tmp_path / "narrow"))])


def test_texts_of_a_file(released, tmp_path, capsys):
    file = tmp_path / "texts.txt"
    file.write_text("the quick brown fox\n\nParis est belle\n", encoding="utf-8")
    _, _, text = verified(capsys, *ours(released, released), "--texts", file)
    assert "3 texts, cut to 20 tokens" in text
    for content, message in ((b"", "the file is empty"), (b"\xff\xfe", "texts are UTF-8")):
        file.write_bytes(content)
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            main(["verify", *map(str, ours(released, released)), "--texts", str(file)])
    with pytest.raises(SystemExit, match=r"error: .*nothing"):
        main(["verify", *map(str, ours(released, released)), "--texts", str(tmp_path / "nothing")])
    fsspec.filesystem("memory").pipe_file("/texts.txt", "Paris\nрека\n".encode())
    _, _, text = verified(capsys, *ours(released, released), "--texts", "memory://texts.txt")
    assert "2 texts, cut to 20 tokens" in text


@pytest.mark.parametrize("length", [1, 99, 512])
def test_lengths_that_no_model_reads(released, length):
    with pytest.raises(SystemExit, match=f"error: --max-length .*2 to 98 tokens, got {length}"):
        main(["verify", str(released), str(released), "--max-length", str(length)])


@pytest.mark.parametrize(("arguments", "count"), [("", 0), ("a", 1), ("a b c", 3), ("a b --published c", 2)])
def test_numbers_of_models(arguments, count):
    with pytest.raises(SystemExit, match=f"error: verify takes two models, or --published .* got {count} models"):
        main(["verify", *arguments.split()])


def test_default_texts_fill_every_length(tokenizer):
    for length in (98, 512, 8192):
        given = texts.default_texts(length)
        assert len(given) == len(set(given)) == 24 + 7 + 6
        counts = [len(ids) for ids in tokenizer.encode(given)[0]]
        assert [len(text.split()) for text in given[-6:]] == [length // 8, length // 2, length] * 2
        assert sum(count >= length for count in counts) >= 2 and min(counts) == 2


def test_differences_by_a_loop():
    rng = np.random.default_rng(0)

    def answers(noise):
        base = np.random.default_rng(1)

        def draw(*shape):
            return base.normal(size=shape) + noise * rng.normal(size=shape)

        terms = np.maximum(draw(5, 30), 0) * (base.random((5, 30)) < 0.3)
        colbert = [np.float32(draw(n, 6)) for n in (3, 1, 4, 2, 5)]
        return Embeddings(dense=np.float32(draw(5, 8)), terms=csr_matrix(np.float32(terms)), colbert=colbert)

    a, b = answers(0), answers(0.01)

    def beyond(x, y):
        x, y = np.float64(x), np.float64(y)
        return 1 - x @ y / (x @ x) ** 0.5 / (y @ y) ** 0.5

    expected = [
        [beyond(x, y) for x, y in zip(a.dense, b.dense, strict=True)],
        [max(abs(x - y)) for x, y in zip(a.dense, b.dense, strict=True)],
        [
            max(abs(x.get(term, 0) - y.get(term, 0)) for term in x | y)
            for x, y in zip(a.lexical_weights, b.lexical_weights, strict=True)
        ],
        [max(map(beyond, x, y)) for x, y in zip(a.colbert, b.colbert, strict=True)],
    ]
    for found in (verify.compare(a, b), verify.compare(b, a)):
        for one, values in zip(found, expected, strict=True):
            assert one.largest == pytest.approx(max(values)) and one.text == int(np.argmax(values))
            assert one.passes == (one.tolerance is None)
    assert all(one.passes and one.largest < 1e-7 for one in verify.compare(a, a))


def test_nan_is_past_every_tolerance():
    assert not verify.Difference("dense", float("nan"), 0, 1.0).passes


@pytest.mark.parametrize(
    "option", [("--texts", "/no/such"), ("--max-length", "3"), ("--a-with", "torch"), ("--b-with", "torch")]
)
def test_published_scores_take_no_other_option(released, option):
    with pytest.raises(
        SystemExit, match=f"error: --published runs texts of its own; {option[0]} are for two models, leave them out"
    ):
        main(["verify", "--published", str(released), *option])


def test_a_url_is_called_by_its_name(released, capsys):
    fsspec.filesystem("memory").put(str(released), "/verified", recursive=True)
    status, _, text = verified(capsys, *ours("memory://verified", released))
    assert status == 0 and "A: memory://verified, run by m3jax" in text


def test_a_model_that_is_not_the_published_one(released, capsys):
    status, _, text = verified(capsys, "--published", released)
    assert status == 1 and len(text.splitlines()) == 9
    assert "dense   (q0, p0)  published 0.6265  here " in text and "PAST IT" in text
    assert re.search(r"^[1-8] of 8 past tolerance$", text, re.MULTILINE)


@pytest.fixture
def as_published(monkeypatch):
    """as_published(changes): a model whose scores are the published ones but for those changes stands in for all models."""

    def use(**changes):
        s = {"dense": 0.6265, "sparse": 0.19554901, "colbert": 0.4620, "shared": 0.0} | changes

        def unit(*x):
            return np.float32([*x, (1 - sum(y * y for y in x)) ** 0.5])

        dense = [unit(1, 0, 0), unit(0, 1, 0), unit(s["dense"], 0.3499, 0), unit(0.3477, 0.678, 0)]
        terms = np.float32([[1, s["shared"]], [0, 1], [s["sparse"], 0], [0, 0]])
        colbert = [[unit(1, 0)], [unit(0, 1)], [unit(0, 1), unit(0.7797, 0)], [unit(s["colbert"], 0)]]
        answer = Embeddings(
            dense=np.stack(dense), terms=csr_matrix(terms), colbert=[np.stack(vectors) for vectors in colbert]
        )
        monkeypatch.setattr(m3jax, "load", lambda directory, dtype: None)
        monkeypatch.setattr(m3jax, "encode", lambda m3, texts, colbert: answer)

    return use


def test_the_published_scores_pass(as_published, capsys):
    as_published()
    status, _, text = verified(capsys, "--published", "BAAI/bge-m3")
    assert status == 0 and text.endswith("as published, within tolerance\n") and len(text.splitlines()) == 9
    as_published(dense=0.6260, sparse=0.1953, colbert=0.4614)  # as another precision gives them
    assert verified(capsys, "--published", "BAAI/bge-m3")[0] == 0


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"dense": 0.629}, "dense   (q0, p0)"), ({"sparse": 0.2}, "sparse  (q0, p0)"),
        ({"shared": 1e-4}, "sparse  (q0, q1)"), ({"colbert": 0.46}, "colbert (q0, p1)"),
    ],
)  # fmt: skip
def test_each_published_score_counts(as_published, capsys, change, line):
    as_published(**change)
    status, _, text = verified(capsys, "--published", "BAAI/bge-m3")
    assert status == 1 and "1 of 8 past tolerance" in text
    assert [one.startswith(line) for one in text.splitlines() if "PAST IT" in one] == [True]


def test_orbax_checkpoints(released, tmp_path, capsys):
    pytest.importorskip("orbax.checkpoint", reason="Orbax checkpoints need the train extra")
    checkpoint.write(M3(*weights.read(released)), tmp_path / "orbax")
    status, found, _ = verified(capsys, tmp_path / "orbax", tmp_path / "orbax", "--max-length", 10)
    assert status == 0 and found["dense absolute"][0] == 0
