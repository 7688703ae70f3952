from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3jax.batching import arrange, bucket_length, pack, pad
from m3jax.encoding import _ROWS

STEPS = {8: 112, 64: 64, 128: 48}  # and the number of buckets up to 8192
# Texts of a mix, their lengths, and how many are packed together: as many as make a window of encode.
MIXES = {"queries": (8000, 5, 40, 8000), "passages": (4000, 50, 400, 4000), "documents": (1000, 1000, 8000, 250)}


@pytest.mark.parametrize("step", STEPS)
def test_ladder(step):
    lengths = range(1, 8193)
    of = [bucket_length(n, step) for n in lengths]
    buckets = sorted(set(of))
    assert len(buckets) == STEPS[step] and buckets[-1] == 8192
    assert all(bucket % step == 0 for bucket in buckets)
    assert of == [buckets[i] for i in np.searchsorted(buckets, lengths)]  # the smallest that holds it
    for doubling in (256, 512, 1024, 2048, 4096, 8192):
        assert len([bucket for bucket in buckets if doubling // 2 < bucket <= doubling]) <= 16
    padding = [1 - n / bucket for n, bucket in zip(lengths, of, strict=True) if n > 16 * step]
    assert max(padding) < 1 / 17 and 1 / 49 < np.mean(padding) < 1 / 47


@pytest.mark.parametrize(("length", "step"), [(0, 8), (-3, 8), (5, 0)])
def test_no_bucket(length, step):
    with pytest.raises(ValueError, match=f"a length of {length} and a step of {step} came"):
        bucket_length(length, step)


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.one_of(st.integers(1, 20), st.integers(1, 100), st.integers(1, 8192)), max_size=200),
    batch_tokens=st.one_of(st.integers(1, 2000), st.integers(1, 70_000)),
    row_length=st.sampled_from([1, 64, 512]),
    step=st.sampled_from([1, 8, 64, 128]),
    longer_rows=st.sampled_from([(), (600,), (1024, 2048, 4096), range(1024, 8193, 1024)]),
    row_multiple=st.integers(1, 8),
)
def test_pack(lengths, batch_tokens, row_length, step, longer_rows, row_multiple):
    given = {"batch_tokens": batch_tokens, "row_length": row_length, "step": step, "row_multiple": row_multiple}
    batches = list(pack(lengths, **given, longer_rows=longer_rows))
    placed = [text for batch in batches for text in batch.texts.tolist()]
    assert sorted(placed) == list(range(len(lengths)))
    left = sorted(lengths)
    for batch in batches:
        rows, length = batch.shape
        longest = left[-1]  # first
        needed, most = bucket_length(longest, step), batch_tokens // row_multiple
        assert rows * length <= max(batch_tokens, row_multiple * needed)
        shared = bucket_length(max(longest, min(row_length, sum(left))), step)
        own = [one for one in (longer_rows if longest > row_length else [shared]) if longest <= one <= most]
        assert length in (own or [needed])
        full = max(1, batch_tokens // (length * row_multiple)) * row_multiple
        used = batch.rows[-1] + 1
        assert rows % row_multiple == 0 and used <= rows < used + row_multiple  # no device has nothing but padding
        assert rows == full or rows // row_multiple in FEW
        in_rows = [[] for _ in range(used)]
        for text, row, start in zip(batch.texts, batch.rows, batch.starts, strict=True):
            in_rows[row].append((start, lengths[text]))
        assert batch.rows.tolist() == sorted(batch.rows)
        for texts in in_rows:
            # The longest that is left, and each next one where the one before ended: full until nothing fits.
            assert texts[0] == (0, left[-1])
            assert all(start + size == following for (start, size), (following, _) in pairwise(texts))
            for _, size in texts:
                left.remove(size)
            room = length - sum(size for _, size in texts)
            assert room >= 0 and not (left and left[0] <= room)
        if rows < full:  # for want of texts: the rest makes less than a batch as large
            assert sum(left) <= length * rows


FEW = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384)


def test_texts_of_like_length_keep_their_order():
    (batch,) = pack([7, 9, 7, 7, 9], batch_tokens=1000, row_length=16)
    assert batch.texts.tolist() == [1, 0, 4, 2, 3]


@pytest.mark.parametrize(("groups", "padding"), [(1, 0.05), (8, 0.075)])
@pytest.mark.parametrize("backend", _ROWS)
@pytest.mark.parametrize("mix", MIXES)
def test_padding_and_shapes_of_a_mix(mix, backend, groups, padding):
    """Small numbers of documents end in rows that eight devices do not fill: there it is more."""
    count, low, high, window = MIXES[mix]
    lengths = np.random.default_rng(0).integers(low, high + 1, count)
    batches = [
        batch.shape
        for start in range(0, count, window)
        for batch in _ROWS[backend].pack(lengths[start : start + window], None, groups)
    ]
    assert lengths.sum() / sum(rows * length for rows, length in batches) >= 1 - padding
    most = {"queries": 4, "passages": 40 if backend == "cpu" else 5, "documents": 64 if backend == "cpu" else 12}
    assert len(set(batches)) <= most[mix]


def test_documents_cost_little_more_in_rows_that_they_share():
    """Attention goes over whole rows: in operations at width 1024, beside rows that texts have to themselves."""
    count, low, high, window = MIXES["documents"]
    lengths = np.random.default_rng(0).integers(low, high + 1, count)
    batches = [
        batch.shape
        for start in range(0, count, window)
        for batch in _ROWS["tpu"].pack(lengths[start : start + window], None, 1)
    ]
    alone = (lengths * (6144 + lengths)).sum()
    assert sum(rows * length * (6144 + length) for rows, length in batches) < 1.25 * alone


def test_last_batches_come_in_few_shapes():
    rows = set()
    for count in range(1, 999):
        batches = [batch.shape[0] for batch in pack([64] * count, batch_tokens=64_000, row_length=64, row_multiple=2)]
        assert sum(batches) == -(-count // 2) * 2
        rows.update(batches)
    assert rows == {2 * groups for groups in FEW}


def test_a_text_beyond_the_budget_is_a_row():
    (one,) = pack([5000, 3, 70], batch_tokens=100)  # the others fit in beside it
    assert (one.texts.tolist(), one.starts.tolist(), one.shape) == ([0, 2, 1], [0, 5000, 5070], (1, 5120))
    first, second = pack([5120, 3], batch_tokens=100)
    assert (first.texts.tolist(), first.shape, second.shape) == ([0], (1, 5120), (1, 8))


@pytest.mark.parametrize(
    ("length", "batch_tokens", "groups", "shape"),
    [(1100, 2048, 8, (8, 1152)), (1100, 2048, 1, (1, 2048)), (5, 100, 1, (1, 128)), (5, 300, 1, (2, 128))],
)
def test_the_budget_holds_for_rows_that_texts_share(length, batch_tokens, groups, shape):
    """Of TPU's rows those of 1024 and more, and of 512 for short texts, where they are within it."""
    batches = list(_ROWS["tpu"].pack([length] * 100, batch_tokens, groups))
    assert batches[0].shape == shape


def test_no_texts_and_bad_numbers():
    assert list(pack([], batch_tokens=10)) == []
    for name in ("batch_tokens", "row_length", "step", "row_multiple"):
        with pytest.raises(ValueError, match="at least 1"):
            next(pack([1], **({"batch_tokens": 10} | {name: 0})))
    with pytest.raises(ValueError, match=r"10, 1, 8, 1, \[0, 5\] and 4 came"):
        next(pack([4], batch_tokens=10, longer_rows=(0, 5)))
    with pytest.raises(ValueError, match=r"10, 1, 8, 1, \[\] and 0 came"):
        next(pack([4, 0], batch_tokens=10))


def naive(packing, texts, pad_id, cls_every):
    """Token by token: ids, positions and segments of a batch, and the CLS columns of each text."""
    ids, positions, segments = (np.full(packing.shape, fill) for fill in (pad_id, pad_id, 0))
    columns = []
    for text, row, start in zip(texts, packing.rows, packing.starts, strict=True):
        segment = segments[row].max() + 1
        seen = 0
        for column, id in enumerate(text, start):
            seen += id != pad_id
            ids[row, column] = id
            positions[row, column] = pad_id + seen if id != pad_id else pad_id
            segments[row, column] = segment
        opens_a_run = range(0, len(text) - 1, cls_every) if cls_every else ()
        columns.append([start + i for i in range(len(text)) if i == 0 or i in opens_a_run])
    return ids, positions, segments, columns


@settings(max_examples=200, deadline=None)
@given(
    texts=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=30), min_size=1, max_size=30),
    batch_tokens=st.integers(1, 300),
    row_multiple=st.integers(1, 3),
    pad_id=st.integers(0, 2),
    cls_every=st.sampled_from([0, 1, 3, 10]),
)
def test_arrange(texts, batch_tokens, row_multiple, pad_id, cls_every):
    lengths = [len(text) for text in texts]
    for packing in pack(lengths, batch_tokens=batch_tokens, row_length=16, row_multiple=row_multiple):
        own = [texts[text] for text in packing.texts]
        got = arrange(packing, [np.array(text, np.int32) for text in own], pad_id, cls_every)
        ids, positions, segments, columns = naive(packing, own, pad_id, cls_every)
        assert got.ids.dtype == got.positions.dtype == got.segments.dtype == got.slots.dtype == np.int32
        np.testing.assert_array_equal(got.ids, ids)
        np.testing.assert_array_equal(got.positions, positions)
        np.testing.assert_array_equal(got.segments, segments)
        rows, slots, width = got.slots.shape
        assert rows == packing.shape[0]
        of_texts = got.slots.reshape(-1, width)[got.order]
        assert [row[row >= 0].tolist() for row in of_texts] == columns
        assert (np.diff((of_texts >= 0).astype(int)) <= 0).all()  # the real ones first
        assert (got.slots >= 0).sum() == sum(map(len, columns)) and len(set(got.order)) == len(own)
        assert (got.order // slots == packing.rows).all()
        # Powers of two, so that few shapes are compiled.
        assert slots.bit_count() == width.bit_count() == 1
        assert slots < 2 * np.bincount(packing.rows).max() and width < 2 * max(map(len, columns))


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
