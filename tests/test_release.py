"""What a run's results and settings say in the card of its model, and what they leave out."""

import re

import pytest
import yaml

pytest.importorskip("babel", reason="training needs the train extra")

from m3jax.config import M3Config
from train.data import cldr
from train.release import card_of_run

MODEL = M3Config.tiny()
SCORES = {"dense": {"ndcg_at_10": 0.5, "recall_at_100": 0.75}}
SETTINGS = {"seed": 7, "init_from": "", "learning_rate": 1e-5, "length_groups": ((16, 4),), "dtype": "float32"}


def results(init_from="", data="rows.jsonl", **more):
    config = {"init_from": init_from, "data": {"train": data}, "query_max_length": 8, "passage_max_length": 16}
    config["functions"] = ("dense", "sparse", "colbert")
    return {"name": "tiny", "config": config, "parameters": 1000, "rows": 12345} | more


def card(given):
    """(front matter, table of the training, the whole) of the card of the results."""
    text = card_of_run(MODEL, given, SETTINGS | {"init_from": given["config"]["init_from"]})
    section = text.partition("## Training\n")[2].partition("## Use")[0]
    rows = [re.sub(r"\\(\W)", r"\1", line)[2:-2].split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return yaml.safe_load(text.split("---\n")[1]), dict(rows[2:]), text


def test_settings_data_and_start():
    front, training, text = card(results())
    assert training == {
        "start": "random weights",
        "data": "rows.jsonl",
        "rows": "12,345",
        "query_max_length": "8",
        "passage_max_length": "16",
        "seed": "7",
        "learning_rate": "1e-05",
        "length_groups": "[[16, 4]]",
        "dtype": "float32",
    }
    assert not {"base_model", "language", "datasets", "license", "model-index"} & set(front)
    assert "# tiny\n" in text and "## Results" not in text


def test_what_training_left_out_is_said():
    given = results()
    assert "left out" not in card(given)[2]
    given["config"]["functions"] = ("dense",)
    assert "Training left out sparse and colbert: use what these give only if the model" in card(given)[2]


def test_a_parent_of_the_hub_and_one_of_this_machine(tmp_path, monkeypatch):
    front, training, text = card(results("BAAI/bge-m3"))
    assert front["base_model"] == training["start"] == "BAAI/bge-m3"
    assert "Fine-tuned from [BAAI/bge-m3](https://huggingface.co/BAAI/bge-m3)." in text
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "model").mkdir(parents=True)  # what looks like a name, but is there
    for local, shown in (("runs/model", "runs/model"), (str(tmp_path / "runs" / "model"), "model")):
        front, training, text = card(results(local))
        assert training["start"] == f"{shown}, a local model"
        assert "base_model" not in front and "huggingface.co/" not in text and str(tmp_path) not in text


def test_languages_where_the_data_tell_them(tmp_path):
    front, training, _ = card(results(data="cldr"))
    assert front["language"] == list(cldr.LANGUAGES)
    assert training["data"] == "cldr (names and facts of Unicode CLDR)"
    front, training, _ = card(results(data=f"cldr, {tmp_path}/secret/rows.jsonl"))
    assert "language" not in front
    assert training["data"] == "cldr (names and facts of Unicode CLDR), rows.jsonl"


def test_results_beside_those_before_training_and_bm25():
    both = {"bm25": {"ndcg_at_10": 0.25, "recall_at_100": 0.3}} | SCORES
    evaluations = [
        {"name": "test", "model": "trained", "scores": both, "queries": 2000, "passages": 6304},
        {"name": "test", "model": "untrained", "scores": {"dense": {"ndcg_at_10": 0.01, "recall_at_100": 0.02}}},
    ]
    front, _, text = card(results(evaluations=evaluations))
    (one,) = front["model-index"][0]["results"]
    assert {metric["name"]: metric["value"] for metric in one["metrics"]} == {
        "nDCG@10 (dense)": 0.5,
        "Recall@100 (dense)": 0.75,
    }
    assert re.findall(r"^\| (dense.*|BM25.*) \|$", text, re.MULTILINE) == [
        "dense | 0.500 | 0.750",
        "BM25 | 0.250 | 0.300",
        "dense, before training | 0.010 | 0.020",
    ]
    assert "\n- test: 2,000 queries, 6,304 passages\n" in text
