"""The lines that a model card gives to use a model in other libraries: they run as they stand and answer as m3jax does."""

import re

import jax
import numpy as np
import pytest

import m3jax
from m3jax.config import M3Config


@pytest.fixture(scope="module", params=[64, 32], ids=lambda width: f"colbert_dim {width}")
def saved(request, tmp_path_factory, tiny_tokenizer):
    config = M3Config.tiny(vocab_size=tiny_tokenizer.vocab_size, colbert_dim=request.param)
    directory = tmp_path_factory.mktemp("card") / "model"
    m3jax.save(m3jax.M3(config, m3jax.init(config, jax.random.key(0)), tiny_tokenizer), directory)
    return directory


def result(directory, package):
    """What the card's lines for a package print, as the value it is; DIR is replaced as a reader does."""
    card = (directory / "README.md").read_text(encoding="utf-8")
    (lines,) = (block for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL) if f"from {package} " in block)
    printed = []
    code = compile(lines.replace('"DIR"', repr(str(directory))), f"the card's lines for {package}", "exec")
    exec(code, {"print": printed.append})
    return printed[0]


def test_flag_embedding(saved, peer_module):
    peer_module("FlagEmbedding")
    ours = m3jax.encode(m3jax.load(saved), ["What is M3?"], colbert=True)
    theirs = result(saved, "FlagEmbedding")
    np.testing.assert_allclose(theirs["dense_vecs"], ours.dense_vecs, atol=1e-5)
    np.testing.assert_allclose(theirs["colbert_vecs"][0], ours.colbert_vecs[0], atol=1e-5)
    (weights,) = theirs["lexical_weights"]
    assert dict(weights) == pytest.approx(ours.lexical_weights[0], abs=1e-5)


def test_sentence_transformers(saved, peer_module):
    peer_module("sentence_transformers")
    ours = m3jax.encode(m3jax.load(saved), ["What is M3?"])
    np.testing.assert_allclose(result(saved, "sentence_transformers"), ours.dense_vecs, atol=1e-5)
