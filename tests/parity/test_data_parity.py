"""What FlagEmbedding makes of a row by its type and prompt, beside ours; and what it gets wrong there (PEER §2.1, §2.9).

Not here: the losses of rows without in-batch negatives (test_training_parity.py).
"""

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("grain", reason="training needs the train extra")
pytest.importorskip("tensorflow_datasets", reason="training needs the train extra")

from train.data.builders import prepare
from train.data.pipeline import Batches
from train.data.rows import TYPES
from train.data.streams import LengthGroup

GROUP = 4
ROWS = [
    {"query": "paris", "pos": ["the capital of france"], "neg": ["a fox", "the dog", "a cat"], "prompt": "what is "},
    {"query": "fox", "pos": ["the brown fox"], "neg": ["the river", "a house", "red house"], "prompt": "see "},
]


@pytest.fixture
def peer(flag_embedding):
    """peer(rows): the queries and the passages, one list a row, that FlagEmbedding trains on with batches of one dataset."""
    module = flag_embedding("abc.finetune.embedder.AbsDataset")
    dataset = object.__new__(module.AbsEmbedderSameDatasetTrainDataset)
    dataset.shuffle_ratio = 0.0
    dataset.args = SimpleNamespace(
        train_group_size=GROUP,
        knowledge_distillation=False,
        query_instruction_for_retrieval=None,
        query_instruction_format="{}{}",
        passage_instruction_for_retrieval=None,
    )

    def make(rows):
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        queries, passages, _ = dataset._create_batch_data(columns)
        size = len(passages) // len(queries)
        return queries, [passages[i : i + size] for i in range(0, len(passages), size)]

    return make


@pytest.fixture
def ours(tmp_path, tiny_tokenizer):
    """ours(rows): the same as token ids, from a batch."""

    def make(rows):
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        lengths = {"query_max_length": 64, "passage_max_length": 64}
        source = prepare([tmp_path / "rows.jsonl"], tiny_tokenizer, data_dir=tmp_path, **lengths)
        batch = Batches(source, seed=0, groups=[LengthGroup(64, len(rows))], group_size=GROUP, pad_id=1)[0]
        size = len(batch.passage_ids) // len(rows)
        passages = [
            ids[mask].tolist()
            for ids, mask, present in zip(batch.passage_ids, batch.passage_mask, batch.passage_present, strict=True)
            if present
        ]
        queries = [ids[mask].tolist() for ids, mask in zip(batch.query_ids, batch.query_mask, strict=True)]
        return queries, [passages[i : i + size] for i in range(0, len(passages), size)]

    return make


# What takes the places of negatives that a row of another type lacks differs on purpose: the peer has one of them twice.
@pytest.mark.parametrize(
    ("kind", "negatives"), [*((kind, 3) for kind in TYPES), ("only_1neg", 2), ("symmetric_class", 2)]
)
def test_types(peer, ours, tiny_tokenizer, kind, negatives):
    """The same texts in groups of the same size, the positive first."""
    rows = [row | {"type": kind, "neg": row["neg"][:negatives]} for row in ROWS]
    queries, passages = peer(rows)
    found, groups = ours(rows)

    def encoded(texts):
        return [ids.tolist() for ids in tiny_tokenizer.encode(texts)[0]]

    assert sorted(found) == sorted(encoded(queries))
    for query, texts in zip(encoded(queries), passages, strict=True):
        group, expected = groups[found.index(query)], encoded(texts)
        assert len(group) == len(expected) == (2 if kind == "only_1neg" else negatives + 1)
        assert group[0] == expected[0]
        if kind != "only_1neg":  # which draws one of its negatives
            assert sorted(group) == sorted(expected)


def test_peer_2_1_a_row_without_a_prompt(peer, ours, tiny_tokenizer):
    """PEER §2.1: there batches of one dataset without a prompt train "None" + query."""
    rows = [{name: value for name, value in row.items() if name != "prompt"} for row in ROWS]
    assert sorted(peer(rows)[0]) == ["Nonefox", "Noneparis"]
    assert sorted(ours(rows)[0]) == sorted(ids.tolist() for ids in tiny_tokenizer.encode(["fox", "paris"])[0])


def test_peer_2_9_a_row_without_negatives(peer, ours):
    """PEER §2.9: there it divides by zero."""
    rows = [row | {"neg": []} for row in (*ROWS, *({"query": q, "pos": [q], "prompt": ""} for q in ("a dog", "a cat")))]
    with pytest.raises(ZeroDivisionError):
        peer(rows)
    assert [len(group) for group in ours(rows)[1]] == [GROUP] * 4
