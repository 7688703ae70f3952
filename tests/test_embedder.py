import io
import itertools
import json
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tqdm.std

import m3jax
from m3jax import embedder
from m3jax.config import M3Config
from m3jax.model import M3, apply, cast, shapes

SHORT = ["the fox", "", "a cat", "東京", "the the"]
LONG = ["the quick brown fox jumps over a lazy dog", "what is the capital of france", "der fuchs springt la ville"]
TEXTS = [SHORT[0], LONG[0], *SHORT[1:4], *LONG[1:], SHORT[4], "a <mask> a </s> b", "☃ fox"]
ALL = {"dense": True, "sparse": True, "colbert": True}


def model(tokenizer, bias=5.0):
    """A random model of 38 tokens at most, whose every token has a weight > 0 where `bias` is large."""
    config = M3Config.tiny(
        vocab_size=tokenizer.vocab_size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=40, colbert_dim=6,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), x.dtype), shapes(config))
    params["heads"]["sparse_linear"]["bias"] = jnp.full(1, bias)
    return M3(config, params, tokenizer)


@pytest.fixture(scope="module")
def m3(tiny_tokenizer):
    return model(tiny_tokenizer)


@pytest.fixture(scope="module")
def embeddings(m3):
    """All of `TEXTS`, in one batch."""
    return m3jax.encode(m3, TEXTS, **ALL)


def tokens(m3, text):
    return m3.tokenizer.encode([text])[0][0]


def assert_same(got, expected, order=None):
    order = range(len(expected)) if order is None else order
    np.testing.assert_allclose(got.dense_vecs, expected.dense_vecs[order], atol=1e-5)
    np.testing.assert_allclose(got.sparse.toarray(), expected.sparse.toarray()[order], atol=1e-5)
    for vectors, row in zip(got.colbert_vecs, order, strict=True):
        np.testing.assert_allclose(vectors, expected.colbert_vecs[row], atol=1e-5)
    for weights, row in zip(got.lexical_weights, order, strict=True):
        assert weights == pytest.approx(expected.lexical_weights[row], abs=1e-5)


def test_what_apply_gives(m3, embeddings):
    row = TEXTS.index("a <mask> a </s> b")
    ids = tokens(m3, TEXTS[row])
    given = jax.jit(lambda p, i: apply(m3.config, p, i, i >= 0))(m3.params, ids[None])
    np.testing.assert_allclose(embeddings.dense_vecs[row], given.dense[0], atol=1e-5)
    np.testing.assert_allclose(embeddings.colbert_vecs[row], given.colbert[0, 1:], atol=1e-5)
    expected = {}
    for id, weight in zip(ids.tolist(), given.token_weights[0].tolist(), strict=True):
        if id not in (0, 1, 2, 3):
            expected[str(id)] = max(weight, expected.get(str(id), 0.0))
    assert embeddings.lexical_weights[row] == pytest.approx(expected, abs=1e-5)
    assert str(m3.tokenizer.mask_id) in expected  # <mask> may be a term; </s> inside a text is none
    assert ids.tolist().count(ids[1]) == 2  # a term twice, with one weight
    in_words = m3.tokens(embeddings.lexical_weights)[row]
    assert in_words.keys() >= {"▁a", "<mask>"} and len(in_words) == len(expected)


def test_shapes_and_types(m3, embeddings):
    """PEER §2.12: there a text's token vectors are a view that keeps its whole padded batch in memory."""
    assert embeddings.dense_vecs.shape == (len(TEXTS), 16) and embeddings.dense_vecs.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings.dense_vecs, axis=1), 1, rtol=1e-5)
    assert len(embeddings.colbert_vecs) == len(TEXTS)
    for text, vectors in zip(TEXTS, embeddings.colbert_vecs, strict=True):
        assert vectors.shape == (len(tokens(m3, text)) - 1, 6) and vectors.dtype == np.float32
        assert vectors.base is None and vectors.flags.owndata  # no text keeps its padded batch alive
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert embeddings.sparse.shape == (len(TEXTS), m3.config.vocab_size) and embeddings.sparse.dtype == np.float32


def test_lexical_weights_are_plain(m3, embeddings):
    assert json.loads(json.dumps(embeddings.lexical_weights)) == embeddings.lexical_weights
    for text, weights in zip(TEXTS, embeddings.lexical_weights, strict=True):
        assert {type(weight) for weight in weights.values()} <= {float} and all(w > 0 for w in weights.values())
        # Every token weighs more than 0 here, so a term is missing only because it may not be one.
        assert set(weights) == {str(id) for id in tokens(m3, text).tolist()} - {"0", "1", "2", "3"}
    assert {0, 2, 3} <= {id for text in TEXTS for id in tokens(m3, text).tolist()}


def test_a_weight_of_0_is_no_term(tiny_tokenizer):
    given = m3jax.encode(model(tiny_tokenizer, bias=-1e4), TEXTS, **ALL)
    assert given.lexical_weights == [{}] * len(TEXTS) and given.sparse.nnz == 0


@pytest.mark.parametrize("batch_tokens", [16384, 76])
def test_order_is_kept(m3, embeddings, batch_tokens):
    order = np.random.default_rng(1).permutation(len(TEXTS))
    shuffled = (TEXTS[row] for row in order)  # any iterable
    assert_same(m3jax.encode(m3, shuffled, batch_tokens=batch_tokens, **ALL), embeddings, order)


def test_alone_as_in_a_batch(m3, embeddings):
    for text in (SHORT[0], SHORT[1], LONG[0]):
        row = TEXTS.index(text)
        assert_same(m3jax.encode(m3, [text], **ALL), embeddings, [row])


def test_one_str_is_unbatched(m3, embeddings):
    one = m3jax.encode(m3, TEXTS[0], **ALL)
    np.testing.assert_allclose(one.dense_vecs, embeddings.dense_vecs[0], atol=1e-5)
    np.testing.assert_allclose(one.colbert_vecs, embeddings.colbert_vecs[0], atol=1e-5)
    assert one.lexical_weights == pytest.approx(embeddings.lexical_weights[0], abs=1e-5)
    assert one.dense_vecs.shape == (16,) and one.colbert_vecs.ndim == 2 and one.sparse.shape[0] == 1


def test_no_texts(m3):
    """PEER §2.8: there `[]` ends in an unrelated error."""
    none = m3jax.encode(m3, [], **ALL)
    assert len(none) == 0 and none.dense_vecs.shape == (0, 16) and none.sparse.shape == (0, m3.config.vocab_size)
    assert none.lexical_weights == [] and none.colbert_vecs == []


def test_the_empty_text(m3, embeddings):
    row = TEXTS.index("")
    assert embeddings.lexical_weights[row] == {}
    assert embeddings.colbert_vecs[row].shape == (1, 6)  # that of </s>
    assert abs(np.linalg.norm(embeddings.dense_vecs[row]) - 1) < 1e-5


def test_only_what_is_asked_for(m3, embeddings):
    dense = m3jax.encode(m3, TEXTS, sparse=False)
    assert dense.sparse is None and dense.lexical_weights is None and dense.colbert_vecs is None
    np.testing.assert_allclose(dense.dense_vecs, embeddings.dense_vecs, atol=1e-5)
    colbert = m3jax.encode(m3, TEXTS, dense=False, sparse=False, colbert=True)
    assert colbert.dense_vecs is None and colbert.sparse is None
    np.testing.assert_allclose(colbert.colbert_vecs[0], embeddings.colbert_vecs[0], atol=1e-5)
    with pytest.raises(ValueError, match="must give something"):
        m3jax.encode(m3, TEXTS, dense=False, sparse=False)


def test_texts_are_cut_with_one_warning(m3):
    """PEER §2.10: there they are cut silently."""
    with pytest.warns(UserWarning) as caught:
        cut = m3jax.encode(m3, TEXTS, max_length=5, **ALL)
    longer = [text for text in TEXTS if len(tokens(m3, text)) > 5]
    assert len(caught) == 1 and caught[0].filename == __file__
    assert f"{len(longer)} of {len(TEXTS)} texts are longer than max_length = 5 tokens" in str(caught[0].message)
    assert len(longer) >= 3
    row = TEXTS.index(LONG[0])
    assert cut.colbert_vecs[row].shape == (4, 6)
    assert set(cut.lexical_weights[row]) == {str(id) for id in tokens(m3, LONG[0])[1:4].tolist()}
    with pytest.warns(UserWarning, match="1 of 1 texts are longer than max_length = 38"):
        m3jax.encode(m3, LONG[0] * 4, **ALL)


def test_a_text_of_exactly_the_models_length(m3):
    text = "a " * (m3.config.max_length - 2)  # of one piece each
    assert len(tokens(m3, text)) == m3.config.max_length == 38
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert m3jax.encode(m3, [text], **ALL).colbert_vecs[0].shape == (37, 6)


@pytest.mark.parametrize("max_length", [-1, 0, 1, 39, 8192])
def test_max_length_must_fit(m3, max_length):
    with pytest.raises(ValueError, match=f"2 to 38, got {max_length}"):
        m3jax.encode(m3, TEXTS, max_length=max_length)


def test_bad_arguments(m3):
    """PEER §2.9: there keyword arguments that do not exist are swallowed."""
    with pytest.raises(TypeError, match="batch_size"):
        m3jax.encode(m3, TEXTS, batch_size=4)
    with pytest.raises(TypeError, match="positional"):
        m3jax.encode(m3, TEXTS, True)
    with pytest.raises(ValueError, match=r"texts\[1\] must be a str; NoneType came"):
        m3jax.encode(m3, ["a", None])
    with pytest.raises(ValueError, match="batch_tokens"):
        m3jax.encode(m3, TEXTS, batch_tokens=0)
    for texts in (b"bytes", None, 5):
        with pytest.raises(ValueError, match=f"texts must be a str or an iterable of str, got {texts!r}"):
            m3jax.encode(m3, texts)
    for name in ("truncate_dim", "batch_tokens", "max_length"):
        with pytest.raises(ValueError, match=f"{name} must be a whole number, got True"):
            m3jax.encode(m3, TEXTS, **{name: True})
    for name in ("dense", "sparse", "colbert", "mcls", "progress"):
        with pytest.raises(ValueError, match=f"{name} must be True or False, got 'no'"):
            m3jax.encode(m3, TEXTS, **{name: "no"})
    assert m3jax.encode(m3, TEXTS, dense=np.True_, sparse=np.False_, mcls=np.False_).terms is None


def test_without_a_home_folder_nothing_that_is_compiled_is_kept(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    monkeypatch.delenv("XDG_CACHE_HOME")
    kept = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        with pytest.warns(UserWarning, match="no home folder, so what JAX compiles is not kept"):
            embedder._keep_compilations()
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", kept)


def test_results_are_float32_whatever_the_model_is(m3, embeddings):
    half = M3(m3.config, cast(m3.params, jnp.bfloat16), m3.tokenizer)
    given = m3jax.encode(half, TEXTS, **ALL)
    assert given.dense_vecs.dtype == given.sparse.dtype == given.colbert_vecs[0].dtype == np.float32
    assert (given.dense_vecs * embeddings.dense_vecs).sum(axis=1).min() > 0.999


def test_progress_only_when_asked(m3, capsys):
    m3jax.encode(m3, TEXTS, **ALL)
    assert capsys.readouterr() == ("", "")
    m3jax.encode(m3, TEXTS, progress=True, **ALL)
    shown = capsys.readouterr()
    assert shown.out == "" and f"{len(TEXTS)}/{len(TEXTS)}" in shown.err


class Screen(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.isatty = lambda: terminal


@pytest.mark.parametrize(("terminal", "seconds", "shown"), [(True, 1.0, True), (True, 0.0, False), (False, 1.0, False)])
def test_progress_comes_by_itself_on_a_terminal_when_it_takes_long(m3, monkeypatch, terminal, seconds, shown):
    """By a clock that goes on by so many seconds whenever the bar looks at it."""
    screen = Screen(terminal)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(tqdm.std, "time", itertools.count(0.0, seconds).__next__)
    m3jax.encode(m3, TEXTS, batch_tokens=16, **ALL)
    assert (f"{len(TEXTS)}/{len(TEXTS)}" in screen.getvalue()) == shown
    assert bool(screen.getvalue()) == shown


@pytest.mark.parametrize("asked", ["dense", "sparse", "colbert"])
def test_a_model_of_nan_does_not_pass_for_empty_results(m3, asked):
    broken = M3(m3.config, jax.tree.map(lambda x: x * jnp.nan, m3.params), m3.tokenizer)
    with pytest.raises(ValueError, match="embeddings must be finite"):
        m3jax.encode(broken, ["the fox"], **{part: part == asked for part in ALL})
