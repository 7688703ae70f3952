"""configs/finetune.py in small: rows held out and measured before and after, rounds in place of steps, what comes next."""

import json
import shlex
from pathlib import Path

import pytest

pytest.importorskip("tensorflow_datasets", reason="training needs the train extra")
pytest.importorskip("optax", reason="training needs the train extra")

import m3jax
import train.contrastive
from configs import finetune
from tests.random_model import random_model
from tests.small_run import SIZES, TRAINING
from train.start import data_paths
from train.tasks import read_task


@pytest.fixture(scope="module")
def parent(tiny_tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("parent") / "model"
    m3jax.save(random_model(tiny_tokenizer, colbert_dim=16, pooler=False, **SIZES), directory)
    return directory


def tuned(small_data, parent, output, **changes):
    config = finetune.get_config()
    config.init_from, config.output, config.dtype = str(parent), str(output), "float32"
    config.data.update(train=str(small_data / "train.jsonl"), folder=str(output / "data"), held_out=0.25)
    config.update(
        {key: TRAINING[key] for key in ("query_max_length", "passage_max_length", "length_groups", "group_size")}
    )
    config.learning_rate = 1e-2
    config.update_from_flattened_dict(changes)
    return config


def test_what_was_gained_and_forgotten_is_seen(small_data, parent, tmp_path, capsys):
    config = tuned(small_data, parent, tmp_path, **{"data.test": str(small_data / "test")})
    results = train.contrastive.train(config)
    rows = [json.loads(line) for line in (small_data / "train.jsonl").read_text().splitlines()]
    queries = {row["query"] for row in rows}
    paths = data_paths(config)
    held = read_task(paths.tests[0])
    left = [json.loads(line)["query"] for line in paths.train[0].read_text().splitlines()]
    assert {*held.queries.values()} | {*left} == queries and not {*held.queries.values()} & {*left}
    assert len(held.queries) == round(0.25 * len(queries)) and results["rows"] == len(left)
    assert results["config"]["data"]["train"] == str(small_data / "train.jsonl")
    found = [(one["name"], one["model"]) for one in results["evaluations"]]
    assert found == [("held-out", "trained"), ("test", "trained"), ("held-out", "untrained"), ("test", "untrained")]
    assert results["config"]["steps"] == round(2 * len(left) / 4)  # two rounds in batches of 4
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in lines) == results["config"]["steps"]
    assert any("dev/all/ndcg_at_10" in line for line in lines)  # held-out rows are dev too
    scores = {(one["name"], one["model"]): one["scores"]["dense"]["ndcg_at_10"] for one in results["evaluations"]}
    shown = capsys.readouterr().out
    changes = [scores[name, "trained"] - scores[name, "untrained"] for name in ("held-out", "test")]
    assert "nDCG@10, after − before\n" in shown
    assert ["dense", *(f"{change:+.3f}" for change in changes)] in [line.split() for line in shown.splitlines()]

    encode, evaluate, merge, serve = results["commands"]
    assert all(command in shown for command in results["commands"])
    data = ["--data", str(small_data / "test"), "--max_length", "16", "--query_max_length", "8"]
    assert shlex.split(evaluate)[-6:] == data and encode.startswith("python -c")
    assert shlex.split(serve)[:3] == ["vllm", "serve", str(tmp_path / "model")]
    assert Path(shlex.split(serve)[-1]).is_file()  # the card, with the lines of the other servers

    import convert.__main__

    assert convert.__main__.main(shlex.split(merge)[3:]) in (None, 0)
    merged, ours, theirs = (
        m3jax.load(path).params["heads"]["colbert_linear"]["kernel"]
        for path in (tmp_path / "merged", tmp_path / "model", parent)
    )
    assert abs(merged - (ours + theirs) / 2).max() < 1e-6 < abs(ours - theirs).max()


def test_no_server_is_named_that_could_not_read_the_model(small_data, parent, tmp_path):
    config = tuned(small_data, parent, tmp_path)
    sizes = m3jax.M3Config.tiny(colbert_dim=8, hidden_size=16, num_attention_heads=2)
    paths = data_paths(config)
    assert not any("vllm" in command for command in train.contrastive._next_commands(config, sizes, tmp_path, paths))
    sizes = m3jax.M3Config.tiny(colbert_dim=16, hidden_size=16, num_attention_heads=2)
    assert "vllm" in train.contrastive._next_commands(config, sizes, tmp_path, paths)[-1]


def test_rounds_and_shares_that_no_run_can_have(small_data, parent, tmp_path):
    for change, said in (
        ({"steps": 3}, r"steps = 3 and epochs = 2\.0, of which one is to be above 0"),
        ({"epochs": 0.0}, r"steps = 0 and epochs = 0\.0, of which one"),
        ({"data.held_out": 1.0}, r"data\.held_out = 1\.0, expected from 0 to below 1"),
    ):
        with pytest.raises(ValueError, match=said):
            train.contrastive.train(tuned(small_data, parent, tmp_path, **change))
