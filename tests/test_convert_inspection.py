"""`python -m convert inspect`: it says what is there, lists all that is wrong, and agrees with m3jax.load on what loads."""

import json

import fsspec
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import m3jax
from convert.__main__ import main
from m3jax import checkpoint, paths, pickles, sources, weights
from m3jax.config import M3Config
from m3jax.model import M3, shapes

SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 20}


@pytest.fixture(scope="module")
def m3(tiny_tokenizer):
    config = M3Config.tiny(vocab_size=tiny_tokenizer.vocab_size + 5, colbert_dim=6, **SIZES)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), shapes(config))
    params["heads"] = jax.tree.map(lambda x: x.astype(np.float16), params["heads"])
    return M3(config, params, tiny_tokenizer)


@pytest.fixture
def saved(m3, tmp_path):
    weights.write(m3, tmp_path / "model")
    return tmp_path / "model"


def encoder(directory):
    return safetensors.numpy.load_file(directory / "model.safetensors")


def rewrite(directory, tensors):
    tensors = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")


def config(directory, **changes):
    content = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(content))


def inspected(capsys, path):
    """(exit status, lines by name, the text of the rest)."""
    status = 0
    try:
        main(["inspect", str(path)])
    except SystemExit as end:
        status = end.code
    text = capsys.readouterr().out
    lines = {line[:11].strip(): line[12:] for line in text.split("\n\n")[0].splitlines()}
    return status, lines, text


def test_a_released_directory(saved, capsys):
    status, lines, text = inspected(capsys, saved)
    assert status == 0 and text.splitlines()[-1] == "complete: m3jax.load reads it"
    loaded = jax.tree.leaves(weights.read(saved)[1])
    assert lines["kind"] == "released directory, with the files of sentence-transformers"
    assert lines["geometry"] == "2 layers × 16, 2 attention heads, feed-forward 24"
    assert lines["positions"] == "20 rows: texts of up to 18 tokens"
    assert lines["tensors"] == (
        f"{len(loaded)} tensors, {sum(x.size for x in loaded):,} parameters, {sum(x.nbytes for x in loaded):,} bytes"
    )
    assert lines["dtypes"] == f"float32 ({len(loaded) - 4} tensors), float16 (4 tensors)"
    assert lines["heads"] == "sparse_linear [1, 16] in sparse_linear.pt, colbert_linear [6, 16] in colbert_linear.pt"
    assert lines["pooler"].startswith("yes") and lines["for others"] == "all there"
    table, tokens = (weights.read(saved)[i] for i in (0, 2))
    assert lines["vocabulary"] == f"{table.vocab_size:,} rows, tokenizer of {tokens.vocab_size:,} ids"


def test_an_orbax_checkpoint(m3, tmp_path, capsys):
    pytest.importorskip("orbax.checkpoint", reason="Orbax checkpoints need the train extra")
    checkpoint.write(m3, tmp_path / "orbax")
    status, lines, _ = inspected(capsys, tmp_path / "orbax")
    assert status == 0 and lines["kind"] == "Orbax checkpoint of m3jax"
    assert lines["heads"] == "sparse_linear [1, 16] in Orbax, colbert_linear [6, 16] in Orbax"
    described = json.loads((tmp_path / "orbax" / "m3" / "metadata").read_text())
    described["config"] |= {"num_hidden_layers": 1, "intermediate_size": 12, "pooler": False}
    (tmp_path / "orbax" / "m3" / "metadata").write_text(json.dumps(described))
    status, _, text = inspected(capsys, tmp_path / "orbax")
    assert status == 1 and "left over: encoder.layer.1.output.dense.bias" in text
    assert "left over: pooler.dense.bias" in text
    assert "misshapen: encoder.layer.0.intermediate.dense.weight is (24, 16), expected (12, 16)" in text


def test_other_kinds(saved, capsys):
    (saved / "training_args.bin").write_bytes(b"")
    assert inspected(capsys, saved)[1]["kind"] == "FlagEmbedding output"
    for file in weights.HEAD_FILES.values():
        (saved / file).unlink()
    status, lines, text = inspected(capsys, saved)
    assert status == 1 and lines["kind"] == "sentence-transformers export, no M3 heads"
    assert lines["heads"] == "no sparse_linear, no colbert_linear"
    assert "missing file: sparse_linear.pt" in text and "heads='init'" in text and "linear.weight" not in text
    (saved / "1_Pooling/config.json").write_text('{"pooling_mode": "mean"}')
    assert inspected(capsys, saved)[1]["not read"] == "that it pools by mean"
    (saved / "modules.json").unlink()
    _, lines, _ = inspected(capsys, saved)
    assert lines["kind"] == "encoder, no M3 heads"
    assert lines["for others"] == "not there: modules.json (sentence-transformers); m3jax.save writes it"
    tensors = {f"roberta.{name}": x for name, x in encoder(saved).items() if not name.startswith("pooler.")}
    rewrite(saved, tensors | {"lm_head.bias": np.zeros(3), "roberta.embeddings.position_ids": np.arange(20)[None]})
    status, lines, text = inspected(capsys, saved)
    assert status == 1 and lines["kind"].startswith("masked-language model")
    assert lines["pooler"] == "no" and lines["not read"] == "embeddings.position_ids, lm_head.bias"
    assert "2 in the way" in text  # the heads


def test_single_files(saved, capsys):
    status, lines, text = inspected(capsys, saved / "model.safetensors")
    assert status == 1 and "put it into a directory" in text and "1 in the way" in text
    assert lines["geometry"] == "2 layers × 16, attention heads unknown (config.json), feed-forward 24"
    status, lines, _ = inspected(capsys, saved / "sparse_linear.pt")
    assert status == 1 and lines["kind"] == "head of an M3 model"
    assert lines["tensors"] == "2 tensors, 17 parameters, 34 bytes" and lines["dtypes"] == "float16 (2 tensors)"
    tensors = encoder(saved)
    del tensors["encoder.layer.1.output.dense.bias"]
    pickles.write(saved / "pytorch_model.bin", tensors)
    _, _, text = inspected(capsys, saved / "pytorch_model.bin")
    assert "missing: encoder.layer.1.output.dense.bias" in text and "2 in the way" in text


def test_neither_a_path_nor_a_name(tmp_path):
    with pytest.raises(SystemExit, match="error: expected a directory"):
        main(["inspect", str(tmp_path / "nowhere")])


def without(name):
    return lambda d: (d / name).unlink()


def changed(**tensors):
    return lambda d: rewrite(d, encoder(d) | {name.replace("__", "."): x for name, x in tensors.items()})


def shards(directory, absent=()):
    tensors = encoder(directory)
    files = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()) - set(absent):
        safetensors.numpy.save_file({k: x for k, x in tensors.items() if files[k] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (directory / "model.safetensors").unlink()


def overlapping_shards(directory):
    shards(directory)
    second = directory / "model-00002-of-00002.safetensors"
    both = safetensors.numpy.load_file(second) | {"pooler.dense.bias": np.zeros(16, np.float32)}
    safetensors.numpy.save_file(both | {"embeddings.LayerNorm.bias": np.zeros(16, np.float32)}, second)


def as_pickle(directory):
    pickles.write(directory / "pytorch_model.bin", encoder(directory))
    (directory / "model.safetensors").unlink()


def heads_inside(directory, *, twice=False):
    tensors = encoder(directory)
    for head, file in weights.HEAD_FILES.items():
        tensors |= {f"{head}.{k}": np.array(x) for k, x in pickles.read(directory / file).items()}
        if not twice:
            (directory / file).unlink()
    rewrite(directory, tensors)


CHANGES = {
    "nothing": (lambda d: None, None),
    "bfloat16": (lambda d: rewrite(d, {k: x.astype(ml_dtypes.bfloat16) for k, x in encoder(d).items()}), None),
    "pickle": (as_pickle, None),
    "shards": (shards, None),
    "heads inside": (heads_inside, None),
    "heads inside, all with the prefix": (
        lambda d: (heads_inside(d), rewrite(d, {f"roberta.{k}": x for k, x in encoder(d).items()})),
        None,
    ),
    "a config of a wrong type": (lambda d: config(d, pad_token_id=None), "pad_token_id = None, expected an integer"),
    "no UTF-8": (lambda d: (d / "config.json").write_bytes(b"\xff"), "config.json: expected UTF-8"),
    "no pooler": (lambda d: rewrite(d, {k: x for k, x in encoder(d).items() if "pooler" not in k}), None),
    "a buffer": (changed(embeddings__position_ids=np.arange(20)), None),
    "heads twice": (lambda d: heads_inside(d, twice=True), "twice: sparse_linear, in sparse_linear.pt and among"),
    "a shard missing": (
        lambda d: shards(d, ["model-00002-of-00002.safetensors"]),
        "missing file: model-00002-of-00002.safetensors",
    ),
    "shards that overlap": (overlapping_shards, " in model-00002-of-00002.safetensors too"),
    "with the prefix and without": (
        lambda d: rewrite(d, {f"roberta.{k}": x for k, x in encoder(d).items()} | {"pooler.dense.bias": np.zeros(16)}),
        "left over: roberta.pooler.dense.bias",
    ),
    "a broken index": (
        lambda d: (shards(d), (d / "model.safetensors.index.json").write_text("[]")),
        "model.safetensors.index.json: expected JSON",
    ),
    "no config": (without("config.json"), "missing file: config.json"),
    "no tokenizer": (without("tokenizer.json"), "missing file: tokenizer.json"),
    "no weights": (without("model.safetensors"), "missing file: model.safetensors, its shards, or pytorch_model.bin"),
    "no head": (without("sparse_linear.pt"), "missing file: sparse_linear.pt"),
    "half a head": (
        lambda d: pickles.write(d / "sparse_linear.pt", {"bias": np.zeros(1, np.float32)}),
        "missing: sparse_linear.weight",
    ),
    "a misshapen tensor": (
        changed(embeddings__LayerNorm__bias=np.zeros(5, np.float32)),
        "misshapen: embeddings.LayerNorm.bias is (5,), expected (16,)",
    ),
    "an integer": (
        changed(embeddings__LayerNorm__bias=np.zeros(16, np.int8)),
        "no floating-point numbers: embeddings.LayerNorm.bias is int8",
    ),
    "left over": (changed(lm_head__bias=np.zeros(3, np.float32)), "left over: lm_head.bias"),
    "a scalar": (changed(scale=np.array(3.0)), "left over: scale"),
    "a broken file": (
        lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-100]),
        "model.safetensors: not a readable safetensors file",
    ),
    "a broken head": (lambda d: (d / "colbert_linear.pt").write_bytes(b"PK"), "colbert_linear.pt: the zip archive is"),
    "another architecture": (lambda d: config(d, model_type="bert"), "'bert', expected 'xlm-roberta'"),
    "another size": (lambda d: config(d, max_position_embeddings=30), "position_embeddings.weight is (20, 16)"),
    "a small table": (
        lambda d: (
            config(d, vocab_size=50),
            changed(embeddings__word_embeddings__weight=np.zeros((50, 16), np.float32))(d),
        ),
        "the table 50 rows",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_it_agrees_with_load(saved, name, capsys):
    change, problem = CHANGES[name]
    change(saved)
    status, _, text = inspected(capsys, saved)
    if problem is None:
        m3jax.load(saved)
        assert status == 0, text
    else:
        with pytest.raises(ValueError):
            m3jax.load(saved)
        assert status == 1 and problem in text and "to do:" in text, text


def test_several_are_listed_together(saved, capsys):
    without("tokenizer.json")(saved)
    without("colbert_linear.pt")(saved)
    tensors = encoder(saved)
    del tensors["encoder.layer.0.output.dense.weight"], tensors["embeddings.LayerNorm.bias"]
    rewrite(saved, tensors | {"lm_head.bias": np.zeros(3)})
    _, _, text = inspected(capsys, saved)
    listed = text.split("\n\n")[1].splitlines()
    assert listed[0] == "5 in the way of m3jax.load:"
    assert sorted(line.strip() for line in listed[1:]) == [
        "left over: lm_head.bias", "missing file: colbert_linear.pt", "missing file: tokenizer.json",
        "missing: embeddings.LayerNorm.bias", "missing: encoder.layer.0.output.dense.weight",
    ]  # fmt: skip


def test_of_a_url_one_form_of_the_weights_is_fetched(saved, tmp_path):
    (saved / "pytorch_model.bin").write_bytes(b"large")
    (saved / "optimizer.pt").write_bytes(b"large")
    (saved / "onnx").mkdir()
    (saved / "onnx" / "model.onnx").write_bytes(b"large")
    store = fsspec.filesystem("memory")
    store.put(str(saved), "/forms", recursive=True)
    read = {"config.json", "tokenizer.json", "tokenizer_config.json", *weights.HEAD_FILES.values()}
    read |= {"modules.json", "sentence_bert_config.json", "1_Pooling/config.json"}
    with sources.local("memory://forms") as folder:
        assert set(paths.files(folder)) == read | {"model.safetensors"}
    store.rm("/forms/model.safetensors")
    with sources.local("memory://forms") as folder:
        assert set(paths.files(folder)) == read | {"pytorch_model.bin"}
    shards(saved)
    store.put(str(saved), "/sharded", recursive=True)
    m3jax.load("memory://sharded")
    store.rm("/forms/pytorch_model.bin")
    with pytest.raises(ValueError, match=r"expected model\.safetensors, its shards, or pytorch_model\.bin"):
        m3jax.load("memory://forms")


def test_a_revision_of_a_url_is_refused():
    with pytest.raises(ValueError, match="revision is for names on the hub, but 'memory://model' is a URL"):
        m3jax.load("memory://model", revision="v1")


def test_a_url(saved, capsys):
    store = fsspec.filesystem("memory")
    store.put(str(saved), "/inspected", recursive=True)
    status, lines, _ = inspected(capsys, "memory://inspected")
    assert status == 0 and lines["path"] == "memory://inspected"
    store.rm("/inspected/sparse_linear.pt")
    assert "missing file: sparse_linear.pt" in inspected(capsys, "memory://inspected")[2]
