"""The order of rows: fair shuffles, every row as often as it should come, no row twice in a batch, any step at no cost."""

import itertools
from collections import Counter

import numpy as np
import pytest

from train.data.order import Order, shuffled

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
        assert len(draw.places) == len(set(draw.places.tolist())) == batch_sizes[draw.stream]
        seen.update(zip(itertools.repeat(draw.stream), draw.epochs.tolist(), draw.places.tolist()))
    assert set(seen.values()) == {1}
    for group, (n, b) in enumerate(zip(sizes, batch_sizes, strict=True)):
        places = Counter((epoch, place) for g, epoch, place in seen if g == group)
        assert len(places) == epochs * n // b * b
        for epoch in range(epochs - 1):  # the last epoch's remainder waits for the next
            assert sum(e == epoch for e, _ in places) == n


def test_rounds_are_in_proportion_and_shuffled():
    order = Order(0, [30, 90], [3, 9])
    groups = [order.draw(step).stream for step in range(order.steps_in(2))]
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


def test_weights_are_rows_seen_in_a_round():
    """A row of weight 2 comes twice as often as one of weight 1, one of 0.5 half as often, over any number of rounds."""
    order = Order(0, [40, 24, 60], [4, 3, 6], [2, 1, 0.5])
    assert [order.steps_in(r) for r in (1, 2, 10)] == [20 + 8 + 5, 2 * 33, 330]
    seen = Counter()
    for step in range(order.steps_in(2)):
        draw = order.draw(step)
        assert len(set(draw.places.tolist())) == len(draw.places)
        seen.update((draw.stream, place) for place in draw.places.tolist())
    assert seen == Counter({(s, p): n for s, (size, n) in enumerate([(40, 4), (24, 2), (60, 1)]) for p in range(size)})


def test_weights_do_not_drift():
    """A tenth of ten batches is one batch a round, in every round and after a billion of them."""
    order = Order(0, [100, 100], [10, 10], [0.1, 1])
    counts = [Counter(order.draw(step).stream for step in range(11 * r, 11 * r + 11)) for r in range(30)]
    assert all(count == {0: 1, 1: 10} for count in counts)
    assert order.steps_in(10**9) == 11 * 10**9


def test_a_stream_may_come_less_than_once_a_round():
    order = Order(0, [8, 6], [8, 6], [0.25, 0.3])
    streams = [order.draw(step).stream for step in range(order.steps_in(20))]
    assert Counter(streams) == {0: 5, 1: 6}
    for step in range(11):
        assert len(set(order.draw(step).places.tolist())) == len(order.draw(step).places)
