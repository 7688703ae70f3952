"""encode against the model on each text alone: in any batch, out of memory, interrupted.

Not here: what arguments mean to a user (test_embedder.py), how texts share rows (test_batching.py), several devices
(e2e/test_encode.py).
"""

import dataclasses
import functools
import os
import signal
import threading
import time
import warnings
from itertools import pairwise
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.errors import JaxRuntimeError

import m3jax
import m3jax.encoding
from m3jax.batching import pad
from m3jax.model import M3, Network, apply, cast
from m3jax.xlm_roberta import positions_from_ids
from tests.conftest import LINES
from tests.random_model import random_model

ALL = {"dense": True, "sparse": True, "colbert": True}
ODD = ["", "a <pad> b <s> c </s> d", "☃", "the the the the", "  ", "<mask> fox"]


@pytest.fixture(scope="module")
def m3(tiny_tokenizer):
    """Of 1,024 tokens at most, so that attention runs both whole and in blocks."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    one = random_model(tiny_tokenizer, **sizes, colbert_dim=12, max_position_embeddings=1026)
    return M3(one.config, jax.device_put(one.params), tiny_tokenizer)


@functools.cache
def words(count, seed=0):
    """A text of so many words."""
    return " ".join(np.random.default_rng(seed).choice(" ".join(LINES).split(), count))


TEXTS = [*ODD, *LINES, *(words(n % 12 + 1, n) for n in range(30)), *(words(n) for n in (110, 200))]
TEXTS = [TEXTS[i] for i in np.random.default_rng(0).permutation(len(TEXTS))]


class One(NamedTuple):
    """A text's representations; of its tokens and their weights, the terms with their largest."""

    dense: np.ndarray
    terms: dict[str, float]
    colbert: np.ndarray


@functools.partial(jax.jit, static_argnums=0)
def hidden_states(config, params, ids, mask):
    graph = nnx.split(nnx.eval_shape(lambda: Network(config, nnx.Rngs(0))))[0]
    network = nnx.merge(graph, params)
    hidden = network.encoder(ids, positions_from_ids(ids, config.pad_token_id), mask.astype(jnp.int32))
    return hidden, network.heads(hidden, ids, mask)


one_row = jax.jit(apply, static_argnums=0)


def naive_terms(ids, weights):
    terms = {}
    for id, weight in zip(ids, weights, strict=True):
        if id not in (0, 1, 2, 3) and weight > 0:
            terms[str(id)] = max(weight, terms.get(str(id), 0.0))
    return terms


def own_row(m3, ids):
    """A row that a text has to itself, filled up to one of three lengths so that little is compiled, and its mask."""
    length = next(length for length in (64, 520, 1024) if length >= len(ids))
    return pad([np.array(ids)], 1, length, m3.config.pad_token_id)


def alone(m3, text):
    """What the model as one pure function gives."""
    ids = m3.tokenizer.encode([text])[0][0].tolist()
    given = jax.tree.map(lambda x: np.asarray(x[0]), one_row(m3.config, m3.params, *own_row(m3, ids)))
    terms = naive_terms(ids, given.token_weights[: len(ids)].tolist())
    return One(given.dense, terms, given.colbert[given.colbert_mask])


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


def assert_same(got, expected, within=1e-5):
    assert len(got) == len(expected)
    for row, one in enumerate(expected):
        np.testing.assert_allclose(got.dense_vecs[row], one.dense, atol=within, rtol=0)
        assert got.lexical_weights[row] == pytest.approx(one.terms, abs=within)
        np.testing.assert_allclose(got.colbert_vecs[row], one.colbert, atol=within, rtol=0)


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


@pytest.mark.parametrize(("layers", "width", "bound"), [(2, 64, 5e-3), (4, 256, 5e-4), (12, 256, 1e-4)])
@pytest.mark.parametrize("seed", range(3))
def test_bfloat16(tiny_tokenizer, layers, width, bound, seed):
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
        vectors = [1 - (got.dense_vecs * other.dense_vecs).sum(axis=1)]
        vectors += [1 - (a * b).sum(axis=1) for a, b in zip(got.colbert_vecs, other.colbert_vecs, strict=True)]
        assert np.concatenate(vectors).max() <= bound
        assert abs(got.sparse - other.sparse).max() <= 0.02
    assert np.abs(whole.dense_vecs - full.dense_vecs).max() > 1e-4  # it is bfloat16


def test_windows(monkeypatch):
    texts = ["aaa"] * 5 + ["a" * 50] + ["a"] * 9

    def windows(parts, count, characters):
        monkeypatch.setattr(m3jax.encoding, "_WINDOW_TEXTS", count)
        monkeypatch.setattr(m3jax.encoding, "_WINDOW_CHARACTERS", characters)
        made = list(m3jax.encoding._windows(parts))
        assert [window.number for window in made] == list(range(1, len(made) + 1))
        for window in made:
            assert window.texts == dict(parts)[window.key][window.first : window.first + len(window.texts)]
        return [(window.key, window.count, window.first, len(window.texts)) for window in made]

    def of_one(count, characters):
        return [window[2:] for window in windows([("a", texts)], count, characters)]

    assert of_one(4, 1000) == [(0, 4), (4, 4), (8, 4), (12, 3)]
    assert of_one(100, 10) == [(0, 3), (3, 2), (5, 1), (6, 9)]
    assert of_one(100, 1000) == [(0, 15)]
    # No window holds texts of two parts; a part of no texts has one, so that it is delivered too.
    parts = [("a", texts), ("b", []), ("c", texts[:3])]
    assert windows(parts, 9, 1000) == [("a", 15, 0, 9), ("a", 15, 9, 6), ("b", 0, 0, 0), ("c", 3, 0, 3)]


def run(m3, parts, deliver=lambda key: None):
    """What is delivered, (key, arrays, cut) each; deliver is told the key before."""
    asked = {"max_length": None, "instruction": "", "truncate_dim": None, "mcls": False, "batch_tokens": 300}
    delivered = []

    def take(key, *given):
        deliver(key)
        delivered.append((key, *given))

    plan = m3jax.encoding.make_plan(m3.config, **ALL, **asked)
    m3jax.encoding.run(m3, parts, plan, deliver=take, taken_in=lambda count: None)
    return delivered


def test_parts_are_delivered_in_order(m3, expected, monkeypatch):
    """Each with its own rows, one of no texts too, in windows of a few texts."""
    monkeypatch.setattr(m3jax.encoding, "_WINDOW_TEXTS", 7)
    ends = [0, 5, 5, 30, 31, len(TEXTS)]
    delivered = run(m3, [(key, TEXTS[start:end]) for key, (start, end) in enumerate(pairwise(ends))])
    assert [(key, cut) for key, _, cut in delivered] == [(key, 0) for key in range(5)]
    for (_, arrays, _), (start, end) in zip(delivered, pairwise(ends), strict=True):
        assert_same(m3jax.Embeddings(*arrays), expected[start:end])


def test_a_part_is_delivered_before_a_slow_source_has_the_next(m3):
    delivered = [threading.Event() for _ in range(3)]

    def parts():
        for key in range(3):
            yield key, TEXTS[:3]
            assert delivered[key].wait(60)

    assert len(run(m3, parts(), lambda key: delivered[key].set())) == 3


def test_the_next_parts_are_read_and_tokenised_while_one_waits_for_its_delivery(m3, monkeypatch):
    """And no more of them, so that memory is bounded."""
    read, tokenised, delivered, encode = [], [], [], m3.tokenizer.encode
    monkeypatch.setattr(
        m3.tokenizer, "encode", lambda texts, *more, **how: (tokenised.append(texts), encode(texts, *more, **how))[1]
    )

    def parts():
        for key in range(9):
            read.append(key)
            yield key, [f"{key} fox"] * 20

    def deliver(key):
        deadline = time.monotonic() + 60
        while key < 5 and len(tokenised) < key + 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)  # what should not come is given time to
        # Of the next one the first batch is computed already; one is tokenised, one is read.
        delivered.append((len(tokenised), len(read)))

    run(m3, parts(), deliver)
    assert delivered == [(min(key + 3, 9), min(key + 4, 9)) for key in range(9)]


@pytest.mark.parametrize("error", [OSError("the file is gone"), KeyboardInterrupt()])
def test_what_came_before_an_error_of_reading_is_delivered(m3, error):
    """But after Ctrl-C."""
    delivered = []

    def parts():
        yield 0, TEXTS
        yield 1, TEXTS
        raise error

    with pytest.raises(type(error)) as caught:
        run(m3, parts(), delivered.append)
    assert caught.value is error
    assert delivered == [0, 1] if isinstance(error, OSError) else len(delivered) < 2


@pytest.mark.parametrize(("place", "last"), [("a batch", 1), ("delivering", 2)])
def test_nothing_is_computed_or_delivered_after_an_error(m3, monkeypatch, place, last):
    """The third part fails; parts have one batch each."""
    delivered, added, add = [], [], m3jax.encoding.Collected.add

    def failing(collected, first, packing, ids, *given):
        added.append(len(ids))
        if place == "a batch" and len(ids) == 3:
            raise KeyError(place)
        add(collected, first, packing, ids, *given)

    def deliver(key):
        delivered.append(key)
        if place == "delivering" and key == 2:
            raise KeyError(place)

    monkeypatch.setattr(m3jax.encoding.Collected, "add", failing)
    with pytest.raises(KeyError, match=place):
        run(m3, [(key, ["the fox"] * (key + 1)) for key in range(6)], deliver)
    time.sleep(0.2)
    assert delivered == list(range(last + 1)) and added == [1, 2, 3]


def test_devices_never_wait_for_the_host(m3, monkeypatch):
    """The next batch is started before results of the one before are taken in, and the next window tokenised meanwhile."""
    forward, add, encode = m3jax.encoding.forward, m3jax.encoding.Collected.add, m3.tokenizer.encode
    events, tokenised, in_time = [], threading.Semaphore(0), []

    def tokenise(*args, **kwargs):
        result = encode(*args, **kwargs)
        tokenised.release()
        return result

    def start(*args):
        if not events:  # the first batch: both windows are tokenised while it runs
            in_time.extend(tokenised.acquire(timeout=20) for _ in range(2))
        events.append("start")
        return forward(*args)

    def take_in(*args):
        events.append("take in")
        add(*args)

    monkeypatch.setattr(m3jax.encoding, "_WINDOW_TEXTS", 100)
    monkeypatch.setattr(m3jax.encoding, "forward", start)
    monkeypatch.setattr(m3jax.encoding.Collected, "add", take_in)
    monkeypatch.setattr(m3.tokenizer, "encode", tokenise)
    m3jax.encode(m3, ["the fox"] * 200, batch_tokens=64)
    count = events.count("start")
    assert count > 10 and in_time == [True, True]
    assert events == ["start", *["start", "take in"] * (count - 1), "take in"]


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
    with pytest.warns(UserWarning, match=f"{cut} of 4 texts are longer than max_length = {max_length}"):
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
    with pytest.raises(ValueError, match="instruction must be a str, got int: 3"):
        m3jax.encode(m3, "fox", instruction=3)
    with pytest.raises(
        ValueError, match=r"instruction must be valid Unicode, got a lone surrogate '\\ud83d' at character 2"
    ):
        m3jax.encode(m3, "fox", instruction="q:\ud83d")
    # A place in a text is one in what the user passed.
    with pytest.raises(ValueError, match=r"texts\[1\] is not valid Unicode: lone surrogate '\\ud83d' at character 4"):
        m3jax.encode(m3, ["fox", "fox \ud83d"], instruction="what is the ")


def test_errors_name_the_text_in_any_window(m3, monkeypatch):
    monkeypatch.setattr(m3jax.encoding, "_WINDOW_TEXTS", 3)
    texts = ["the fox"] * 11
    for index in (0, 2, 3, 10):
        for bad, message in ((3, "must be a str; int came: 3"), ("a \ud83d", "is not valid Unicode: lone surrogate")):
            given = [*texts[:index], bad, *texts[index + 1 :]]
            with pytest.raises(ValueError, match=rf"texts\[{index}\] {message}"):
                m3jax.encode(m3, given)


def test_cut_texts_of_all_windows_are_counted(m3, monkeypatch):
    monkeypatch.setattr(m3jax.encoding, "_WINDOW_TEXTS", 3)
    with pytest.warns(UserWarning, match="5 of 10 texts") as caught:
        m3jax.encode(m3, ["fox", words(20)] * 5, max_length=12)
    assert len(caught) == 1


def test_parameters_in_numpy(m3, expected):
    held = M3(m3.config, jax.tree.map(np.asarray, m3.params), m3.tokenizer)
    assert_same(m3jax.encode(held, TEXTS[:5], **ALL), expected[:5])


class Late:
    """A result that fails when it is copied to the host, as what a device could not compute does."""

    def __init__(self, error):
        self.error = error

    def is_ready(self):
        return True

    def __array__(self, *args, **kwargs):
        raise self.error


def out_of_memory():
    return JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123 bytes.")


def failing(monkeypatch, fits, late, make=out_of_memory):
    """forward fails with `make()` on batches for which not `fits(shape)`; gives the shapes it is called with."""
    forward, seen = m3jax.encoding.forward, []

    def short_of_memory(config, params, batch, asked):
        seen.append(batch.ids.shape)
        if fits(batch.ids.shape):
            return forward(config, params, batch, asked)
        if not late:
            raise make()
        return m3jax.encoding.Results(*(Late(make()) if part else None for part in asked[:3]))

    monkeypatch.setattr(m3jax.encoding, "forward", short_of_memory)
    return seen


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("window", [9, 8192])
def test_batches_that_do_not_fit_are_halved(m3, expected, monkeypatch, late, window):
    monkeypatch.setattr(m3jax.encoding, "_WINDOW_TEXTS", window)
    longest = max(len(row) for row in m3.tokenizer.encode(TEXTS)[0])
    seen = failing(monkeypatch, lambda shape: shape[0] * shape[1] <= 1024, late)
    assert longest < 1024
    with pytest.warns(UserWarning, match="did not fit into the device's memory") as caught:
        assert_same(m3jax.encode(m3, TEXTS, batch_tokens=5000, **ALL), expected)
    # Each warning lowers what is tried, so there are no more than halvings from the first.
    assert 1 <= len(caught) <= 3
    failed = [rows * length for rows, length in seen if rows * length > 1024]
    assert len(failed) <= 2 * len(caught)
    first = caught[0].message.args[0]
    assert f"below {failed[0]} " in first


@pytest.mark.parametrize("late", [False, True])
def test_a_limit_once_found_is_kept(m3, monkeypatch, late):
    """A corpus of which no batch fits: few warnings, and few batches that are tried in vain."""
    texts = ["the quick fox"] * 3000
    monkeypatch.setattr(m3jax.encoding, "_WINDOW_TEXTS", 500)
    seen = failing(monkeypatch, lambda shape: shape[0] * shape[1] <= 200, late)
    with pytest.warns(UserWarning) as caught:
        got = m3jax.encode(m3, texts, batch_tokens=3000)
    assert np.ptp(got.dense_vecs, axis=0).max() < 1e-5 and len(got) == 3000
    assert 1 <= len(caught) <= 5
    assert sum(rows * length > 200 for rows, length in seen) <= 8


@pytest.mark.parametrize("late", [False, True])
def test_no_process_of_several_halves_batches_by_itself(m3, monkeypatch, late):
    """The others would wait for it for ever: the error comes through and says what all are to do."""
    monkeypatch.setattr(m3jax.encoding, "mesh_of", lambda params: SimpleNamespace(is_multi_process=True))
    seen = failing(monkeypatch, lambda shape: shape[0] * shape[1] <= 512, late)
    with warnings.catch_warnings(), pytest.raises(JaxRuntimeError, match="RESOURCE_EXHAUSTED") as caught:
        warnings.simplefilter("error")
        m3jax.encode(m3, TEXTS, batch_tokens=1024)
    failed = next(rows * length for rows, length in seen if rows * length > 512)
    assert f"pass all of them a batch_tokens below {failed}" in "".join(caught.value.__notes__)
    assert sum(rows * length > 512 for rows, length in seen) <= 2  # the one, and that on its way


@pytest.mark.parametrize("late", [False, True])
def test_a_text_that_does_not_fit_alone(m3, monkeypatch, late):
    """The device's own error, and no other text is tried in vain."""
    raised = []

    def make():
        raised.append(out_of_memory())
        return raised[-1]

    failing(monkeypatch, lambda shape: shape[1] < 300, late, make)
    with warnings.catch_warnings(), pytest.raises(JaxRuntimeError) as caught:
        warnings.simplefilter("ignore")
        m3jax.encode(m3, ["fox", words(150), "the fox"])
    assert caught.value in raised and str(caught.value) == str(out_of_memory())


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("error", [JaxRuntimeError("INTERNAL: the device is gone"), KeyError("fox"), OSError(5, "io")])
def test_other_errors_come_through(m3, monkeypatch, late, error):
    seen = failing(monkeypatch, lambda shape: False, late, lambda: error)
    with warnings.catch_warnings(), pytest.raises(type(error)) as caught:
        warnings.simplefilter("error")
        m3jax.encode(m3, ["fox"] * 3000)
    assert caught.value is error
    assert len(seen) < 10  # those on their way


def test_ctrl_c_returns_at_once(m3, monkeypatch):
    """While the device works on; the next call finds everything in order."""
    forward, release, done = m3jax.encoding.forward, threading.Event(), threading.Event()

    def slow(*args):
        time.sleep(0.2)  # until encode waits for the device
        pressed.append(True)
        os.kill(os.getpid(), signal.SIGINT)
        release.wait(60)
        done.set()
        return forward(*args)

    pressed = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(m3jax.encoding, "forward", slow)
            with pytest.raises(KeyboardInterrupt):
                m3jax.encode(m3, TEXTS)
        assert not done.is_set() and len(pressed) == 1
        again = m3jax.encode(m3, "the fox", **ALL)
        assert not done.is_set()
        np.testing.assert_allclose(again.dense_vecs, alone(m3, "the fox").dense, atol=1e-5)
    finally:
        release.set()
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("bad", [3, "a \ud83d"])
def test_nothing_is_computed_of_texts_of_which_one_is_refused(m3, monkeypatch, bad):
    computed = []
    monkeypatch.setattr(m3jax.encoding, "_WINDOW_TEXTS", 3)
    monkeypatch.setattr(m3jax.encoding, "forward", lambda *given: computed.append(given))
    with pytest.raises(ValueError, match=r"texts\[30\]"):
        m3jax.encode(m3, [*["the fox"] * 30, bad])
    assert not computed
