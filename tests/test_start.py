"""What a run starts from; whole runs that refuse to start are in e2e/test_train.py."""

import jax
import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets", reason="training needs the train extra")

import m3jax
from configs import base
from m3jax.config import M3Config
from m3jax.model import M3, cast, init
from train.start import length_groups, start_model


def test_a_batch_divides_by_the_devices():
    config = base.get_config()
    config.length_groups = ((64, 16), (128, 12))
    assert [tuple(group) for group in length_groups(config, 4)] == [(64, 16), (128, 12)]
    with pytest.raises(ValueError, match=r"8 devices .* up to 128 tokens it is 12; the nearest sizes are 8 and 16$"):
        length_groups(config, 8)
    with pytest.raises(ValueError, match=r"up to 64 tokens it is 16; the nearest sizes are 32$"):
        length_groups(config, 32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_to_go_on_with_is_float32_in_host_memory(tiny_tokenizer, tmp_path, dtype):
    """The mesh splits it; a copy on each device beside that would cost as much again as the largest part of a run."""
    model = M3Config.tiny(vocab_size=tiny_tokenizer.vocab_size)
    params = cast(init(model, jax.random.key(0)), dtype)
    m3jax.save(M3(model, params, tiny_tokenizer), tmp_path / "model")
    config = base.get_config()
    config.data.train, config.init_from = "rows.jsonl", str(tmp_path / "model")
    config.query_max_length = config.passage_max_length = 64
    found = start_model(config).params
    assert all(isinstance(x, np.ndarray) and x.dtype == np.float32 for x in jax.tree.leaves(found))
    assert all(
        np.array_equal(x, np.float32(y)) for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True)
    )
