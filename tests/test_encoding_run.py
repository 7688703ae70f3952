"""How encode runs: windows, parts and their delivery, streams of texts, memory that runs out, errors, Ctrl-C.

Not here: its numbers (test_encoding.py); several devices (e2e/test_encode.py).
"""

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from jax.errors import JaxRuntimeError

import m3jax
import m3jax.arguments
import m3jax.encoding
from tests.random_model import random_model
from tests.texts_alone import ALL, TEXTS, alone, assert_same, model_of_1024, words

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def m3(tiny_tokenizer):
    return model_of_1024(tiny_tokenizer)


@pytest.fixture(scope="module")
def expected(m3):
    return [alone(m3, text) for text in TEXTS]


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

    plan = m3jax.arguments.make_plan(m3.config, **ALL, **asked)
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


SHORT_OF_MEMORY = """
import resource, sys, warnings
import numpy as np
import m3jax
m3 = m3jax.load(sys.argv[1])
texts = ["fox " * 400] * 16
m3jax.encode(m3, texts[:1], batch_tokens=512)  # what is loaded and compiled once is not the batch's
expected = m3jax.encode(m3, texts, batch_tokens=512).dense_vecs
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 40 * 2**20, resource.RLIM_INFINITY))
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    found = m3jax.encode(m3, texts, batch_tokens=1 << 20).dense_vecs
print([str(one.message)[:80] for one in said], abs(found - expected).max())
"""


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


def test_a_batch_is_halved_where_memory_is_really_short(tiny_tokenizer, tmp_path):
    """In the words of JAX, which on CPU are others where one program waits for another."""
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
    m3jax.save(random_model(tiny_tokenizer, **sizes, colbert_dim=8), tmp_path / "model")
    command = [sys.executable, "-c", SHORT_OF_MEMORY, str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "a batch of 16 x " in done.stdout and "did not fit" in done.stdout, done.stdout
    assert float(done.stdout.split()[-1]) < 1e-5


@pytest.mark.parametrize("batch_tokens", [200, 5000])
def test_peer_2_8_each_token_is_computed_once(m3, monkeypatch, batch_tokens):
    """PEER §2.8: there the first batch is computed twice, to see whether it fits."""
    computed, forward = [], m3jax.encoding.forward

    def counted(config, params, batch, asked):
        computed.append(np.count_nonzero(batch.segments))
        return forward(config, params, batch, asked)

    monkeypatch.setattr(m3jax.encoding, "forward", counted)
    m3jax.encode(m3, TEXTS, batch_tokens=batch_tokens)
    assert sum(computed) == sum(map(len, m3.tokenizer.encode(TEXTS)[0]))


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
    """PEER §2.8: there the batch is halved to 0, which is another error; here it is the device's own, and no other text is
    tried in vain."""
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
    """PEER §2.8: there every RuntimeError is taken for memory that ran out."""
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
