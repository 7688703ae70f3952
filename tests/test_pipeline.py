import itertools
import json
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("grain")
pytest.importorskip("tensorflow_datasets")

from m3jax.batching import bucket_length
from train.data.builders import Row, prepare
from train.data.pipeline import Batches, LengthGroup, Order, make_batches, prefetch, shuffled

GROUPS = [LengthGroup(48, 6), LengthGroup(112, 4)]


def texts(count, seed=0):
    random = np.random.default_rng(seed)
    words = ["fox", "dog", "paris", "the", "river", "house", "a", "capital", "what", "lives"]
    for i in range(count):
        yield f"{' '.join(random.choice(words, random.integers(1, 18)))} {i:b}".replace("0", "a").replace("1", "fox")


@pytest.fixture(scope="module")
def source(tiny_tokenizer, tmp_path_factory):
    """47 rows: some have 5 negatives, some 1 (another row's positive) or none; every fourth shares its positives with
    the row before."""
    folder = tmp_path_factory.mktemp("rows")
    supply = texts(1000)
    rows = []
    for i in range(47):
        positives = rows[-1]["pos"] if i % 4 == 3 else [next(supply) for _ in range(1 + i % 2)]
        negatives = [[next(supply) for _ in range(5)], rows[-2]["pos"][:1] if i > 1 else ["dog"], []][i % 3]
        rows.append({"query": next(supply), "pos": positives, "neg": negatives})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return prepare(
        [folder / "rows.jsonl"], tiny_tokenizer, data_dir=folder, query_max_length=112, passage_max_length=112
    )


class Memory:
    """A source in memory with made-up ids: row i's passages are [0, i, passage, 2]."""

    def __init__(self, positives, negatives):
        self.positives = np.array(positives, np.int32)
        self.negatives = np.array(negatives, np.int32)
        self.query_lengths = self.passage_lengths = np.full(len(positives), 4, np.int32)
        self.query_max_length = 6

    def __len__(self):
        return len(self.positives)

    def rows(self, indices):
        rows = []
        for i in map(int, indices):
            passages = [np.array([0, i, p, 2], np.int32) for p in range(self.positives[i] + self.negatives[i])]
            identity = np.array([(i, p) for p in range(len(passages))], np.uint32)
            rows.append(Row(np.array([0, i, 99, 2], np.int32), passages, int(self.positives[i]), identity))
        return rows


def batches(source, start=0, stop=30, **changes):
    arguments = dict(seed=3, groups=GROUPS, group_size=4, pad_id=1) | changes
    return list(make_batches(source, start_step=start, num_steps=stop, **arguments))


def assert_same(left, right):
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        for x, y in zip(a, b, strict=True):
            assert x.dtype == y.dtype and x.shape == y.shape and (x == y).all()


def unpadded(ids, mask):
    return [tuple(row[m].tolist()) for row, m in zip(ids, mask, strict=True)]


# --- The order --------------------------------------------------------------------------------------------------------

SIZES = [
    ([60], [7]),
    ([23], [5]),
    ([10], [5]),
    ([9], [8]),
    ([8], [8]),
    ([6], [1]),
    ([16], [8]),
    ([17, 40, 9, 0], [4, 6, 9, 3]),
]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 60, 64, 65, 1000])
def test_shuffle_is_a_fair_permutation(count):
    seeds = 200 if count < 100 else 3
    orders = np.array([shuffled(np.arange(count), count, seed) for seed in range(seeds)])
    assert (np.sort(orders, axis=1) == np.arange(count)).all()
    if 1 < count < 10:
        counts = [Counter(column) for column in orders.T.tolist()]
        assert all(abs(c[place] - seeds / count) < 5 * (seeds / count) ** 0.5 for c in counts for place in range(count))
    if count > 10:  # neither neighbours nor a fixed stride
        steps = np.diff(orders, axis=1) % count
        assert (steps == 1).mean() < 3 / count + 0.01
        assert min(len(np.unique(row)) for row in steps) > count / 4


@pytest.mark.parametrize(("sizes", "batch_sizes"), SIZES)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_row_once_per_epoch_and_never_twice_in_a_batch(sizes, batch_sizes, seed):
    order = Order(seed, sizes, batch_sizes)
    epochs = 13
    seen = Counter()
    for step in range(order.steps_in(epochs)):
        draw = order.draw(step)
        assert len(draw.places) == len(set(draw.places.tolist())) == batch_sizes[draw.group]
        seen.update(zip(itertools.repeat(draw.group), draw.epochs.tolist(), draw.places.tolist()))
    assert set(seen.values()) == {1}
    for group, (n, b) in enumerate(zip(sizes, batch_sizes, strict=True)):
        places = Counter((epoch, place) for g, epoch, place in seen if g == group)
        assert len(places) == epochs * n // b * b
        for epoch in range(epochs - 1):  # the last epoch's remainder waits for the next
            assert sum(e == epoch for e, _ in places) == n


def test_rounds_are_in_proportion_and_shuffled():
    order = Order(0, [30, 90], [3, 9])
    groups = [order.draw(step).group for step in range(order.steps_in(2))]
    assert len(groups) == 40
    assert Counter(groups[:20]) == Counter(groups[20:]) == {0: 10, 1: 10}
    assert groups[:20] != groups[20:] and groups[:20] != sorted(groups[:20])


def test_epochs_and_seeds_shuffle_anew():
    def epoch(seed, number):
        order = Order(seed, [40], [10])
        return frozenset(frozenset(order.draw(step).places.tolist()) for step in range(4 * number, 4 * number + 4))

    epochs = [epoch(seed, number) for seed in (0, 1) for number in (0, 1, 2)]
    assert len(set(epochs)) == 6  # other batches, not only the same in another order
    assert all(len(frozenset.union(*batches)) == 40 for batches in epochs)


def test_steps_far_into_a_huge_set_cost_nothing():
    order = Order(0, [1_200_000_000, 3_000_001], [1000, 7])
    draw = order.draw(10**12 + 7)
    assert draw.places.max() < 1_200_000_000 and len(np.unique(draw.places)) == len(draw.places)
    step = order.steps_in(5000)
    assert order.steps_in(5001) - step == pytest.approx(1_200_000 + 3_000_001 / 7, abs=2)


# --- Batches ----------------------------------------------------------------------------------------------------------


def test_resumed_equals_never_stopped(source):
    whole = batches(source)
    assert_same(batches(source, start=11), whole[11:])
    assert_same(batches(source), whole)
    assert not all(
        (a.query_ids.shape == b.query_ids.shape) and (a.query_ids == b.query_ids).all()
        for a, b in zip(whole, batches(source, seed=4), strict=True)
    )


def test_prefetch_keeps_the_order(source):
    direct = Batches(source, seed=3, groups=GROUPS, group_size=4, pad_id=1)
    assert_same(list(prefetch(direct, 0, 30)), [direct[step] for step in range(30)])
    assert list(prefetch(direct, 5, 5)) == []


def test_processes_hold_contiguous_slices(source):
    whole = batches(source)
    halves = [batches(source, process_index=i, process_count=2) for i in (0, 1)]
    assert_same([type(a)(*map(np.concatenate, zip(a, b, strict=True))) for a, b in zip(*halves, strict=True)], whole)


def test_shapes_are_static_and_fit(source):
    prepared = Batches(source, seed=3, groups=GROUPS, group_size=4, pad_id=1)
    longest = np.maximum(source.query_lengths, source.passage_lengths)
    expected = []
    for low, group in zip((0, 48), GROUPS, strict=True):
        rows = (longest > low) & (longest <= group.max_length)
        assert rows.any()
        lengths = [bucket_length(values[rows].max()) for values in (source.query_lengths, source.passage_lengths)]
        expected.append((group.batch_size, *lengths))
    shapes = set()
    for batch in prefetch(prepared, 0, 40):
        (rows, query_length), (passages, passage_length) = batch.query_ids.shape, batch.passage_ids.shape
        assert passages == rows * 4
        assert batch.query_mask.shape == batch.query_ids.shape and batch.passage_mask.shape == batch.passage_ids.shape
        assert batch.query_mask.dtype == bool and batch.query_ids.dtype == batch.passage_ids.dtype == np.int32
        assert batch.passage_identity.shape == (passages, 2) and batch.passage_identity.dtype == np.uint32
        assert (batch.passage_ids[~batch.passage_mask] == 1).all() and batch.passage_mask[:, 0].all()
        shapes.add((rows, query_length, passage_length))
    assert shapes == set(expected)


def test_the_rows_of_a_step_are_found_in_their_file(source):
    made = Batches(source, seed=3, groups=GROUPS, group_size=4, pad_id=1)
    assert sum(made.sizes) == len(source) == 47 and min(made.sizes) > 0
    for step in range(12):
        group, places = made.places(step)
        assert len(places) == group.batch_size and group in GROUPS
        lines = [int(place.rpartition("rows.jsonl:")[2]) for place in places]
        queries = [tuple(row.query.tolist()) for row in source.rows([line - 1 for line in lines])]
        assert queries == unpadded(made[step].query_ids, made[step].query_mask)


def test_rows_are_query_positive_negatives(source):
    rows = {tuple(row.query.tolist()): row for row in source.rows(range(len(source)))}
    all_positives = {tuple(k) for row in rows.values() for k in row.identity[: row.positives].tolist()}
    filled = drawn = 0
    positives_drawn = {}
    for batch in batches(source, stop=60):
        passages = unpadded(batch.passage_ids, batch.passage_mask)
        for i, query in enumerate(unpadded(batch.query_ids, batch.query_mask)):
            row = rows[query]
            keys = [tuple(key) for key in batch.passage_identity[4 * i : 4 * i + 4].tolist()]
            own = {tuple(k): tuple(ids.tolist()) for k, ids in zip(row.identity.tolist(), row.passages, strict=True)}
            positives = {tuple(key) for key in row.identity[: row.positives].tolist()}
            assert keys[0] in positives and not positives & set(keys[1:])
            assert len(set(keys)) == 4
            own_drawn = [key in own for key in keys[1:]]
            assert sum(own_drawn) == min(3, len(row.passages) - row.positives)
            assert all(key in all_positives for key, mine in zip(keys[1:], own_drawn, strict=True) if not mine)
            for key, ids in zip(keys, passages[4 * i : 4 * i + 4], strict=True):
                assert ids == own.get(key, ids)
            drawn += sum(own_drawn)
            filled += 3 - sum(own_drawn)
            positives_drawn.setdefault(query, set()).add(keys[0])
    assert filled and drawn
    assert any(len(keys) == 2 for keys in positives_drawn.values())  # both of two positives come


def test_draws_change_with_the_epoch():
    source = Memory([2] * 8, [9] * 8)
    epochs = batches(source, stop=10, groups=[LengthGroup(8, 8)], group_size=4)
    of_row_0 = {
        tuple(map(tuple, b.passage_identity[4 * i : 4 * i + 4].tolist()))
        for b in epochs
        for i in range(8)
        if b.query_ids[i, 1] == 0
    }
    assert len(of_row_0) > 5


def test_group_size_one_needs_no_negatives():
    source = Memory([1, 1, 1], [0, 0, 0])
    (batch,) = batches(source, stop=1, groups=[LengthGroup(8, 3)], group_size=1)
    assert batch.passage_ids.shape == (3, 8) and batch.query_ids.shape == (3, 6)
    assert (batch.passage_ids[:, 1] == batch.query_ids[:, 1]).all()


def test_fill_takes_the_last_possible_passage():
    source = Memory([1, 1, 1, 1], [0, 0, 0, 0])
    for batch in batches(source, stop=5, groups=[LengthGroup(8, 2)], group_size=4):
        assert [sorted(rows.tolist()) for rows in batch.passage_ids[:, 1].reshape(2, 4)] == [[0, 1, 2, 3]] * 2


def test_reader_may_stop_early(source):
    iterator = make_batches(source, seed=0, groups=GROUPS, group_size=2, start_step=0, num_steps=10**9, pad_id=1)
    assert next(iter(iterator)).query_ids.dtype == np.int32


# --- Errors -----------------------------------------------------------------------------------------------------------


def test_group_with_too_few_rows(source):
    message = r"group up to 48 has \d+ rows, fewer than its batch_size 40.*up to 48: \d+ rows, batch 40, up to 112: \d+"
    with pytest.raises(ValueError, match=message):
        batches(source, groups=[LengthGroup(48, 40), LengthGroup(112, 4)])


def test_rows_too_long_for_the_groups(source):
    with pytest.raises(ValueError, match=r"\d+ rows are longer than the last length group: .* the groups end at 48"):
        batches(source, groups=GROUPS[:1])


def test_fill_that_does_not_exist():
    message = r"5 rows .* fewer than 5 negatives .* 6 different ones are needed, 5 exist"
    with pytest.raises(ValueError, match=message):
        batches(Memory([1] * 5, [0] * 5), groups=[LengthGroup(8, 5)], group_size=6)


def test_bad_arguments(source):
    with pytest.raises(ValueError, match="multiple of the number of processes, 4; group 48 has 6"):
        batches(source, process_count=4)
    with pytest.raises(ValueError, match="increasing order"):
        batches(source, groups=GROUPS[::-1])
    with pytest.raises(ValueError, match="increasing order"):
        batches(source, groups=[])
    with pytest.raises(ValueError, match="group_size must be at least 1"):
        batches(source, group_size=0)
