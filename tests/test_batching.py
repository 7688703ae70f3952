import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3jax.batching import bucket_length, pad, plan_batches

BUCKETS = sorted({bucket_length(n) for n in range(1, 8193)})


def test_ladder():
    assert len(BUCKETS) == 60 and BUCKETS[0] == 8 and BUCKETS[-1] == 8192
    for n in range(1, 8193):
        bucket = bucket_length(n)
        assert bucket == min(b for b in BUCKETS if b >= n)
        assert bucket % (128 if bucket > 512 else 8) == 0
        if 64 < n <= 512 or n > 1024:
            assert bucket - n < n / 8
    with pytest.raises(ValueError, match="a length of 0 came"):
        bucket_length(0)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.one_of(st.integers(1, 100), st.integers(1, 8192)), max_size=300),
    st.integers(1, 40_000),
    st.integers(1, 64),
)
def test_plan(lengths, batch_tokens, max_rows):
    batches = plan_batches(lengths, batch_tokens=batch_tokens, max_rows=max_rows)
    rows = np.concatenate([b.rows for b in batches]) if batches else np.array([], int)
    assert sorted(rows.tolist()) == list(range(len(lengths)))
    early = 0
    shapes = {}
    for b, following in itertools.zip_longest(batches, batches[1:]):
        assert 1 <= len(b.rows) <= b.row_count <= max_rows
        assert b.length == bucket_length(max(lengths[i] for i in b.rows))
        assert b.row_count * b.length <= batch_tokens or b.row_count == 1
        assert b.length <= 128 or min(lengths[i] for i in b.rows) > b.length // 2
        if following is None or (b.length > 128 and lengths[following.rows[0]] <= b.length // 2):
            early += 1
            assert b.row_count < 2 * len(b.rows)
        else:
            assert len(b.rows) == b.row_count == shapes.setdefault(b.length, b.row_count)
            assert b.row_count < 8 or b.row_count % 8 == 0
            assert (b.row_count + 8) * b.length > batch_tokens or b.row_count + 8 > max_rows
    # A batch with fillers closes the texts or stands before lengths of half its own: 8192, 4096 … 256, and one ≤ 128.
    assert early <= 8


def test_shapes_are_few():
    lengths = np.random.default_rng(0).integers(1, 8193, 20_000)
    shapes = {(b.row_count, b.length) for b in plan_batches(lengths, batch_tokens=65_536)}
    assert len(shapes) <= len(BUCKETS) + 8
    lengths = np.random.default_rng(0).integers(3, 100, 7)
    assert len(plan_batches(lengths, batch_tokens=65_536)) == 1


def test_padding_is_small():
    lengths = np.random.default_rng(0).lognormal(5, 0.8, 20_000).astype(int).clip(2, 8192)
    batches = plan_batches(lengths, batch_tokens=32_768)
    assert sum(b.row_count * b.length for b in batches) <= 1.08 * lengths.sum()


def test_one_text_over_the_budget_is_a_row():
    (batch, rest) = plan_batches([5000, 3], batch_tokens=100)
    assert (batch.rows.tolist(), batch.row_count, batch.length) == ([0], 1, 5120)
    assert rest.rows.tolist() == [1]


def test_no_texts_and_bad_budget():
    assert plan_batches([], batch_tokens=10) == []
    with pytest.raises(ValueError, match="0 and 5 came"):
        plan_batches([1], batch_tokens=0, max_rows=5)


@given(st.lists(st.lists(st.integers(0, 99), max_size=9), max_size=6), st.integers(0, 3))
def test_pad(texts, fillers):
    ids, mask = pad([np.array(t, np.int32) for t in texts], len(texts) + fillers, 9, pad_id=1)
    assert ids.shape == mask.shape == (len(texts) + fillers, 9) and ids.dtype == np.int32 and mask.dtype == bool
    assert [row[m].tolist() for row, m in zip(ids, mask, strict=True)] == texts + [[]] * fillers
    assert (ids[~mask] == 1).all()
    assert (np.diff(mask.astype(int)) <= 0).all()  # real tokens first


def test_pad_never_cuts():
    with pytest.raises(ValueError, match="at most 2 ids here; text 1 has 3"):
        pad([np.arange(2), np.arange(3)], 2, 2, 1)
    with pytest.raises(ValueError, match="2 texts do not fit into 1 rows"):
        pad([np.arange(2), np.arange(2)], 1, 2, 1)
