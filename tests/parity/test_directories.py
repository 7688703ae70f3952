"""Directories that transformers, sentence-transformers and PyTorch write are read, and what is written they read in silence.

Not here: equal answers (test_encode_parity.py, test_card_parity.py), and files that are broken (test_weights.py).
"""

import importlib
import json
import logging

import numpy as np
import pytest

import m3jax
from convert.__main__ import main
from m3jax import safetensor_files, sources
from m3jax.weights import HEAD_FILES

torch = pytest.importorskip("torch", reason="parity with PyTorch needs torch (the `test` extra)")
transformers = pytest.importorskip("transformers", reason="parity needs transformers (the `test` extra)")


@pytest.fixture
def theirs(geometry, torch_encoder, tiny_tokenizer_json, tiny_tokenizer, tmp_path):
    """theirs(model_class): a directory as transformers' save_pretrained writes it, in shards, with a tokenizer.json."""
    config = geometry(64, 2, vocab_size=tiny_tokenizer.vocab_size)

    def make(dtype=torch.float32, kind="XLMRobertaModel"):
        encoder = torch_encoder(config, 5)
        if kind == "XLMRobertaForMaskedLM":
            whole = transformers.XLMRobertaForMaskedLM(encoder.config)
            whole.roberta.load_state_dict(encoder.state_dict(), strict=False)
            encoder = whole
        encoder.to(dtype).save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
        (tmp_path / "theirs" / "tokenizer.json").write_text(tiny_tokenizer_json)
        return encoder, tmp_path / "theirs"

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_to_jax_and_back_is_bit_identical_in_transformers(theirs, tmp_path, dtype, caplog, recwarn):
    before, directory = theirs(dtype)
    assert len(list(directory.glob("*.safetensors"))) > 1
    main(["from-pytorch", str(directory), str(tmp_path / "orbax"), "--heads", "init"])
    main(["to-pytorch", str(tmp_path / "orbax"), str(tmp_path / "ours")])
    recwarn.clear()
    transformers.logging.enable_propagation()
    with caplog.at_level(logging.INFO, logger="transformers"):
        after, loading = transformers.XLMRobertaModel.from_pretrained(
            tmp_path / "ours", dtype="auto", output_loading_info=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert not any(loading.values()) and not recwarn.list
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert after.dtype == dtype
    for name, tensor in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], tensor), name
    assert tokenizer.model_max_length == 126 and tokenizer.mask_token == "<mask>"
    assert tokenizer("a house").input_ids == m3jax.load(tmp_path / "ours").tokenizer.encode(["a house"])[0][0].tolist()


@pytest.mark.parametrize("kind", ["XLMRobertaModel", "XLMRobertaForMaskedLM"])  # with a pooler and without
def test_all_load_in_silence_and_answer_alike(kind, theirs, tmp_path, peer_module, caplog, capfd, recwarn):
    """What a conversion wrote, in FlagEmbedding and in sentence-transformers; the card's lines are test_card_parity.py's."""
    peer = peer_module("FlagEmbedding").BGEM3FlagModel
    sentence_transformer = peer_module("sentence_transformers").SentenceTransformer
    _, directory = theirs(kind=kind)
    main(["from-pytorch", str(directory), str(tmp_path / "orbax"), "--heads", "init"])
    main(["to-pytorch", str(tmp_path / "orbax"), str(tmp_path / "ours"), "--format", "pickle"])
    ours = m3jax.encode(m3jax.load(tmp_path / "ours"), "the old river")
    recwarn.clear()
    capfd.readouterr()
    transformers.logging.enable_propagation()
    with caplog.at_level(logging.INFO):
        transformers.XLMRobertaModel.from_pretrained(tmp_path / "ours")
        one = peer(str(tmp_path / "ours"), use_fp16=False, devices="cpu")
        two = sentence_transformer(str(tmp_path / "ours"), device="cpu")
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    said += [str(warning.message) for warning in recwarn.list]
    said += [line for line in capfd.readouterr().err.splitlines() if "warn" in line.lower()]
    assert said == []
    for answer in (one.encode("the old river")["dense_vecs"], two.encode("the old river")):
        np.testing.assert_allclose(answer, ours.dense_vecs, atol=1e-5)
    assert two.max_seq_length == 126


def test_a_masked_language_model_of_transformers(theirs, tmp_path, recwarn):
    """xlm-roberta-base and -large are stored so. The head is named, not lost in silence."""
    before, directory = theirs(kind="XLMRobertaForMaskedLM")
    _, params, _ = sources.read(directory, heads="init")
    assert "the language-model head is no part of an M3 model" in str(recwarn.pop(UserWarning).message)
    expected = before.roberta.encoder.layer[1].intermediate.dense.weight.detach().numpy().T
    np.testing.assert_array_equal(params["encoder"]["layers"][1]["up"]["kernel"], expected)


def test_an_export_of_sentence_transformers(theirs, tmp_path, peer_module):
    sentence_transformers = peer_module("sentence_transformers")
    modules = importlib.import_module("sentence_transformers.models")
    _, directory = theirs()
    word = modules.Transformer(str(directory))
    pooling = modules.Pooling(word.get_word_embedding_dimension(), "cls")
    model = sentence_transformers.SentenceTransformer(modules=[word, pooling, modules.Normalize()], device="cpu")
    model.save(str(tmp_path / "export"))
    main(["from-pytorch", str(tmp_path / "export"), str(tmp_path / "orbax"), "--heads", "init"])
    ours = m3jax.encode(m3jax.load(tmp_path / "orbax"), ["the old river"]).dense_vecs
    np.testing.assert_allclose(ours, model.encode(["the old river"]), atol=1e-5)


def test_what_flag_embedding_s_trainer_leaves(theirs, tmp_path, flag_embedding):
    """The output of its runner after two steps, and a checkpoint within: files of the run lie beside those of the model."""
    module, arguments = "finetune.embedder.encoder_only.m3", flag_embedding("abc.finetune.embedder")
    own = flag_embedding(f"{module}.arguments")
    _, directory = theirs()
    main(["from-pytorch", str(directory), str(tmp_path / "orbax"), "--heads", "init"])
    main(["to-pytorch", str(tmp_path / "orbax"), str(tmp_path / "start")])
    rows = [{"query": "the old river", "pos": ["the small cat"], "neg": ["a red house"]}] * 4
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    output = tmp_path / "output"
    runner = flag_embedding(f"{module}.runner").EncoderOnlyEmbedderM3Runner(
        own.EncoderOnlyEmbedderM3ModelArguments(model_name_or_path=str(tmp_path / "start")),
        arguments.AbsEmbedderDataArguments(
            train_data=[str(tmp_path / "rows.jsonl")], cache_path=str(tmp_path), train_group_size=2
        ),
        own.EncoderOnlyEmbedderM3TrainingArguments(
            output_dir=str(output),
            unified_finetuning=True,
            learning_rate=1e-3,
            max_steps=2,
            save_steps=1,
            per_device_train_batch_size=2,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        ),
    )
    runner.run()
    there = {str(path.relative_to(output)) for path in output.rglob("*")}
    of_the_run = {"training_args.bin", *(f"checkpoint-1/{x}" for x in ("optimizer.pt", "trainer_state.json"))}
    assert {"model.safetensors", *HEAD_FILES.values(), *of_the_run} <= there
    answers = []
    for step in ("", "checkpoint-1"):
        main(["from-pytorch", str(output / step), str(tmp_path / f"converted{step}")])
        m3 = m3jax.load(tmp_path / f"converted{step}")
        ours = m3jax.encode(m3, "the old river sees a red house near the small cat", colbert=True)
        peer = flag_embedding("inference.embedder.encoder_only.m3").M3Embedder(
            str(output / step), use_fp16=False, devices="cpu", return_sparse=True, return_colbert_vecs=True
        )
        expected = peer.encode("the old river sees a red house near the small cat")
        for name in ("dense_vecs", "colbert_vecs"):
            np.testing.assert_allclose(getattr(ours, name), expected[name], atol=1e-5)
        assert expected["lexical_weights"]
        assert dict(expected["lexical_weights"]) == pytest.approx(ours.lexical_weights, abs=1e-5)
        answers.append(ours.dense_vecs)
        if not step:
            trained = runner.model.state_dict()
            for head in HEAD_FILES:
                kernel = trained[f"{head}.weight"].numpy().T
                np.testing.assert_array_equal(m3.params["heads"][head]["kernel"], kernel)
    assert np.abs(answers[0] - answers[1]).max() > 1e-3  # each is of its own step


def test_what_vllm_expects_of_a_directory(theirs, tmp_path):
    """vLLM's BgeM3EmbeddingModel: config.json of an XLM-R encoder, which the command line overrides the architecture of;
    encoder tensors without a prefix; two head files of {weight, bias} for Linear(hidden, 1) and Linear(hidden, hidden), read
    with weights_only=True; the length from the position table."""
    _, directory = theirs()
    main(["from-pytorch", str(directory), str(tmp_path / "orbax"), "--heads", "init"])
    main(["to-pytorch", str(tmp_path / "orbax"), str(tmp_path / "ours")])
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("xlm-roberta", ["XLMRobertaModel"])
    assert (config["max_position_embeddings"], config["pad_token_id"], config["dtype"]) == (128, 1, "float32")
    tensors = safetensor_files.read(tmp_path / "ours" / "model.safetensors")
    assert {name.partition(".")[0] for name in tensors} == {"embeddings", "encoder", "pooler"}
    for head, rows in (("sparse_linear", 1), ("colbert_linear", 64)):
        state = torch.load(tmp_path / "ours" / HEAD_FILES[head], map_location="cpu", weights_only=True)
        torch.nn.Linear(64, rows).load_state_dict(state)  # strict: these names and shapes
