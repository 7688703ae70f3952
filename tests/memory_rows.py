"""Training rows in memory with made-up ids, in place of prepared ones: row i's passages are [0, i, passage, 2]."""

import numpy as np

from train.data.builders import Dataset, Row
from train.data.rows import TYPES


class Memory:
    """A `Source`: numbers of positives and negatives, and what else differs from four ids a text and one normal dataset.

    scored: whether each row has scores; passage p of row i has i + p / 10.
    """

    query_max_length = 512

    def __init__(self, positives, negatives, *, queries=4, passages=4, kinds="normal", datasets=None, scored=False):
        count = len(positives)
        self.positives, self.negatives = np.array(positives, np.int32), np.array(negatives, np.int32)
        self.query_lengths, self.passage_lengths = (np.full(count, x, np.int32) for x in (queries, passages))
        kinds = [kinds] * count if isinstance(kinds, str) else kinds
        self.kinds = np.array([TYPES.index(kind) for kind in kinds], np.int32)
        self.datasets = datasets or [Dataset("rows.jsonl", count, False)]
        self.scored = np.full(count, scored)

    def __len__(self):
        return len(self.positives)

    def rows(self, indices):
        rows = []
        for i in map(int, indices):
            count = self.positives[i] + self.negatives[i]
            passages = [text(i, p, self.passage_lengths[i]) for p in range(count)]
            identity = np.array([(i, p) for p in range(count)], np.uint32)
            scores = np.array([i + p / 10 if self.scored[i] else -np.inf for p in range(count)], np.float32)
            query = text(i, 99, self.query_lengths[i])
            rows.append(Row(query, passages, int(self.positives[i]), identity, scores))
        return rows

    def places(self, indices):
        return [f"rows.jsonl:{i + 1}" for i in indices]


def text(row, passage, length):
    """[0, row, passage, 2], with 5s before the 2 where it is longer."""
    return np.array([0, row, passage, *[5] * (length - 4), 2], np.int32)
