"""Stage 1, 2 and 3 after each other on one small set: each starts from what the one before released."""

import itertools
import json

import pytest

pytest.importorskip("tensorflow_datasets", reason="training needs the train extra")
pytest.importorskip("optax", reason="training needs the train extra")

import jax
import numpy as np

import m3jax
import train.contrastive
import train.pretrain
from configs import dense, retromae, unified
from tests.small_run import SIZES, TRAINING, write


def stage(config, small_data, output, **changes):
    config.output = str(output)
    config.data.folder = str(output / "data")
    config.update({key: TRAINING[key] for key in ("passage_max_length", "length_groups", "steps", "remat")})
    config.update(learning_rate=1e-2, warmup=0.0, log_every=1, evaluate_untrained=False)
    config.update_from_flattened_dict(changes)
    return config


def test_each_stage_starts_from_the_one_before(small_data, tmp_path):
    rows = [json.loads(line) for line in (small_data / "train.jsonl").read_text().splitlines()]
    texts = write(tmp_path / "texts.jsonl", [{"text": text} for row in rows for text in (*row["pos"], *row["neg"])])
    first = retromae.get_config()
    first.model.update(SIZES)
    first.tokenizer = str(small_data / "tokenizer.json")
    train.pretrain.pretrain(stage(first, small_data, tmp_path / "1", **{"data.train": str(texts)}))
    of_rows = {
        "data.train": str(small_data / "train.jsonl"),
        "query_max_length": 8,
        "data.test": str(small_data / "test"),
    }
    second = stage(dense.get_config(), small_data, tmp_path / "2", init_from=str(tmp_path / "1" / "model"), **of_rows)
    results = train.contrastive.train(second)
    assert {*results["evaluations"][0]["scores"]} == {"bm25", "dense"}
    third = stage(unified.get_config(), small_data, tmp_path / "3", init_from=str(tmp_path / "2" / "model"), **of_rows)
    third.update(group_size=2, distill_start=2)
    results = train.contrastive.train(third)
    assert "all" in results["evaluations"][0]["scores"]

    models = [m3jax.load(tmp_path / name / "model", heads="init" if name == "1" else "require") for name in "123"]
    for before, after in itertools.pairwise(models):
        moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before.params["encoder"], after.params["encoder"])
        # Trained, and not from elsewhere: random weights of this size differ by more than a few steps move them.
        assert max(jax.tree.leaves(moved)) < 0.2, moved
        assert all(moved["layers"][0][name]["kernel"] > 1e-3 for name in ("q", "k", "v", "up", "down")), moved
