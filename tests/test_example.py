"""The worked example of a report: which query it shows."""

import pytest

pytest.importorskip("bm25s", reason="training needs the train extra")

from train.example import worked_example
from train.tasks import Task


def test_which_query_is_the_example(tiny_model):
    queries = {"a.sw": "paris", "b.sw": "fox", "c.de": "cat", "d.xx": "dog"}
    judged = {"d.xx": {"p": 0}, "c.de": {"p": 1}, "b.sw": {"p": 1}, "a.sw": {"p": 0}}
    task = Task("task", {"p": "quick brown fox"}, queries, judged)
    runs = {"dense": {"b.sw": {"p": 0.5}, "c.de": {"p": 0.5}}}
    found = worked_example(tiny_model, task, runs, "*.sw", "Swahili", lengths=(8, 8))
    # Queries without a relevant passage are not ranked: there is nothing to show of them.
    assert found is not None and found["query"] == "fox" and len(found["tops"]["dense"]) == 1
    assert all(worked_example(tiny_model, task, runs, none, "", lengths=(8, 8)) is None for none in ("*.xx", "*.yy"))
