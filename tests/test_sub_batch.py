"""Sub-batches beside the whole batch: values, gradients with dropout, what is kept, and whose rows a device computes."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.sub_batch import encode_in, sub_batches_of, sum_in

ROOT = Path(__file__).parents[1]


def encode(weights, x):
    """A row's result depends on that row alone."""
    hidden = jnp.tanh(x @ weights)
    return {"sum": hidden.sum(axis=1), "hidden": jnp.sin(hidden)}


def given():
    random = np.random.default_rng(0)
    return random.normal(size=(5, 4)).astype(np.float32), random.integers(-2, 3, (6, 5)), random.integers(-2, 3, (4, 5))


@pytest.mark.parametrize("counts", [(1, 1), (2, 1), (1, 4), (3, 2), (6, 4)])
def test_rows_come_back_in_their_order(counts):
    weights, *sides = given()

    def results(weights, counts):
        return encode_in(encode, weights, *((count, (x,)) for count, x in zip(counts, sides, strict=True)))

    def loss(weights, counts):
        first, second = results(weights, counts)
        return (first["sum"] * jnp.arange(6)).sum() + (first["hidden"] ** 2).sum() * (second["sum"] ** 2).sum()

    whole, parts = results(weights, (1, 1)), results(weights, counts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), parts, whole)
    expected, got = (jax.grad(loss)(weights, n) for n in ((1, 1), counts))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_sums_over_rows_add_up(count):
    weights, x, _ = given()

    def sums(weights, parts):
        return sum_in(parts, lambda weights, rows: jax.tree.map(jnp.sum, encode(weights, rows)), weights, x)

    def loss(weights, parts):
        found = sums(weights, parts)
        return found["sum"] * found["hidden"]

    for found, expected in zip(
        (sums(weights, count), jax.grad(loss)(weights, count)),
        (sums(weights, 1), jax.grad(loss)(weights, 1)),
        strict=True,
    ):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


def test_only_results_and_rows_are_kept():
    weights, x = jnp.ones((5, 400)), jnp.ones((60, 5), int)

    def kept(parts):
        residuals = jax.eval_shape(
            lambda w: jax.vjp(lambda w: encode_in(lambda *given: encode(*given)["sum"], w, (parts, (x,))), w)[1],
            weights,
        )
        return sum(leaf.size for leaf in jax.tree.leaves(residuals))

    assert kept(1) >= 60 * 400 > 10 * kept(6)


@pytest.mark.parametrize("count", [1, 2])
def test_rows_with_a_gradient_are_refused(count):
    weights, x, _ = given()
    for call in (lambda x: encode_in(encode, weights, (count, (x,))), lambda x: sum_in(count, encode, weights, x)):
        with pytest.raises(
            ValueError, match="rows have no gradient: they must be whole numbers, bools or keys, got float32"
        ):
            call(x.astype(np.float32))


@pytest.mark.parametrize(
    ("tokens", "rows", "length", "expected"),
    [
        (100, 10, 10, 1),
        (99, 10, 10, 2),
        (20, 10, 10, 5),
        (30, 10, 10, 5),
        (10, 10, 10, 10),
        (1, 10, 10, 10),
        (1, 7, 3, 7),
    ],
)
def test_how_many(tokens, rows, length, expected):
    assert sub_batches_of(tokens, rows, length) == expected


EIGHT = """
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import NamedSharding, PartitionSpec
import m3jax.xlm_roberta
from configs import base
from m3jax.config import M3Config
from m3jax.model import apply, shapes
from m3jax.sharding import BATCH, make_mesh, shardings
from train.data.pipeline import Batch
from train.optimizer import make_optimizer
from train.step import make_state, make_step
from train.sub_batch import SubBatches, encode_in

assert jax.device_count() == 8
jax.config.update("jax_disable_most_optimizations", True)  # of the compiler: the same mathematics and the same split
model = M3Config.tiny(num_hidden_layers=1, hidden_size=32, intermediate_size=64, vocab_size=40, colbert_dim=8)
settings = base.get_config()
settings.update(dropout=0.2, temperature=0.1, remat="elements", distill_start=0, warmup=0.0)
settings.update(learning_rate=1.0, adam_eps=1.0)  # of the gradient's size, where a small eps would give that of its rounding
optimizer = optax.chain(optax.trace(decay=0.0), make_optimizer(settings))  # keeps the gradient too
random = np.random.default_rng(0)
params = jax.tree.map(lambda x: random.normal(0, 0.3, x.shape).astype(np.float32), shapes(model))

def texts(count, length):
    ids = random.integers(4, 40, (count, length)).astype(np.int32)
    ids[:, 0] = 0
    mask = np.arange(length) < random.integers(3, length + 1, (count, 1))
    return np.where(mask, ids, 1), mask

ROWS, GROUP, LENGTH = 16, 2, 24
passages = ROWS * GROUP
identity = random.integers(2**32, size=(passages, 2), dtype=np.uint32)
batch = Batch(
    *texts(ROWS, 8), *texts(passages, LENGTH), identity, identity[::GROUP, None],
    np.ones(passages, bool), np.zeros(ROWS, bool), np.full((ROWS, GROUP), -np.inf, np.float32),
)

def run(mesh, parts):
    with jax.set_mesh(mesh):
        state = make_state(params, optimizer, mesh)
        rows = jax.device_put(batch, NamedSharding(mesh, BATCH))
        state, measures = make_step(model, settings, optimizer, mesh, state, parts)(state, rows)
    return float(measures["loss"]), jax.tree.map(np.asarray, (state.optimizer[0].trace, state.params))

one, (one_gradients, one_params) = run(make_mesh(devices=jax.devices()[:1]), SubBatches(1, 1))
scale = max(np.abs(x).max() for x in jax.tree.leaves(one_gradients))
assert max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (params, one_params)))) > 1e-2

def assert_close(got, expected):
    # by the norm of each tensor; k's bias has no gradient but rounding
    assert np.linalg.norm(got - expected) <= 1e-5 * max(np.linalg.norm(expected), 1e-2 * scale)

for sizes, parts in (((1, 1, 1), (4, 8)), ((8, 1, 1), (2, 4)), ((2, 2, 2), (2, 4))):
    count = sizes[0] * sizes[1] * sizes[2]
    value, (gradients, updated) = run(make_mesh(*sizes, devices=jax.devices()[:count]), SubBatches(*parts))
    np.testing.assert_allclose(value, one, rtol=1e-5)
    jax.tree.map(assert_close, gradients, one_gradients)
    jax.tree.map(assert_close, updated, one_params)
    print("equal on", sizes, "in", parts)

# A device's share of the work, counted in the compiled program (which counts the body of a loop once).
def work(mesh, split):
    def total(params, ids):
        def encode(params, ids):
            return apply(model, params, ids, ids != 1, remat="all").dense
        return (split(encode, params, (4, (ids,)))[0] ** 3).sum()

    given = shapes(model), jax.ShapeDtypeStruct((passages, LENGTH), jnp.int32)
    whole, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, BATCH)
    with jax.set_mesh(mesh):
        program = jax.jit(jax.grad(total), in_shardings=(whole, rows)).lower(*given).compile()
    return program.cost_analysis()["flops"]

def row_major(encode, params, side):
    count, (ids,) = side
    parts = jax.lax.map(jax.checkpoint(lambda ids: encode(params, ids)), ids.reshape(count, -1, ids.shape[1]))
    return [parts.reshape(-1, parts.shape[-1])]

alone, eight = (make_mesh(devices=jax.devices()[:n]) for n in (1, 8))
whole = work(alone, encode_in)
share = work(eight, encode_in) / whole
assert share < 0.2, share
m3jax.xlm_roberta.constrain = lambda x, spec: x
assert work(eight, row_major) / whole > 2 * share  # what rows that nothing holds in their places would look like
print("share of a device", share)
"""


def test_on_eight_devices_as_on_one_and_each_computes_its_own_rows():
    """PEER §2.3: there other devices' passages serve the dense loss alone, with 1/W of the gradient on W devices; here loss and
    gradients of all heads are those of one device.

    PEER §2.6: there sub-batches of unequal lengths crash with all heads; here they are the whole batch.
    """
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run([sys.executable, "-c", EIGHT], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
