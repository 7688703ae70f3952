import json

import numpy as np
import pytest

pytest.importorskip("grain")
pytest.importorskip("tensorflow_datasets")

from m3jax.batching import bucket_length
from tests.memory_rows import Memory
from train.data.builders import Dataset, prepare
from train.data.pipeline import Batches, prefetch, segments_shuffled
from train.data.streams import LengthGroup, Shape, query_bucket

GROUPS = [LengthGroup(48, 6), LengthGroup(112, 4)]


def texts(count, seed=0):
    random = np.random.default_rng(seed)
    words = ["fox", "dog", "paris", "the", "river", "house", "a", "capital", "what", "lives"]
    for i in range(count):
        yield f"{' '.join(random.choice(words, random.integers(1, 11)))} {i:b}".replace("0", "a").replace("1", "fox")


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


def batches(source, start=0, stop=30, **changes):
    arguments = dict(seed=3, groups=GROUPS, group_size=4, pad_id=1) | changes
    return list(prefetch(Batches(source, **arguments), start, stop))


def assert_same(left, right):
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        for x, y in zip(a, b, strict=True):
            assert x.dtype == y.dtype and x.shape == y.shape and (x == y).all()


def unpadded(ids, mask):
    return [tuple(row[m].tolist()) for row, m in zip(ids, mask, strict=True)]


# --- Batches ----------------------------------------------------------------------------------------------------------


def test_peer_2_7_resumed_equals_never_stopped(source):
    """PEER §2.7: there a run that goes on gets the same data again."""
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


def test_processes_hold_parts_of_a_batch(source):
    """Not always neighbours: a mesh of TPUs is laid out by its wires."""
    groups = [LengthGroup(48, 6), LengthGroup(112, 3)]
    outer, middle = (batches(source, groups=groups, held=held, parts=3) for held in ([0, 2], [1]))
    whole = batches(source, groups=groups)

    def join(outer, middle):
        size = len(middle)
        return np.concatenate([outer[:size], middle, outer[size:]])

    assert_same([type(a)(*map(join, a, b)) for a, b in zip(outer, middle, strict=True)], whole)


def test_passages_are_as_long_as_their_group_needs_and_queries_as_the_batch(source):
    prepared = Batches(source, seed=3, groups=GROUPS, group_size=4, pad_id=1)
    longest = np.maximum(source.query_lengths, source.passage_lengths)
    seen = set()
    for batch in prefetch(prepared, 0, 40):
        (rows, query_length), (passages, passage_length) = batch.query_ids.shape, batch.passage_ids.shape
        group = next(group for group in GROUPS if group.batch_size == rows)
        in_group = (longest > (0 if group is GROUPS[0] else 48)) & (longest <= group.max_length)
        assert passages == rows * 4
        assert passage_length == min(bucket_length(source.passage_lengths[in_group].max()), group.max_length)
        cap = min(query_bucket(source.query_lengths[in_group].max()), group.max_length)
        assert query_length == min(query_bucket(batch.query_mask.sum(axis=1).max()), cap)
        assert batch.query_mask.shape == batch.query_ids.shape and batch.passage_mask.shape == batch.passage_ids.shape
        assert batch.query_mask.dtype == bool and batch.query_ids.dtype == batch.passage_ids.dtype == np.int32
        assert batch.passage_identity.shape == (passages, 2) and batch.passage_identity.dtype == np.uint32
        assert (batch.passage_ids[~batch.passage_mask] == 1).all() and batch.passage_mask[:, 0].all()
        seen.add(Shape(rows, 4, query_length, passage_length))
    assert seen <= prepared.shapes and len(seen) > 2


def test_the_longest_query_of_all_processes_makes_the_shape():
    """A process alone would see a shorter one in half of its batches, and compile another program than the others."""
    source = Memory([1] * 8, [3] * 8, queries=[60, *[5] * 7])
    groups = [LengthGroup(64, 4)]
    halves = [batches(source, stop=20, groups=groups, held=[i], parts=2) for i in (0, 1)]
    lengths = [[batch.query_ids.shape[1] for batch in half] for half in halves]
    assert lengths[0] == lengths[1] and set(lengths[0]) == {32, 64}
    held = [[int(batch.query_mask.sum(axis=1).max()) for batch in half] for half in halves]
    assert held[0] != held[1]


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


def test_the_rows_of_a_step_are_traced_to_their_files(source):
    rows = source.rows(range(len(source)))
    prepared = Batches(source, seed=3, groups=GROUPS, group_size=4, pad_id=1)
    for step in range(8):
        group, places = prepared.places(step)
        batch = prepared[step]
        assert len(batch.query_ids) == group.batch_size == len(places)
        for place, query in zip(places, unpadded(batch.query_ids, batch.query_mask), strict=True):
            path, _, line = place.rpartition(":")
            assert path.endswith("rows.jsonl") and tuple(rows[int(line) - 1].query.tolist()) == query


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
    assert batch.passage_ids.shape == (3, 8) and batch.query_ids.shape == (3, 8)
    assert (batch.passage_ids[:, 1] == batch.query_ids[:, 1]).all()


def test_fill_takes_the_last_possible_passage():
    source = Memory([1, 1, 1, 1], [0, 0, 0, 0])
    for batch in batches(source, stop=5, groups=[LengthGroup(8, 2)], group_size=4):
        assert [sorted(rows.tolist()) for rows in batch.passage_ids[:, 1].reshape(2, 4)] == [[0, 1, 2, 3]] * 2


def test_reader_may_stop_early(source):
    iterator = prefetch(Batches(source, seed=0, groups=GROUPS, group_size=2, pad_id=1), 0, 10**9)
    assert next(iter(iterator)).query_ids.dtype == np.int32


# --- Datasets and types -----------------------------------------------------------------------------------------------

NO_IN_BATCH = Dataset("b_no_in_batch_neg.jsonl", 8, True)


def owners(batch):
    """For each row, which rows its query and its passages are of."""
    passages = np.where(batch.passage_present, batch.passage_ids[:, 1], -1).reshape(len(batch.query_ids), -1)
    return batch.query_ids[:, 1], passages


def test_batches_hold_one_dataset_as_often_as_weighted():
    source = Memory([1] * 24, [3] * 24, datasets=[Dataset("a", 16, False), Dataset("b", 8, False)])
    groups = [LengthGroup(8, 4)]
    made = batches(source, stop=40, groups=groups, weights=(0.5, 3))
    firsts = [set((owners(batch)[0] < 16).tolist()) for batch in made]
    assert all(len(of) == 1 for of in firsts) and firsts.count({True}) == 10
    mixed = [set((owners(batch)[0] < 16).tolist()) for batch in batches(source, groups=groups, same_dataset=False)]
    assert any(len(of) == 2 for of in mixed)


@pytest.mark.parametrize("same_dataset", [True, False])
def test_peer_2_2_rows_without_in_batch_negatives_are_marked_and_have_their_own_passages(same_dataset):
    """PEER §2.2: what the losses restrict themselves to; other rows' positives never fill their group."""
    kinds = ["normal"] * 8 + ["normal", "only_1neg", "symmetric_class", "symmetric_sts"] * 2
    source = Memory([2] * 16, [1] * 8 + [5, 5, 5, 2] * 2, kinds=kinds, datasets=[Dataset("a", 8, False), NO_IN_BATCH])
    seen = set()
    for batch in batches(source, groups=[LengthGroup(8, 4)], same_dataset=same_dataset):
        assert batch.own_group.dtype == bool and batch.own_group.shape == (4,)
        for query, passages, own in zip(*owners(batch), batch.own_group, strict=True):
            assert own == (query >= 8)
            if own:
                assert set(passages.tolist()) <= {query, -1}
                seen.add((kinds[query], (passages >= 0).sum()))
            else:
                assert (passages == query).sum() == 2 and (passages >= 0).all()
    assert seen == {("normal", 4), ("only_1neg", 2), ("symmetric_class", 4), ("symmetric_sts", 3)}


def test_types_bring_what_they_say():
    """only_1neg one negative, symmetric_class its own and no more, the others group_size − 1 with other rows' positives."""
    kinds = ["only_1neg", "symmetric_class", "symmetric_sts", "symmetric_clustering"]
    source = Memory([1] * 8, [3, 2, 1, 0, 0, 9, 9, 9], kinds=kinds * 2)
    expected = {0: (2, 2), 1: (3, 3), 2: (4, 2), 3: (4, 1), 4: (2, 1), 5: (4, 4), 6: (4, 4), 7: (4, 4)}
    for batch in batches(source, groups=[LengthGroup(8, 8)], stop=4):
        for query, passages in zip(*owners(batch), strict=True):
            assert ((passages >= 0).sum(), (passages == query).sum()) == expected[query]
            assert passages[0] == query


def test_fill_takes_several_positives_of_a_row_where_rows_are_few():
    source = Memory([3] * 5, [0] * 5)
    for batch in batches(source, stop=5, groups=[LengthGroup(8, 4)], group_size=8):
        keys = [{tuple(key) for key in row.tolist()} for row in batch.passage_identity.reshape(4, 8, 2)]
        assert [len(row) for row in keys] == [8] * 4


def test_places_without_a_passage_are_texts_of_no_term():
    source = Memory([1] * 4, [1, 3, 3, 3], kinds="symmetric_class")
    (batch,) = batches(source, groups=[LengthGroup(8, 4)], stop=1)
    empty = ~batch.passage_present
    assert empty.sum() == 2 and batch.passage_present.dtype == bool
    assert (batch.passage_ids[empty, :2] == [0, 2]).all() and (batch.passage_mask[empty].sum(axis=1) == 2).all()


def test_peer_2_9_rows_without_negatives():
    """PEER §2.9: `neg: []` divides by zero there; here other rows' positives take the places."""
    source = Memory([1] * 8, [0] * 8)
    for batch in batches(source, groups=[LengthGroup(8, 4)], stop=4):
        for query, passages in zip(*owners(batch), strict=True):
            assert passages[0] == query and (passages >= 0).all() and len(set(passages.tolist())) == 4


def test_only_1neg_alone_is_narrow():
    source = Memory([1] * 8, [3] * 8, kinds="only_1neg")
    (batch,) = batches(source, groups=[LengthGroup(8, 8)], stop=1)
    assert batch.passage_ids.shape == (16, 8) and batch.passage_present.all()


# --- Teacher's scores -------------------------------------------------------------------------------------------------


def test_scores_stand_beside_their_passages():
    """Row i's passage p has the score i + p / 10; odd rows have none, nor have places left or other rows' positives."""
    source = Memory([2] * 8, [1, 5] * 4, scored=np.arange(8) % 2 == 0)
    for batch in batches(source, groups=[LengthGroup(8, 8)], stop=4):
        assert batch.teacher_scores.shape == (8, 4) and batch.teacher_scores.dtype == np.float32
        numbers = batch.passage_ids[:, 2].reshape(8, 4)
        for scores, query, passages, number in zip(batch.teacher_scores, *owners(batch), numbers, strict=True):
            expected = np.where((passages == query) & (query % 2 == 0), query + number / 10, -np.inf)
            assert scores.tolist() == np.float32(expected).tolist()
            assert np.isfinite(scores).sum() == (0 if query % 2 else 2)


# --- Segments ---------------------------------------------------------------------------------------------------------


def test_segments_change_places_and_nothing_is_lost():
    ids = np.array([0, *range(10, 43), 2])
    orders = {tuple(segments_shuffled(ids, np.random.default_rng(seed)).tolist()) for seed in range(60)}
    assert len(orders) == 6
    thirds = [tuple(range(10 + 11 * i, 21 + 11 * i)) for i in range(3)]
    for order in orders:
        assert order[0] == 0 and order[-1] == 2
        assert sorted([order[1:12], order[12:23], order[23:34]]) == thirds
    assert sorted(segments_shuffled(np.array([0, 2]), np.random.default_rng(0))) == [0, 2]


def shuffled_texts(probability, seed=3, start=0):
    """Batches of long and short passages whose tokens count up, and for each passage whether it still does."""
    random = np.random.default_rng(0)
    source = Memory([1] * 40, [3] * 40)
    lengths = random.integers(20, 60, 40)
    rows = source.rows

    def counting(indices):
        made = rows(indices)
        for i, row in zip(indices, made, strict=True):
            row.passages[:] = [np.array([0, *range(10, 8 + lengths[i]), 2], np.int32) for _ in row.passages]
        return made

    source.rows, source.passage_lengths = counting, lengths.astype(np.int32)
    made = batches(source, start=start, groups=[LengthGroup(64, 8)], shuffle_segments=probability, seed=seed)
    texts = [ids[mask] for batch in made for ids, mask in zip(batch.passage_ids, batch.passage_mask, strict=True)]
    long = np.array([len(text) >= 32 for text in texts])
    return made, long, np.array([(np.diff(text[1:-1]) != 1).any() for text in texts])


def test_long_passages_are_shuffled_as_often_as_asked():
    for probability in (0.0, 0.3, 1.0):
        _, long, moved = shuffled_texts(probability)
        assert not moved[~long].any()
        assert moved[long].mean() == pytest.approx(probability * 5 / 6, abs=0.05)  # one order in six is the old one


def test_segments_follow_from_seed_row_and_epoch():
    whole, _, moved = shuffled_texts(0.5)
    assert_same(shuffled_texts(0.5, start=11)[0], whole[11:])
    plain = shuffled_texts(0.0)[0]
    for a, b in zip(whole, plain, strict=True):  # nothing else changes
        assert (a.query_ids == b.query_ids).all() and (a.passage_identity == b.passage_identity).all()
        assert (np.sort(a.passage_ids) == np.sort(b.passage_ids)).all()
    positives = np.concatenate([batch.passage_identity for batch in whole])[::4, 0]
    by_row = [dict(zip(positives[e], moved[::4][e], strict=True)) for e in (slice(0, 40), slice(40, 80))]
    assert by_row[0].keys() == by_row[1].keys() and by_row[0] != by_row[1]  # another draw in the next epoch


# --- Errors -----------------------------------------------------------------------------------------------------------


def test_fill_that_does_not_exist():
    message = r"5 rows of up to 8 token ids have fewer than 5 negatives .* 6 different ones are needed, 5 exist"
    with pytest.raises(ValueError, match=message):
        batches(Memory([1] * 5, [0] * 5), groups=[LengthGroup(8, 5)], group_size=6)


def test_bad_arguments(source):
    with pytest.raises(ValueError, match="multiple of the parts it is split into, 4; group 48 has 6"):
        batches(source, parts=4)
    with pytest.raises(ValueError, match="increasing order"):
        batches(source, groups=GROUPS[::-1])
    with pytest.raises(ValueError, match="increasing order"):
        batches(source, groups=[])
    with pytest.raises(ValueError, match="group_size must be at least 1"):
        batches(source, group_size=0)
