"""The schedule's corners, what decays, and the whole chain beside AdamW in NumPy."""

import jax
import numpy as np
import pytest

pytest.importorskip("optax", reason="training needs the train extra")

from configs import base
from m3jax.config import M3Config
from m3jax.model import flatten, shapes
from train.optimizer import decayed, learning_rate, make_optimizer


def config(**changes):
    settings = base.get_config()
    settings.update(steps=100, warmup=0.1, learning_rate=0.5, **changes)
    return settings


def test_schedule():
    rate = learning_rate(config())
    steps = [0, 1, 5, 10, 55, 99, 100]
    assert [float(rate(step)) for step in steps] == pytest.approx([0, 0.05, 0.25, 0.5, 0.25, 0.5 / 90, 0], abs=1e-7)
    highest = max(range(101), key=lambda step: float(rate(step)))
    assert highest == 10


def test_schedule_without_warmup_begins_at_its_highest():
    settings = config()
    settings.warmup = 0.0
    rate = learning_rate(settings)
    assert [float(rate(step)) for step in (0, 50, 100)] == pytest.approx([0.5, 0.25, 0])


def test_what_decays():
    decay = flatten(decayed(shapes(M3Config.tiny(num_hidden_layers=2))))
    assert {path for path, yes in decay.items() if yes} == {
        *(f"encoder/embeddings/{name}_embeddings/embedding" for name in ("word", "position", "token_type")),
        *(
            f"encoder/layers/{i}/{name}/kernel"
            for i in (0, 1)
            for name in ("q", "k", "v", "attention_out", "up", "down")
        ),
        "heads/sparse_linear/kernel",
        "heads/colbert_linear/kernel",
    }


def norm(tree):
    return np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree)))


def test_three_steps_beside_adamw_in_numpy():
    settings = config(clip=2.0, weight_decay=0.3, adam_b1=0.8, adam_b2=0.95, adam_eps=1e-3)
    random = np.random.default_rng(0)
    shape = {"up/kernel": (2, 3), "up/bias": (3,), "layer_norm/scale": (3,), "pooler/kernel": (2, 2)}
    params = {name: random.normal(size=size).astype(np.float32) for name, size in shape.items()}
    optimizer = make_optimizer(settings)
    state = optimizer.init(params)
    expected = {name: x.astype(np.float64) for name, x in params.items()}
    first, second = ({name: np.zeros(size) for name, size in shape.items()} for _ in range(2))
    for step, size in enumerate((10.0, 0.1, 3.0)):  # clipped, whole, clipped
        gradients = {name: random.normal(size=s).astype(np.float32) for name, s in shape.items()}
        gradients = {name: x * np.float32(size / norm(gradients)) for name, x in gradients.items()}
        updates, state = optimizer.update(gradients, state, params)
        params = {name: x + np.asarray(updates[name]) for name, x in params.items()}
        factor = min(1.0, 2.0 / norm(gradients))
        for name, gradient in gradients.items():
            first[name] = 0.8 * first[name] + 0.2 * gradient * factor
            second[name] = 0.95 * second[name] + 0.05 * (gradient * factor) ** 2
            moved = first[name] / (1 - 0.8 ** (step + 1)) / (np.sqrt(second[name] / (1 - 0.95 ** (step + 1))) + 1e-3)
            decay = 0.3 * expected[name] if name == "up/kernel" else 0.0
            expected[name] = expected[name] - 0.05 * step * (moved + decay)  # the rate climbs by 0.05 a step, from 0
    for name, x in params.items():
        np.testing.assert_allclose(x, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
