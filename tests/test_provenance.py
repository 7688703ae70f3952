"""What embeddings on disk depend on: other settings or weights are refused by name, and the digest misses no number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import m3jax
from m3jax.model import M3, cast
from m3jax.provenance import fingerprint
from tests.small_corpus import SMALL, TEXTS, files, small_model, stopped


@pytest.fixture(scope="module")
def m3(tiny_tokenizer):
    return small_model(tiny_tokenizer)


def test_other_settings_or_another_model_are_refused(m3, tmp_path, tiny_tokenizer_json):
    directory = stopped(m3, tmp_path / "x", 12)
    one = jax.tree.map(lambda x: x, m3.params)
    one["encoder"]["layers"][0]["q"]["kernel"] = one["encoder"]["layers"][0]["q"]["kernel"].at[3, 2].add(1e-6)
    other_tokenizer = m3jax.Tokenizer.from_json(tiny_tokenizer_json + " ")
    for other, settings, named in (
        (m3, {"max_length": 12}, ["max_length 38, not 12"]),
        (
            m3,
            {"sparse": False, "colbert_dtype": "int8"},
            ["sparse True, not False", "colbert_dtype 'float16', not 'int8'"],
        ),
        (m3, {"shard_texts": 6}, ["shard_texts 5, not 6"]),
        (m3, {"instruction": "q: ", "mcls": True}, ["instruction '', not 'q: '", "mcls False, not True"]),
        (m3, {"truncate_dim": 4}, ["truncate_dim None, not 4"]),
        (M3(m3.config, one, m3.tokenizer), {}, ["model.weights "]),
        (M3(m3.config, cast(m3.params, jnp.bfloat16), m3.tokenizer), {}, ["model.dtype 'float32', not 'bfloat16'"]),
        (M3(m3.config, m3.params, other_tokenizer), {}, ["model.tokenizer "]),
    ):
        with pytest.raises(ValueError, match="what is there was encoded with") as caught:
            m3jax.encode_to(directory, other, TEXTS, **SMALL | settings)
        assert all(name in str(caught.value) for name in named), caught.value
        assert str(caught.value).count(", not ") == len(named) + (", not 'bfloat16'" in str(caught.value))
    # What changes nothing that comes out may be another.
    m3jax.encode_to(directory, m3, TEXTS, max_length=38, batch_tokens=9999, **SMALL)
    m3jax.encode_to(tmp_path / "whole", m3, TEXTS, **SMALL)
    assert files(directory) == files(tmp_path / "whole")


def test_the_weights_digest_sees_each_number_and_its_place(m3):
    def digest(params):
        return fingerprint(M3(m3.config, params, m3.tokenizer))

    leaves, tree = jax.tree.flatten(m3.params)
    seen = {digest(m3.params)}
    assert digest(jax.tree.map(np.asarray, m3.params)) in seen  # wherever they are
    variants = 0
    for number, leaf in enumerate(leaves):
        for other in (leaf.at[-1].add(2.0**-10), jnp.flip(leaf), leaf.T):
            if not (other.ravel() == leaf.ravel()).all():  # shapes are the config's
                variants += 1
                seen.add(digest(jax.tree.unflatten(tree, [other if i == number else x for i, x in enumerate(leaves)])))
    assert len(seen) == variants + 1 > len(leaves) + 1
