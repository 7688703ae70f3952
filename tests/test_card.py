"""The model card: its front matter as the hub reads it, its body, and the mark that tells it from a person's own.

Not here: what of a run stands in it (test_release.py), where it is written (test_weights.py).
"""

import re

import jax
import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

import m3jax
from m3jax.card import is_ours, make_card
from m3jax.config import M3Config

CONFIG = M3Config.tiny(vocab_size=1234)
SCORES = {"ndcg_at_10": 0.751, "recall_at_100": 0.9391234}
TITLES = {"nDCG@10": np.float64(SCORES["ndcg_at_10"]), "Recall@100": SCORES["recall_at_100"]}
TEXT = st.text(st.characters(codec="utf-8"), min_size=1)


def front_of(card):
    """The front matter by PyYAML alone, found as Jekyll and the hub find it."""
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])


def headings(card):
    return re.findall(r"^#+ .*$", re.sub(r"```.*?```", "", card, flags=re.DOTALL), re.MULTILINE)


def cells(card):
    """The rows of the card's tables as a Markdown reader sees them."""
    lines = [line for line in card.splitlines() if line.startswith("| ")]
    return [[re.sub(r"\\(\W|_)", r"\1", cell.strip()) for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_what_the_model_alone_tells():
    card = make_card(CONFIG, 98765)
    assert front_of(card) == {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["sentence-transformers", "sentence-similarity", "feature-extraction", "m3jax"],
    }
    assert headings(card) == ["# M3-Embedding", "## Use"]
    for part in ("2 layers × 64", "98,765 parameters", "1,234 token ids", "up to 126 tokens", "max_length=126"):
        assert part in card
    assert not re.search("unknown|license|none|null|nan", card, re.IGNORECASE)


def test_all_that_can_be_told():
    card = make_card(
        CONFIG,
        98765,
        name="mine",
        base_model="BAAI/bge-m3",
        languages=["no", "sw"],  # no is false in YAML
        training={"seed": "0", "data": "rows.jsonl"},
        measured={"dense": {"test": TITLES, "test-unseen": TITLES}},
        compared={"BM25": {"test": {"nDCG@10": 0.114}}},
        notes=["test: 2,000 queries"],
    )
    front = front_of(card)
    assert (front["base_model"], front["language"]) == ("BAAI/bge-m3", ["no", "sw"])
    (index,) = front["model-index"]
    assert index["name"] == "mine"
    assert [one["dataset"] for one in index["results"]] == [
        {"type": "custom", "name": name, "config": name} for name in ("test", "test-unseen")
    ]
    for one in index["results"]:
        assert {metric["type"]: metric["value"] for metric in one["metrics"]} == SCORES
        assert [metric["name"] for metric in one["metrics"]] == ["nDCG@10 (dense)", "Recall@100 (dense)"]
    assert headings(card) == ["# mine", "## Results", "## Training", "## Use"]
    rule = ["---"] * 5
    assert cells(card) == [
        ["", "test: nDCG@10", "test: Recall@100", "test-unseen: nDCG@10", "test-unseen: Recall@100"],
        rule,
        ["dense", "0.751", "0.939", "0.751", "0.939"],
        ["BM25", "0.114", "–", "–", "–"],
        ["", ""],
        rule[:2],
        ["seed", "0"],
        ["data", "rows.jsonl"],
    ]
    assert "\n- test: 2,000 queries\n" in card and "(https://huggingface.co/BAAI/bge-m3)" in card


def test_the_hub_s_own_reader(tmp_path):
    (tmp_path / "README.md").write_text(make_card(CONFIG, 1, name="mine", measured={"all": {"test": TITLES}}))
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.model_name == "mine" and data.pipeline_tag == "sentence-similarity"
    assert {one.metric_type: one.metric_value for one in data.eval_results} == SCORES


@settings(deadline=None)
@given(name=TEXT, test=TEXT, value=TEXT)
def test_any_text_is_quoted(name, test, value):
    card = make_card(CONFIG, 1, name=name, training={name: value}, measured={name: {test: TITLES}})
    data = ModelCard(card).data
    assert data.model_name == (" ".join(name.split()) or "M3-Embedding")
    assert {(one.dataset_name, one.dataset_config) for one in data.eval_results} == {(" ".join(test.split()),) * 2}
    assert {one.metric_value for one in data.eval_results} == {*SCORES.values()}
    assert is_ours(card)


@pytest.mark.parametrize(
    "text", ["a \"b\" 'c': d", "a\n---\nb", "# a | b", "- a", "*a* _b_ [c](d) `e` <f>", "\\|", "日本"]
)
def test_texts_that_mean_something_in_yaml_or_markdown(text):
    card = make_card(CONFIG, 1, name=text, training={text: text}, measured={"dense": {text: TITLES}})
    assert front_of(card)["model-index"][0]["name"] == (line := " ".join(text.split()))
    assert cells(card)[-1] == [line, line] and cells(card)[0][1] == f"{line}: nDCG@10"
    # Markdown's own signs are escaped, words with an underscore inside stay readable.
    assert re.sub(r"\\(\W|_)", r"\1", headings(card)[0]) == f"# {line}"
    assert "| query_max_length | 1 |" in make_card(CONFIG, 1, training={"query_max_length": "1"})


def test_a_person_s_card_is_told_from_ours():
    card = make_card(CONFIG, 1, name="mine")
    assert is_ours(card) and is_ours(make_card(CONFIG, 2))
    changed = card.replace("---\n", "---\nlicense: mit\n", 1)
    for text in (changed, card + "More.\n", card[:-1], "", "# My model\n", card.rpartition("\n\n<!--")[0]):
        assert not is_ours(text)


def blocks(card, language):
    return re.findall(rf"```{language}\n(.*?)```", card, re.DOTALL)


@pytest.fixture(scope="module", params=[64, 32], ids=lambda width: f"colbert_dim {width}")
def saved(request, tmp_path_factory, tiny_tokenizer):
    """A directory with a model that `save` wrote."""
    config = M3Config.tiny(vocab_size=tiny_tokenizer.vocab_size, colbert_dim=request.param)
    directory = tmp_path_factory.mktemp("card") / "model"
    m3jax.save(m3jax.M3(config, m3jax.init(config, jax.random.key(0)), tiny_tokenizer), directory)
    return directory


def test_the_lines_to_use_it_in_m3jax_run(saved, monkeypatch, capsys):
    """As a reader copies them, DIR replaced; parity/test_card_parity.py runs the others."""
    monkeypatch.chdir(saved)
    lines = blocks((saved / "README.md").read_text(encoding="utf-8"), "python")[0]
    assert lines.startswith("import m3jax\n")
    exec(compile(lines.replace('"DIR"', '"."'), "the card's lines", "exec"), {})
    assert capsys.readouterr().out.startswith("[[")


def test_vllm_s_lines_stand_where_vllm_can_read_the_heads(saved):
    card = (saved / "README.md").read_text(encoding="utf-8")
    square = m3jax.load(saved).config.colbert_dim == 64
    serving = """vllm serve DIR --runner pooling --hf-overrides '{"architectures": ["BgeM3EmbeddingModel"]}'"""
    assert (serving in card) == ("--pooler-config.task" in card) == square
    assert ("colbert_dim=32" in card) == (not square)
