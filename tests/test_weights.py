import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import m3jax
import m3jax.weights
from m3jax import pickles
from m3jax.config import M3Config
from m3jax.embedder import load, save
from m3jax.model import M3, flatten, shapes
from m3jax.weights import HEAD_FILES, read, torch_name, write

SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 20}


@pytest.fixture(scope="module")
def m3(tiny_tokenizer):
    config = M3Config.tiny(vocab_size=tiny_tokenizer.vocab_size + 5, colbert_dim=6, **SIZES)
    rng = np.random.default_rng(0)
    return M3(config, jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), shapes(config)), tiny_tokenizer)


@pytest.fixture
def saved(m3, tmp_path):
    """A released directory of m3, to be changed at will."""
    write(m3, tmp_path / "model")
    return tmp_path / "model"


def encoder_tensors(directory):
    return safetensors.numpy.load_file(directory / "model.safetensors")


def rewrite(directory, tensors):
    safetensors.numpy.save_file(
        {k: np.ascontiguousarray(v) for k, v in tensors.items()}, directory / "model.safetensors"
    )


def assert_same_model(got, m3):
    config, params, tokenizer = got
    assert config == m3.config
    assert tokenizer.json == m3.tokenizer.json
    expected = flatten(m3.params)
    assert flatten(params).keys() == expected.keys()
    for path, x in flatten(params).items():
        assert np.asarray(x).dtype == expected[path].dtype, path
        np.testing.assert_array_equal(x, expected[path], err_msg=path)


def test_every_tensor_comes_back_bit_for_bit(m3, saved):
    assert_same_model(read(saved), m3)
    loaded = load(saved, dtype="float32")
    assert_same_model((loaded.config, loaded.params, loaded.tokenizer), m3)


def test_kernels_are_transposed_and_nothing_else_is(m3, saved):
    tensors = encoder_tensors(saved)
    layer = m3.params["encoder"]["layers"][1]
    np.testing.assert_array_equal(tensors["encoder.layer.1.attention.self.key.weight"], layer["k"]["kernel"].T)
    np.testing.assert_array_equal(tensors["encoder.layer.1.intermediate.dense.weight"], layer["up"]["kernel"].T)
    np.testing.assert_array_equal(tensors["encoder.layer.1.output.LayerNorm.weight"], layer["output_norm"]["scale"])
    table = m3.params["encoder"]["embeddings"]["word_embeddings"]["embedding"]
    np.testing.assert_array_equal(tensors["embeddings.word_embeddings.weight"], table)
    assert not [name for name in tensors if "linear" in name]
    sparse, colbert = (pickles.read(saved / HEAD_FILES[head]) for head in ("sparse_linear", "colbert_linear"))
    assert (sparse["weight"].shape, sparse["bias"].shape) == ((1, 16), (1,))
    np.testing.assert_array_equal(colbert["weight"], m3.params["heads"]["colbert_linear"]["kernel"].T)


def test_names_are_those_of_pytorch_and_all_different(m3):
    names = [torch_name(path) for path in flatten(shapes(M3Config(num_hidden_layers=11)))]
    assert len(set(names)) == len(names) == 5 + 16 * 11 + 2 + 4
    assert "encoder.layer.10.attention.output.LayerNorm.bias" in names and "pooler.dense.weight" in names


def test_the_files_that_others_look_for(m3, saved):
    assert sorted(str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()) == [
        "1_Pooling/config.json", "README.md", "colbert_linear.pt", "config.json", "model.safetensors", "modules.json",
        "sentence_bert_config.json", "sparse_linear.pt", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert (saved / "tokenizer.json").read_bytes().decode() == m3.tokenizer.json
    assert json.loads((saved / "config.json").read_text())["hidden_size"] == 16
    assert not list(saved.parent.glob("*.partial"))


def test_sharded_safetensors(m3, saved):
    tensors = encoder_tensors(saved)
    names = sorted(tensors)
    parts = {f"model-0000{i + 1}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, own in parts.items():
        safetensors.numpy.save_file({name: tensors[name] for name in own}, saved / file)
    index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    (saved / "model.safetensors").unlink()
    assert_same_model(read(saved), m3)
    again = {name: tensors[name] + 1 for name in parts["model-00003-of-00003.safetensors"] + names[:1]}
    safetensors.numpy.save_file(again, saved / "model-00003-of-00003.safetensors")
    with pytest.raises(
        ValueError, match=rf"in one shard; {re.escape(names[0])} in model-00003-of-00003\.safetensors too"
    ):
        read(saved)
    (saved / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00003\.safetensors"):
        read(saved)


def test_pytorch_model_bin(m3, saved):
    pickles.write(saved / "pytorch_model.bin", encoder_tensors(saved))
    (saved / "model.safetensors").unlink()
    assert_same_model(read(saved), m3)


def test_heads_within_the_safetensors(m3, saved):
    tensors = encoder_tensors(saved)
    for head, file in HEAD_FILES.items():
        tensors |= {f"{head}.{name}": np.array(x) for name, x in pickles.read(saved / file).items()}
    rewrite(saved, tensors)
    with pytest.raises(ValueError, match=r"both in sparse_linear\.pt and among the weights"):
        read(saved)
    for file in HEAD_FILES.values():
        (saved / file).unlink()
    assert_same_model(read(saved), m3)


def test_missing_heads_name_their_files(saved):
    (saved / "sparse_linear.pt").unlink()
    with pytest.raises(ValueError, match=r"sparse_linear\.pt") as caught:
        read(saved)
    assert "colbert_linear.pt" not in str(caught.value)
    (saved / "colbert_linear.pt").unlink()
    with pytest.raises(ValueError, match=r"sparse_linear\.pt and colbert_linear\.pt.*heads='init'"):
        read(saved)


def test_missing_heads_and_tensors_are_one_error(saved):
    (saved / "sparse_linear.pt").unlink()
    tensors = encoder_tensors(saved)
    del tensors["embeddings.LayerNorm.bias"]
    rewrite(saved, tensors)
    with pytest.raises(ValueError, match=r"(?s)missing: embeddings\.LayerNorm\.bias\n.*sparse_linear\.pt: not found"):
        read(saved)


def test_heads_can_be_drawn(m3, saved):
    (saved / "sparse_linear.pt").unlink()
    one, two = (read(saved, heads="init") for _ in range(2))
    kernel = one[1]["heads"]["sparse_linear"]["kernel"]
    assert kernel.shape == (16, 1) and kernel.any() and not one[1]["heads"]["sparse_linear"]["bias"].any()
    jax.tree.map(np.testing.assert_array_equal, one[1], two[1])  # the same each time
    assert (read(saved, heads="init", seed=1)[1]["heads"]["sparse_linear"]["kernel"] != kernel).all()
    np.testing.assert_array_equal(
        one[1]["heads"]["colbert_linear"]["kernel"], m3.params["heads"]["colbert_linear"]["kernel"]
    )
    np.testing.assert_array_equal(one[1]["encoder"]["pooler"]["kernel"], m3.params["encoder"]["pooler"]["kernel"])
    (saved / "colbert_linear.pt").unlink()
    assert read(saved, heads="init")[1]["heads"]["colbert_linear"]["kernel"].shape == (16, 6)  # as config.json says
    with pytest.raises(ValueError, match="'require' or 'init', got 'random'"):
        m3jax.load(saved, heads="random")  # pyright: ignore[reportArgumentType]


def test_one_error_lists_every_tensor_that_is_wrong(saved):
    tensors = encoder_tensors(saved)
    del tensors["encoder.layer.0.output.dense.weight"], tensors["embeddings.LayerNorm.bias"]
    tensors["lm_head.bias"] = tensors["classifier.weight"] = np.zeros(3, np.float32)
    tensors["encoder.layer.1.attention.self.value.bias"] = np.zeros(5, np.float32)
    tensors["encoder.layer.1.intermediate.dense.weight"] = np.zeros((16, 24), np.float32)
    pickles.write(saved / "sparse_linear.pt", {"weight": np.zeros((1, 16), np.float32)})
    rewrite(saved, tensors)
    with pytest.raises(ValueError) as caught:
        read(saved)
    message = str(caught.value)
    assert str(saved) in message and "7 are not" in message
    for part in (
        "missing: encoder.layer.0.output.dense.weight", "missing: embeddings.LayerNorm.bias", "missing: sparse_linear.bias",
        "left over: lm_head.bias", "left over: classifier.weight",
        "misshapen: encoder.layer.1.attention.self.value.bias is (5,), expected (16,)",
        "misshapen: encoder.layer.1.intermediate.dense.weight is ",
    ):  # fmt: skip
        assert part in message, part


@pytest.mark.parametrize(
    ("pooling", "also", "said"),
    [
        ({"pooling_mode": "mean"}, [], "pools by mean"),
        ({"pooling_mode": ["cls", "max"]}, [], "pools by cls, max"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, [], "pools by mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, [], "pools by cls, mean"),
        ({"pooling_mode_lasttoken": True}, ["Dense"], "pools by lasttoken and has a Dense module"),
        ({"pooling_mode": "cls"}, ["Dense"], "has a Dense module"),
        (None, [], "pools by a missing "),
        ({"pooling_mode": "cls"}, [], None),
        ({"pooling_mode_cls_token": True, "include_prompt": True}, [], None),
    ],
)
def test_what_sentence_transformers_does_beyond_the_cls_state_is_said(m3, saved, recwarn, pooling, also, said):
    modules = json.loads((saved / "modules.json").read_text())
    modules += [{"idx": 9, "name": "9", "path": "9", "type": f"sentence_transformers.models.{kind}"} for kind in also]
    (saved / "modules.json").write_text(json.dumps(modules))
    (saved / "1_Pooling/config.json").unlink()
    if pooling:
        (saved / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": 16} | pooling))
    assert_same_model(read(saved), m3)
    given = [str(w.message) for w in recwarn if "CLS state" in str(w.message)]
    assert [f"normalised CLS state, but this export {said}" in message for message in given] == [True] * bool(said)


@pytest.mark.parametrize("broken", ["", '[{"path": ""}]', "[1]", '{"a": 1}'])
def test_broken_modules_are_named(saved, broken):
    (saved / "modules.json").write_text(broken)
    with pytest.raises(ValueError, match=r"modules\.json: expected what sentence-transformers writes, got .*remove it"):
        read(saved)


def test_a_tensor_with_the_prefix_and_without_is_left_over(m3, saved):
    tensors = {f"roberta.{name}": x for name, x in encoder_tensors(saved).items()}
    rewrite(saved, tensors)
    assert_same_model(read(saved), m3)
    rewrite(saved, tensors | {"embeddings.LayerNorm.bias": np.zeros(16, np.float32)})
    with pytest.raises(ValueError, match=r"1 are not.*\n  left over: roberta\.embeddings\.LayerNorm\.bias$"):
        read(saved)


def test_position_ids_of_old_transformers_are_passed_over(m3, saved):
    tensors = encoder_tensors(saved) | {"embeddings.position_ids": np.arange(20)[None]}
    rewrite(saved, tensors)
    assert_same_model(read(saved), m3)


def test_no_pooler(m3, saved):
    tensors = {name: x for name, x in encoder_tensors(saved).items() if not name.startswith("pooler.")}
    rewrite(saved, tensors)
    config, params, tokenizer = read(saved)
    assert not config.pooler and "pooler" not in params["encoder"]
    write(M3(config, params, tokenizer), saved)
    written = encoder_tensors(saved)
    assert written.keys() - tensors.keys() == {"pooler.dense.weight", "pooler.dense.bias"}
    assert not written["pooler.dense.weight"].any() and read(saved)[0] == config  # zeros stand for none


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_loads_as_float32_on_cpu(m3, dtype, tmp_path):
    half = M3(m3.config, jax.tree.map(lambda x: x.astype(dtype), m3.params), m3.tokenizer)
    write(half, tmp_path / "half")
    stored = flatten(read(tmp_path / "half")[1])
    assert {x.dtype for x in stored.values()} == {np.dtype(dtype)}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == np.dtype(dtype).name
    loaded = flatten(load(tmp_path / "half").params)
    assert {x.dtype.name for x in loaded.values()} == {"float32"}
    for path, x in flatten(half.params).items():
        np.testing.assert_array_equal(loaded[path], x.astype(np.float32))


def test_the_dtype_asked_for(saved):
    for name in ("bfloat16", "float16"):
        loaded = flatten(load(saved, dtype=name).params)
        assert {x.dtype.name for x in loaded.values() if x.ndim > 1} == {name}
        assert {x.dtype.name for x in loaded.values() if x.ndim == 1} == {"float32"}
    with pytest.raises(ValueError, match="float32, bfloat16, float16 or None, got 'int8'"):
        load(saved, dtype="int8")


def test_half_precision_in_memory_saves(m3, saved, tmp_path):
    loaded = load(saved, dtype="bfloat16")
    save(loaded, tmp_path / "again")
    stored = flatten(read(tmp_path / "again")[1])
    for path, x in flatten(loaded.params).items():
        np.testing.assert_array_equal(stored[path], np.asarray(x))


def test_a_vocabulary_smaller_than_the_tokenizer(m3, saved):
    size = m3.tokenizer.vocab_size - 1
    config = json.loads((saved / "config.json").read_text()) | {"vocab_size": size}
    (saved / "config.json").write_text(json.dumps(config))
    tensors = encoder_tensors(saved)
    tensors["embeddings.word_embeddings.weight"] = tensors["embeddings.word_embeddings.weight"][:size]
    rewrite(saved, tensors)
    with pytest.raises(ValueError, match=f"ids up to {size}, the table {size} rows"):
        load(saved)


def test_another_architecture(saved):
    config = json.loads((saved / "config.json").read_text()) | {"model_type": "bert"}
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="'bert', expected 'xlm-roberta'"):
        load(saved)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(saved, file):
    (saved / file).unlink()
    name = {"model.safetensors": r"model\.safetensors, its shards, or pytorch_model\.bin"}.get(file, file)
    with pytest.raises(ValueError, match=f"expected {name} of .* found: .*sparse_linear.pt"):
        load(saved)


def test_shards_of_the_older_form_are_refused_in_words(saved):
    (saved / "model.safetensors").unlink()
    (saved / "pytorch_model.bin.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"shards of pytorch_model\.bin are not read, save the model as safetensors"):
        load(saved)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_a_file_that_is_no_utf8_is_named(saved, file):
    (saved / file).write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match=f"{file}: expected UTF-8, .*download or write it again"):
        load(saved)


def test_a_broken_safetensors_file(saved):
    whole = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a readable safetensors file"):
        load(saved)


def test_no_directory(tmp_path):
    with pytest.raises(ValueError, match="expected a directory"):
        load(tmp_path / "nothing")


def test_only_what_a_save_wrote_is_replaced(m3, saved, tmp_path):
    other = M3(m3.config, jax.tree.map(lambda x: x + 1, m3.params), m3.tokenizer)
    (saved / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"there is thesis.txt; choose another name"):
        save(other, saved)
    assert (saved / "thesis.txt").read_text() == "years of work"
    assert_same_model(read(saved), m3)
    (saved / "thesis.txt").unlink()
    save(other, saved)
    assert_same_model(read(saved), other)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]  # no partial and no older one beside it
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(ValueError, match="file"):
        save(m3, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    save(m3, tmp_path / "empty")
    assert_same_model(read(tmp_path / "empty"), m3)


def test_a_card_is_replaced_only_as_a_save_made_it(m3, saved, tmp_path):
    made = (saved / "README.md").read_text(encoding="utf-8")
    assert f"{sum(x.size for x in jax.tree.leaves(m3.params)):,} parameters" in made
    save(m3, saved)
    assert (saved / "README.md").read_text(encoding="utf-8") == made
    changed = made.replace("---\n", "---\nlicense: mit\n", 1)
    for own in (changed.encode(), b"# Mine\n", b"\xff\xfe no UTF-8"):
        (saved / "README.md").write_bytes(own)
        with pytest.raises(ValueError, match=r"there is a README.md of your own; choose another name, or move that"):
            save(m3, saved)
        assert (saved / "README.md").read_bytes() == own
    assert_same_model(read(saved), m3)
    # A card that is given is written as it is, and is then a person's.
    save(m3, tmp_path / "given", card="# Mine, 東京\n")
    assert (tmp_path / "given" / "README.md").read_text(encoding="utf-8") == "# Mine, 東京\n"
    with pytest.raises(ValueError, match=r"a README.md of your own"):
        save(m3, tmp_path / "given")
    # The card of the source is not taken over: it may not hold of the model that is saved.
    save(load(tmp_path / "given"), tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text(encoding="utf-8") == made


def test_an_interrupted_save_leaves_what_was_there(m3, saved, tmp_path, monkeypatch):
    other = M3(m3.config, jax.tree.map(lambda x: x + 1, m3.params), m3.tokenizer)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(m3jax.weights, "_tokenizer_config", interrupted)  # after the weights, before the last file
        for directory in (saved, tmp_path / "new"):
            with pytest.raises(KeyboardInterrupt):
                save(other, directory)
    assert not (tmp_path / "new").exists()
    assert_same_model(read(saved), m3)
    save(other, tmp_path / "new")  # and the next one succeeds
    assert_same_model(read(tmp_path / "new"), other)
    assert not (tmp_path / "new.partial").exists()


def test_device_arrays_save_as_numpy_does(m3, saved, tmp_path):
    save(M3(m3.config, jax.tree.map(jnp.asarray, m3.params), m3.tokenizer), tmp_path / "device")
    for file in ("model.safetensors", "sparse_linear.pt", "colbert_linear.pt", "config.json"):
        assert (tmp_path / "device" / file).read_bytes() == (saved / file).read_bytes()


def test_weights_of_integers_are_refused(saved):
    tensors = safetensors.numpy.load_file(saved / "model.safetensors")
    name = "encoder.layer.0.output.dense.weight"
    safetensors.numpy.save_file(tensors | {name: tensors[name].astype(np.int8)}, saved / "model.safetensors")
    with pytest.raises(ValueError, match=f"{name} .of dtype int8"):
        read(saved)
