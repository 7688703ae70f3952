"""The results of invented runs as text: the order of rows, the marks of matched terms, nothing that controls a terminal."""

import re

import pytest

from m3jax.retrieval import FUNCTIONS
from train.tables import format_example, format_table


def test_table_is_aligned_and_in_order():
    scores = {name: {"ndcg_at_10": 0.5, "recall_at_100": 0.75} for name in FUNCTIONS}
    sizes = {"name": "test", "queries": 1500, "passages": 5400}
    untrained = sizes | {"model": "untrained", "scores": scores}
    trained = sizes | {"model": "trained", "scores": scores | {"bm25": {"ndcg_at_10": 0.25, "recall_at_100": 0.5}}}
    table = format_table({"name": "run", "evaluations": [untrained, trained]})
    lines = table.splitlines()
    labels = ["BM25", *FUNCTIONS, *(f"before {name}" for name in FUNCTIONS)]
    assert lines[0].split() == ["test"] and lines[1].split() == ["nDCG@10", "Recall@100"]
    assert [re.split(r"\s{2,}", line)[0] for line in lines[2:-1]] == labels
    assert len({len(line) for line in lines[1:-1]}) == 1
    assert lines[-1] == "test: 1,500 queries, 5,400 passages"
    assert format_table({"name": "bare", "evaluations": []}) == ""


def test_absent_scores_are_dashes():
    sets = [
        {"name": "test", "model": "trained", "scores": {"bm25": {"ndcg_at_10": 0.147}, "all": {"ndcg_at_10": 0.82}}},
        {"name": "unseen", "model": "trained", "scores": {"all": {"ndcg_at_10": 0.4321, "recall_at_100": 0.9}}},
    ]
    lines = format_table({"name": "run", "evaluations": sets}).splitlines()
    assert [line.split() for line in lines if line.startswith(("BM25", "all "))] == [
        ["BM25", "0.147", "–", "–", "–"],
        ["all", "0.820", "–", "0.432", "0.900"],
    ]


@pytest.mark.parametrize(
    ("text", "matched", "marked"),
    [
        ("Kenya: shilingi ya Kenya", ["▁Ken", "ya"], "[Kenya]: shilingi ya [Kenya]"),
        ("Kenya: shilingi ya Kenya", ["▁ya"], "Kenya: shilingi [ya] Kenya"),
        ("Kenya ya", ["ya"], "Ken[ya] [ya]"),
        ("KENYA", ["kenya"], "[KENYA]"),
        ("a.b (c)", ["a.b", "(c)"], "[a.b] [(c)]"),
        ("คีเนีย", ["ค"], "[คี]เนีย"),
        ("ﬁsh", ["fish"], "ﬁsh (also matched: [fish])"),
        ("abc", ["ab", "bc"], "[abc]"),
        ("a b", ["▁", ""], "a b"),
    ],
)
def test_matched_terms_are_marked(text: str, matched: list[str], marked: str):
    example = {"query": "q", "tops": {"sparse": [{"text": text, "score": 0.5, "matched": matched}]}}
    assert format_example(example) == f"Query: q\nsparse\n  1  0.500     {marked}"


def test_bold_is_only_where_asked_and_control_characters_never_reach_the_terminal():
    top = {"text": "Kenya\n\x1b[2J", "score": 0.5, "relevant": True, "matched": ["Kenya"]}
    example = {"query": "q\x1b[2J", "tops": {"sparse": [top]}}
    assert "\x1b" not in format_example(example)
    assert format_example(example, bold=True).endswith("✓  \x1b[1mKenya\x1b[0m [2J")
    assert format_example(example, bold=True).count("\x1b") == 2
