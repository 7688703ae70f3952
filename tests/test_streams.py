"""Which rows make batches with which, how many shapes there are, and what rows too few for a batch become."""

import warnings

import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets", reason="training needs the train extra")

from tests.memory_rows import Memory
from train.data.builders import Dataset
from train.data.streams import LengthGroup, Shape, group_sizes, make_streams, query_bucket, shapes
from train.start import PAPER_GROUPS

GROUPS = [LengthGroup(16, 4), LengthGroup(64, 2)]
THREE = [Dataset("a.jsonl", 10, False), Dataset("b.jsonl", 6, False), Dataset("c_no_in_batch_neg.jsonl", 8, True)]


def source(**changes):
    """Three datasets of 10, 6 and 8 rows with three negatives each; odd rows are long."""
    lengths = np.where(np.arange(24) % 2, 40, 9)
    return Memory(**{"positives": [1] * 24, "negatives": [3] * 24, "passages": lengths, "datasets": THREE} | changes)


def streams(of, groups=GROUPS, group_size=4, same_dataset=True, weights=()):
    return make_streams(of, groups, group_size, same_dataset, weights)


def refused(message, of, **changes):
    with pytest.raises(ValueError, match=message):
        streams(of, **changes)


def test_a_stream_is_of_one_dataset_and_length_group():
    of = source()
    made = streams(of, groups=[LengthGroup(16, 3), LengthGroup(64, 2)])
    assert [stream.group.batch_size for stream in made] == [3, 3, 3, 2, 2, 2]
    assert [stream.members.tolist() for stream in made[:3]] == [[0, 2, 4, 6, 8], [10, 12, 14], [16, 18, 20, 22]]
    assert [stream.members.tolist() for stream in made[3:]] == [[1, 3, 5, 7, 9], [11, 13, 15], [17, 19, 21, 23]]
    assert {stream.weight for stream in made} == {1.0}
    assert [(stream.dataset, stream.group.max_length) for stream in made] == [
        (dataset.path, bound) for bound in (16, 64) for dataset in THREE
    ]


def test_datasets_mix_where_that_is_asked():
    made = streams(source(), same_dataset=False)
    assert [stream.members.tolist() for stream in made] == [list(range(0, 24, 2)), list(range(1, 24, 2))]


def test_weights_are_of_datasets():
    made = streams(source(), groups=[LengthGroup(64, 2)], weights=(2, 0.1, 0.5))
    assert [stream.weight for stream in made] == [2, 0.1, 0.5]


def test_weights_that_mean_nothing_are_refused():
    refused(r"one number above 0 for each dataset, 3 in all; \(1, 2\) came", source(), weights=(1, 2))
    refused(r"one number above 0 .* \(1, 2, 0\) came", source(), weights=(1, 2, 0))
    refused(
        r"mixed batch .* could hold a row of a weight above 1 twice", source(), weights=(1, 2, 1), same_dataset=False
    )
    assert len(streams(source(), weights=(1, 1, 1), same_dataset=False)) == 2


def test_rows_of_a_dataset_too_few_for_a_batch_share_those_of_the_largest():
    """Datasets a, b and c have 5, 3 and 4 rows of each length."""
    with pytest.warns(UserWarning) as caught:
        made = streams(source(), groups=[LengthGroup(16, 4), LengthGroup(64, 5)], weights=(1, 2, 3))
    assert [str(w.message) for w in caught] == [
        "rows of up to 16 token ids that are too few for a batch of 4 share those of a.jsonl: 3 of b.jsonl. "
        "All of these come 1.38 times a round, where their weights are [1, 2].",
        "rows of up to 64 token ids that are too few for a batch of 5 share those of a.jsonl: 3 of b.jsonl, "
        "4 of c_no_in_batch_neg.jsonl. All of these come 1.92 times a round, where their weights are [1, 2, 3].",
    ]
    assert [(stream.dataset[0], len(stream.members)) for stream in made] == [("a", 8), ("c", 4), ("a", 12)]
    assert made[0].members.tolist() == [0, 2, 4, 6, 8, 10, 12, 14]
    assert [stream.weight for stream in made] == [(5 + 2 * 3) / 8, 3, (5 + 2 * 3 + 3 * 4) / 12]
    with pytest.warns(UserWarning, match=r"share those of a.jsonl: .*jsonl\.$"):  # none has enough alone
        (alone, _) = streams(source(), groups=[LengthGroup(16, 12), LengthGroup(64, 12)])
    assert len(alone.members) == 12


def test_rows_too_few_for_a_batch_together_go_with_longer_ones():
    groups = [LengthGroup(16, 13), LengthGroup(32, 13), LengthGroup(64, 6)]
    with pytest.warns(UserWarning) as caught:
        made = streams(source(), groups=groups)
    assert [str(w.message) for w in caught] == [
        "12 rows of up to 16 token ids are too few for a batch of 13; they go with those of up to 32.",
        "12 rows of up to 32 token ids are too few for a batch of 13; they go with those of up to 64.",
    ]
    assert [(s.group.batch_size, s.passage_length, len(s.members)) for s in made] == [
        (6, 40, 10),
        (6, 40, 6),
        (6, 40, 8),
    ]


def test_rows_too_few_for_the_last_group_are_an_error_that_names_sizes():
    message = (
        r"the length group up to 64 has 12 rows, fewer than its batch_size 13: .* "
        r"Groups: up to 16: 12 rows, batch 3, up to 64: 12 rows, batch 13"
    )
    refused(message, source(), groups=[LengthGroup(16, 3), LengthGroup(64, 13)])
    refused(message, source(), groups=[LengthGroup(16, 3), LengthGroup(64, 13)], same_dataset=False)


def test_rows_too_long_for_the_groups():
    refused(
        r"12 rows are longer than the last .* up to 40 token ids, the groups end at 16", source(), groups=GROUPS[:1]
    )


def test_rows_that_nothing_can_be_learnt_from_are_refused():
    without = [3] * 20 + [0] * 2 + [3] * 2
    refused(r"c_no_in_batch_neg\.jsonl: 2 of 8 rows have no negative", source(negatives=without))
    refused("have no negative", source(negatives=without), same_dataset=False)
    streams(source(negatives=[0] * 16 + [3] * 8), groups=[LengthGroup(64, 2)])  # of other datasets they are welcome


def test_a_row_brings_as_many_passages_as_its_type_says():
    kinds = ["normal", "only_1neg", "symmetric_sts", "symmetric_class", "symmetric_clustering"]
    of = Memory([1] * 15, [0] * 5 + [2] * 5 + [9] * 5, kinds=kinds * 3)
    assert group_sizes(of, 4).reshape(3, 5).tolist() == [[4, 2, 4, 1, 4], [4, 2, 4, 3, 4], [4, 2, 4, 4, 4]]
    alone = Memory(of.positives, of.negatives, kinds=kinds * 3, datasets=[Dataset("x_no_in_batch_neg", 15, True)])
    assert group_sizes(alone, 4).reshape(3, 5).tolist() == [[1, 1, 1, 1, 1], [3, 2, 3, 3, 3], [4, 2, 4, 4, 4]]
    assert group_sizes(of, 1).tolist() == [1, 2, 1, 1, 1] * 3


def test_a_stream_is_as_wide_as_its_widest_row():
    kinds = ["only_1neg"] * 10 + ["symmetric_class"] * 6 + ["normal"] * 8
    negatives = [3] * 10 + [1, 1, 1, 2, 1, 1] + [1] * 8
    made = streams(source(kinds=kinds, negatives=negatives), groups=[LengthGroup(64, 2)], group_size=8)
    assert [stream.group_size for stream in made] == [2, 3, 2]
    # Rows of symmetric_class and of a dataset without in-batch negatives have four at most, and nobody else has more places.
    mixed = streams(source(kinds=kinds), groups=[LengthGroup(64, 2)], group_size=8, same_dataset=False)
    assert [stream.group_size for stream in mixed] == [4]


def test_query_buckets_double():
    assert sorted({query_bucket(n) for n in range(1, 513)}) == [32, 64, 128, 256, 512]
    assert all(n <= query_bucket(n) <= max(32, 2 * n - 1) for n in range(1, 8193))


def test_query_lengths_stay_within_what_there_is():
    of = Memory([1] * 6, [3] * 6, queries=[4, 10, 18, 20, 30, 25], passages=[9, 9, 9, 9, 40, 40])
    of.query_max_length = 30
    made = streams(of, groups=[LengthGroup(16, 2), LengthGroup(20, 2), LengthGroup(64, 2)])
    assert [(s.query_length, s.passage_length) for s in made] == [(16, 16), (20, 16), (30, 40)]
    assert [s.queries_as_long_as(4) for s in made] == [16, 20, 30]


def test_lengths_are_multiples_of_the_step():
    """Of 16 here; of 128 for TPU's attention."""
    made = make_streams(source(), GROUPS, 4, True, (), step=16)
    assert {(s.query_length % 16, s.passage_length % 16) for s in made} == {(0, 0)}
    assert {s.passage_length for s in made} == {16, 48}
    assert made[0].queries_as_long_as(3) % 16 == 0


def test_few_shapes_are_compiled_however_many_datasets_there_are():
    """At the paper's settings, with queries and passages of every length: five query buckets in the groups that reach 512."""
    groups = [LengthGroup(length, 2) for length in PAPER_GROUPS]
    count = 20
    random = np.random.default_rng(0)
    each = 9 * 2 * 40
    lengths = np.tile(np.repeat([*PAPER_GROUPS], each // 9), count)
    lengths = lengths - random.integers(0, 400, len(lengths))
    queries = random.integers(4, 513, len(lengths)) // (1 + 7 * random.integers(0, 2, len(lengths)))
    of = Memory(
        [1] * len(lengths),
        [7] * len(lengths),
        queries=np.maximum(queries, 4),
        passages=lengths,
        datasets=[Dataset(str(number), each, False) for number in range(count)],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = streams(of, groups=groups, group_size=8)
    assert len(made) == 9 * count
    found = shapes(of, made)
    assert len(found) == 45
    assert {shape.query_length for shape in found} == {32, 64, 128, 256, 500, 512}
    assert {(shape.queries, shape.group_size) for shape in found} == {(2, 8)}
    assert len({shape.passage_length for shape in found}) == 9 and Shape(2, 8, 512, 8192) in found
