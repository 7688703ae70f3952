import dataclasses
import json

import pytest

from m3jax.config import M3Config

# The config.json that BAAI/bge-m3 ships, keys that say nothing of the model included.
RELEASED = {
    "_name_or_path": "",
    "architectures": ["XLMRobertaModel"],
    "attention_probs_dropout_prob": 0.1,
    "bos_token_id": 0,
    "classifier_dropout": None,
    "eos_token_id": 2,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 8194,
    "model_type": "xlm-roberta",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "output_past": True,
    "pad_token_id": 1,
    "position_embedding_type": "absolute",
    "torch_dtype": "float32",
    "transformers_version": "4.33.0",
    "type_vocab_size": 1,
    "use_cache": True,
    "vocab_size": 250002,
}


def test_bge_m3_is_the_released_model():
    config = M3Config.bge_m3()
    assert M3Config.from_json(json.dumps(RELEASED)) == config
    assert (config.max_length, config.head_dim, config.colbert_dim) == (8192, 64, 1024)
    assert config.unused_ids == (0, 2, 1, 3)


def test_to_json_comes_back():
    config = M3Config.tiny(
        hidden_size=32, cls_token_id=5, pad_token_id=2, eos_token_id=0, unk_token_id=1, colbert_dim=8, pooler=False,
        layer_norm_eps=1e-6, type_vocab_size=2, initializer_range=0.1,
    )  # fmt: skip
    assert M3Config.from_json(config.to_json()) == config


def test_to_json_says_what_transformers_reads():
    written = json.loads(M3Config.bge_m3().to_json())
    shared = RELEASED.keys() - {
        "_name_or_path", "classifier_dropout", "output_past", "torch_dtype", "transformers_version"
    }  # fmt: skip
    assert {k: written[k] for k in shared} == {k: RELEASED[k] for k in shared}
    assert "cls_token_id" not in written


def test_colbert_dim_follows_the_width_unless_given():
    assert M3Config.tiny(hidden_size=32).colbert_dim == 32
    assert M3Config.tiny(hidden_size=32, colbert_dim=7).colbert_dim == 7
    assert M3Config.from_json(json.dumps(RELEASED | {"hidden_size": 512})).colbert_dim == 512


def test_the_first_of_the_released_ids_is_the_cls():
    assert M3Config.from_json(json.dumps(RELEASED | {"bos_token_id": 4})).cls_token_id == 4
    assert M3Config.from_json(json.dumps(RELEASED | {"bos_token_id": None})).cls_token_id == 0


def test_another_architecture_is_refused_with_every_reason():
    other = RELEASED | {"model_type": "bert", "hidden_act": "gelu_new", "position_embedding_type": "relative_key"}
    del other["vocab_size"], other["intermediate_size"]
    with pytest.raises(ValueError, match="XLM-RoBERTa") as caught:
        M3Config.from_json(json.dumps(other))
    for reason in ("'bert'", "'gelu_new'", "'relative_key'", "vocab_size is missing", "intermediate_size is missing"):
        assert reason in str(caught.value)


def test_sizes_that_cannot_be():
    with pytest.raises(ValueError, match="multiple of num_attention_heads, got 64 and 5"):
        M3Config.tiny(num_attention_heads=5)
    with pytest.raises(ValueError, match="at least 4, got 3"):
        M3Config.tiny(max_position_embeddings=3)
    assert M3Config.tiny(max_position_embeddings=4).max_length == 2
    with pytest.raises(TypeError, match="hidden_sise"):
        M3Config.tiny(hidden_sise=64)


def test_frozen_and_hashable():
    config = M3Config.tiny()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 1
    assert hash(config) == hash(M3Config.tiny())  # a static argument of jit


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON"),
        ("[]", "expected a JSON object of sizes, got a list"),
        (json.dumps(RELEASED | {"hidden_size": "64"}), "hidden_size = '64', expected an integer of at least 1"),
        (
            json.dumps(RELEASED | {"num_attention_heads": 0}),
            "num_attention_heads = 0, expected an integer of at least 1",
        ),
        (json.dumps(RELEASED | {"pad_token_id": None}), "pad_token_id = None, expected an integer of at least 0"),
        (json.dumps(RELEASED | {"vocab_size": True}), "vocab_size = True, expected an integer"),
        (json.dumps(RELEASED | {"layer_norm_eps": "1e-5"}), "layer_norm_eps = '1e-5', expected a number of at least 0"),
        (json.dumps(RELEASED | {"initializer_range": float("nan")}), "initializer_range = nan, expected a number"),
        (json.dumps(RELEASED | {"pooler": 1}), "pooler = 1, expected true or false"),
        (json.dumps(RELEASED | {"hidden_size": 1000}), "multiple of num_attention_heads, got 1000 and 16"),
        (
            json.dumps(RELEASED | {"hidden_size": 1.5, "type_vocab_size": -1}),
            "hidden_size = 1.5, .*; type_vocab_size = -1, ",
        ),
    ],
)
def test_a_broken_file_is_named(text, message):
    with pytest.raises(ValueError, match=f"here/config.json.*{message}"):
        M3Config.from_json(text, source="here/config.json")
