"""encode's numbers against the model on each text alone: in any batch, in bfloat16, with mcls, cut vectors, instructions.

Not here: how encode runs (test_encoding_run.py), what arguments mean to a user (test_embedder.py), how texts share rows
(test_batching.py), several devices (e2e/test_encode.py).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import m3jax
import m3jax.encoding
from m3jax.model import M3, Network, cast
from m3jax.xlm_roberta import positions_from_ids
from tests.conftest import LINES
from tests.random_model import random_model
from tests.texts_alone import ALL, TEXTS, One, alone, assert_same, model_of_1024, naive_terms, own_row, words


@pytest.fixture(scope="module")
def m3(tiny_tokenizer):
    return model_of_1024(tiny_tokenizer)


@functools.partial(jax.jit, static_argnums=0)
def hidden_states(config, params, ids, mask):
    graph = nnx.split(nnx.eval_shape(lambda: Network(config, nnx.Rngs(0))))[0]
    network = nnx.merge(graph, params)
    hidden = network.encoder(ids, positions_from_ids(ids, config.pad_token_id), mask.astype(jnp.int32))
    return hidden, network.heads(hidden, ids, mask)


def naive_mcls(m3, text, max_length):
    """PAPER §5, token by token: a CLS before every 256, the mean of their states."""
    cls, *content, eos = m3.tokenizer.encode([text])[0][0].tolist()
    kept, inserted = [cls], [0]
    for count, id in enumerate(content):
        opens = count % 256 == 0 and count > 0
        if len(kept) + opens + 2 > max_length:
            break
        if opens:
            inserted.append(len(kept))
            kept.append(cls)
        kept.append(id)
    kept.append(eos)
    hidden, given = (
        jax.tree.map(lambda x: np.asarray(x[0]), part)
        for part in hidden_states(m3.config, m3.params, *own_row(m3, kept))
    )
    mean = np.mean([hidden[column] for column in inserted], axis=0)
    colbert = [given.colbert[i] for i in range(len(kept)) if i not in inserted]
    terms = naive_terms(kept, given.token_weights[: len(kept)].tolist())
    return One(mean / np.linalg.norm(mean), terms, np.array(colbert)), len(kept)


@pytest.fixture(scope="module")
def expected(m3):
    return [alone(m3, text) for text in TEXTS]


def test_every_text_as_alone(m3, expected):
    assert_same(m3jax.encode(m3, TEXTS, **ALL), expected)
    assert len({tuple(one.dense.round(3)) for one in expected}) > len(TEXTS) - 3  # the weights hide nothing
    assert sum(len(one.terms) for one in expected) > 10 * len(TEXTS)


@settings(max_examples=6, deadline=None)
@given(
    order=st.permutations(range(len(TEXTS))),
    batch_tokens=st.sampled_from([1, 300, 1024, 5000]),
    window=st.sampled_from([(1, 10**6), (7, 10**6), (10**6, 200), (10**6, 10**6)]),
)
def test_every_text_as_alone_in_any_batch(m3, expected, order, batch_tokens, window):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(m3jax.encoding, "_WINDOW_TEXTS", window[0])
        patch.setattr(m3jax.encoding, "_WINDOW_CHARACTERS", window[1])
        got = m3jax.encode(m3, [TEXTS[i] for i in order], batch_tokens=batch_tokens, **ALL)
    assert_same(got, [expected[i] for i in order])


@pytest.mark.parametrize(
    ("layers", "width", "vectors", "weights"), [(2, 64, 1e-2, 0.07), (4, 256, 1e-3, 0.02), (12, 256, 1e-4, 0.01)]
)
@pytest.mark.parametrize("seed", range(3))
def test_bfloat16(tiny_tokenizer, layers, width, vectors, weights, seed):
    """Within what encode's docstring says, beside float32 and in another batch; RESULTS.md has the measurement."""
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 64}
    sizes |= {"intermediate_size": 2 * width, "colbert_dim": 64, "max_position_embeddings": 1026}
    one = random_model(tiny_tokenizer, seed, **sizes)
    half = M3(one.config, cast(jax.device_put(one.params), jnp.bfloat16), tiny_tokenizer)
    texts = [text for text in TEXTS if len(text) < 400]
    whole, full = (m3jax.encode(m3, texts, **ALL) for m3 in (half, one))
    order = np.random.default_rng(1).permutation(len(texts))
    again = m3jax.encode(half, [texts[i] for i in order], batch_tokens=300, **ALL)[np.argsort(order)]
    for got, other in ((whole, full), (again, full), (again, whole)):
        apart = [1 - (got.dense_vecs * other.dense_vecs).sum(axis=1)]
        apart += [1 - (a * b).sum(axis=1) for a, b in zip(got.colbert_vecs, other.colbert_vecs, strict=True)]
        assert np.concatenate(apart).max() <= vectors
        assert abs(got.sparse - other.sparse).max() <= weights
    assert np.abs(whole.dense_vecs - full.dense_vecs).max() > 1e-4  # it is bfloat16


@pytest.fixture(scope="module")
def of_tokens(m3):
    """A text of so many tokens, `<s>` and `</s>` not counted."""
    tokens = {word: len(m3.tokenizer.encode([word])[0][0]) - 2 for word in " ".join(LINES).split()}
    assert tokens["a"] == 1

    def text(count, seed=0):
        random, made, left = np.random.default_rng([count, seed]), [], count
        while left:
            made.append(random.choice([word for word, needs in tokens.items() if needs <= left]))
            left -= tokens[made[-1]]
        assert len(m3.tokenizer.encode([" ".join(made)])[0][0]) == count + 2
        return " ".join(made)

    return text


CONTENT = [0, 1, 60, 256, 257, 770]


def test_mcls(m3, of_tokens):
    texts = [of_tokens(n) for n in CONTENT]
    got = m3jax.encode(m3, texts, mcls=True, **ALL)
    assert_same(got, [naive_mcls(m3, text, 1024)[0] for text in texts])
    assert [len(vectors) for vectors in got.colbert_vecs] == [n + 1 for n in CONTENT]  # of EOS too, of no CLS
    plain = m3jax.encode(m3, texts, **ALL)
    different = np.abs(got.dense_vecs - plain.dense_vecs).max(axis=1) > 1e-3
    assert different.tolist() == [n > 256 for n in CONTENT]


def test_mcls_of_256_tokens_is_plain_to_the_bit(m3, of_tokens):
    texts = [of_tokens(n) for n in CONTENT if n <= 256] + TEXTS[:3]
    assert max(len(row) for row in m3.tokenizer.encode(texts)[0]) == 258
    for some in (texts, *([text] for text in texts)):
        got, plain = (m3jax.encode(m3, some, mcls=mcls, **ALL) for mcls in (True, False))
        np.testing.assert_array_equal(got.dense_vecs, plain.dense_vecs)
        assert got.lexical_weights == plain.lexical_weights
        assert all(map(np.array_equal, got.colbert_vecs, plain.colbert_vecs))
    got = m3jax.encode(m3, texts[3], mcls=True, **ALL)
    assert len(got.colbert_vecs) == 257  # </s> stands in column 257, where a CLS would


@pytest.mark.parametrize("max_length", [259, 260])
def test_mcls_counts_toward_max_length(m3, of_tokens, max_length):
    """Of 259 places the one after 256 tokens stays empty: a CLS there would open a run of none."""
    lengths = (256, 257, 258, 600)
    texts = [of_tokens(n, seed=1) for n in lengths]
    expected, kept = zip(*(naive_mcls(m3, text, max_length) for text in texts), strict=True)
    assert max(kept) == (258 if max_length == 259 else 260)
    cut = sum(len(one.colbert) - 1 < n for one, n in zip(expected, lengths, strict=True))
    with pytest.warns(
        UserWarning, match=f"{cut} of 4 texts are longer, CLS tokens of mcls included, than max_length = {max_length}"
    ):
        got = m3jax.encode(m3, texts, mcls=True, max_length=max_length, **ALL)
    assert_same(got, expected)


@pytest.mark.parametrize("mcls", [False, True])
def test_truncate_dim(m3, mcls):
    texts = [*TEXTS[:12], words(110)]
    whole, cut = (m3jax.encode(m3, texts, mcls=mcls, truncate_dim=width, **ALL) for width in (None, 5))
    for got, full in zip([cut.dense_vecs, *cut.colbert_vecs], [whole.dense_vecs, *whole.colbert_vecs], strict=True):
        kept = full[:, :5] / np.linalg.norm(full[:, :5], axis=1, keepdims=True)
        np.testing.assert_allclose(got, kept, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, rtol=1e-5)
    assert cut.lexical_weights == whole.lexical_weights


def test_bounds_of_truncate_dim(m3):
    for width, asked, bound in (
        (0, ALL, 12), (-1, ALL, 12), (13, ALL, 12), (17, {"dense": True}, 16),
        (13, {"dense": False, "sparse": False, "colbert": True}, 12),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"truncate_dim must be between 1 .* asked for, {bound}, got {width}"):
            m3jax.encode(m3, ["fox"], truncate_dim=width, **asked)
    with pytest.raises(ValueError, match="neither is asked for; got 4"):
        m3jax.encode(m3, ["fox"], dense=False, truncate_dim=4)
    assert m3jax.encode(m3, "fox", truncate_dim=16).dense_vecs.shape == (16,)
    few = dataclasses.replace(m3.config, max_position_embeddings=10)
    params = {**m3.params, "encoder": {**m3.params["encoder"]}}
    tables = params["encoder"]["embeddings"]
    params["encoder"]["embeddings"] = tables | {
        "position_embeddings": {"embedding": tables["position_embeddings"]["embedding"][:10]}
    }
    # The width has nothing to do with the number of positions.
    assert m3jax.encode(M3(few, params, m3.tokenizer), "fox", truncate_dim=12).dense_vecs.shape == (12,)


def test_instruction(m3):
    got = m3jax.encode(m3, TEXTS, instruction="what is the ", **ALL)
    by_hand = m3jax.encode(m3, ["what is the " + text for text in TEXTS], **ALL)
    np.testing.assert_array_equal(got.dense_vecs, by_hand.dense_vecs)
    assert got.lexical_weights == by_hand.lexical_weights
    assert all(map(np.array_equal, got.colbert_vecs, by_hand.colbert_vecs))
    with pytest.warns(UserWarning, match="1 of 1 texts"):  # it counts
        m3jax.encode(m3, "fox", instruction="what is the ", max_length=5)
    with pytest.raises(ValueError, match="instruction must be a str; int came: 3"):
        m3jax.encode(m3, "fox", instruction=3)
    with pytest.raises(ValueError, match=r"instruction is not valid Unicode: lone surrogate '\\ud83d' at character 2"):
        m3jax.encode(m3, "fox", instruction="q:\ud83d")
    # A place in a text is one in what the user passed.
    with pytest.raises(ValueError, match=r"texts\[1\] is not valid Unicode: lone surrogate '\\ud83d' at character 4"):
        m3jax.encode(m3, ["fox", "fox \ud83d"], instruction="what is the ")


def test_parameters_in_numpy(m3, expected):
    held = M3(m3.config, jax.tree.map(np.asarray, m3.params), m3.tokenizer)
    assert_same(m3jax.encode(held, TEXTS[:5], **ALL), expected[:5])
