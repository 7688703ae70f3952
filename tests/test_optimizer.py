"""The schedule's corners, what decays, and the whole chain beside AdamW in NumPy."""

import jax
import numpy as np
import pytest

pytest.importorskip("optax", reason="training needs the train extra")

from configs import base
from m3jax.config import M3Config
from m3jax.model import flatten, shapes
from m3jax.sharding import path_name
from train.optimizer import decayed, learning_rate, make_optimizer


def config(**changes):
    settings = base.get_config()
    settings.update({"steps": 100, "warmup": 0.1, "learning_rate": 0.5} | changes)
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


TREE = {
    "encoder/embeddings/position_embeddings/embedding": (3, 2),
    "encoder/layers/0/q/kernel": (2, 2),
    "heads/sparse_linear/kernel": (2, 1),
    "heads/colbert_linear/kernel": (2, 2),
}


def one_update(settings, factor=1.0):
    """What the first update moves each parameter by, its gradients all `factor`."""
    params = {name: np.ones(size, np.float32) for name, size in TREE.items()}
    optimizer = make_optimizer(settings)
    state = optimizer.init(params)
    gradients = jax.tree.map(lambda x: np.full_like(x, factor), params)
    updates, state = optimizer.update(gradients, state, params)
    return {name.split("/")[-2]: float(np.asarray(x).ravel()[0]) for name, x in updates.items()}, state


def moments(state):
    return [path for path, _ in jax.tree_util.tree_leaves_with_path(state) if "mu" in path_name(path).split("/")]


def test_frozen_parameters_stay_and_have_no_moments():
    everything, state = one_update(config(warmup=0.0, weight_decay=0.1))
    assert all(everything.values()) and len(moments(state)) == 4
    some, state = one_update(config(warmup=0.0, weight_decay=0.1, frozen=("positions", "sparse")))
    assert {name for name, x in some.items() if x} == {"q", "colbert_linear"} and len(moments(state)) == 2
    heads, _ = one_update(config(warmup=0.0, frozen=("encoder",)))
    assert {name for name, x in heads.items() if x} == {"sparse_linear", "colbert_linear"}
    dense, _ = one_update(config(warmup=0.0, weight_decay=0.1, functions=("dense",)))
    assert {name for name, x in dense.items() if x} == {"position_embeddings", "q"}


def test_what_is_frozen_does_not_count_in_the_norm_that_clips():
    settings = config(warmup=0.0, weight_decay=0.0, clip=1e-6, adam_eps=1.0)
    few, _ = one_update(settings.copy_and_resolve_references(), 1.0)
    settings.frozen = ("positions",)
    more, _ = one_update(settings, 1.0)
    sizes = [np.prod(size) for size in TREE.values()]
    assert more["q"] == pytest.approx(few["q"] * np.sqrt(sum(sizes) / sum(sizes[1:])), rel=1e-4)


def test_learning_rates_of_the_parts():
    settings = config(warmup=0.0, weight_decay=0.1)
    plain, _ = one_update(settings)
    settings.learning_rate_scale.update(encoder=0.5, sparse=2.0, colbert=3.0)
    scaled, _ = one_update(settings)
    factors = {name: scaled[name] / plain[name] for name in plain}
    assert factors == pytest.approx({"position_embeddings": 0.5, "q": 0.5, "sparse_linear": 2.0, "colbert_linear": 3.0})


def test_gradients_of_several_batches_are_averaged():
    settings = config(warmup=0.0, weight_decay=0.0, clip=1e9, adam_eps=1.0)
    expected, _ = one_update(settings, 2.0)
    settings.accumulate = 2
    optimizer = make_optimizer(settings)
    params = {name: np.ones(size, np.float32) for name, size in TREE.items()}
    state, updates = optimizer.init(params), []
    for factor in (1.0, 3.0):
        given, state = optimizer.update(jax.tree.map(lambda x, f=factor: np.full_like(x, f), params), state, params)
        updates.append(given)
    assert not any(np.any(x) for x in updates[0].values())
    got = {name.split("/")[-2]: float(np.asarray(x).ravel()[0]) for name, x in updates[1].items()}
    assert got == pytest.approx(expected)


def test_the_schedule_counts_updates():
    settings = config(accumulate=4)  # 100 steps are 25 updates, of which 2.5 are warm-up
    rate = learning_rate(settings)
    assert float(rate(25)) == 0 and max(range(26), key=lambda update: float(rate(update))) == 2
