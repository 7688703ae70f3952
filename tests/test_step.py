"""The training step: what it does to the state, and how precise it is.

Not here: its loss (test_step_loss.py), and runs of many steps (e2e/test_train.py).
"""

import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("optax", reason="training needs the train extra")

import train.step
from m3jax.model import flatten, init
from m3jax.sharding import make_mesh
from tests.small_step import MODEL, batch, config, total
from train.optimizer import make_optimizer
from train.step import TrainState, loss_and_parts, make_state, make_step
from train.sub_batch import ONE_PASS, SubBatches

pytestmark = pytest.mark.usefixtures("compiled_quickly")


@pytest.fixture(scope="module")
def params():
    return init(MODEL, jax.random.key(0))


@pytest.mark.parametrize(("dtype", "precise"), [("float32", "HIGHEST"), ("bfloat16", "HIGH")])
def test_how_precise_a_step_is(params, dtype, precise):
    """Of the products; and the tables of embeddings, whose gradients are long sums, are float32 in any run."""
    settings, mesh = config(dtype=dtype), make_mesh()
    optimizer = make_optimizer(settings)
    with jax.set_mesh(mesh):
        state = make_state(params, optimizer, mesh)
        program = str(jax.make_jaxpr(make_step(MODEL, settings, optimizer, mesh, state))(state, batch()))
    assert set(re.findall(r"Precision\.(\w+)", program)) == {precise}
    assert f"f32[{MODEL.vocab_size},{MODEL.hidden_size}]" in program
    assert f"bf16[{MODEL.vocab_size},{MODEL.hidden_size}]" not in program


@pytest.fixture(scope="module")
def ran(params):
    """Four steps on one batch, with dropout, and self-distillation from step 2; then one step twice at a step of choice."""
    settings = config(dropout=0.3, distill_start=2)
    traces = []

    def counted(*arguments):
        traces.append(arguments)
        return loss_and_parts(*arguments)

    mesh, optimizer, measures = make_mesh(), make_optimizer(settings), []
    with jax.set_mesh(mesh), pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.step, "loss_and_parts", counted)
        fresh = make_state(jax.tree.map(np.array, params), optimizer, mesh)  # which it takes over
        before = jax.tree.map(np.array, fresh)
        step = make_step(MODEL, settings, optimizer, mesh, fresh)
        state = fresh
        for _ in range(4):
            state, measured = step(state, batch())
            measures.append({name: float(value) for name, value in measured.items()})

        def first_loss(number):
            state = make_state(before.params, optimizer, mesh)
            state = TrainState(state.params, state.optimizer, jax.device_put(jnp.int32(number), state.step.sharding))
            return float(step(state, batch())[1]["loss/dense"])

        by_step = {number: [first_loss(number) for _ in range(2)] for number in (0, 1)}
    return SimpleNamespace(fresh=fresh, before=before, state=state, measures=measures, traces=traces, by_step=by_step)


def test_distillation_starts_at_its_step_without_compiling_again(ran):
    assert len(ran.traces) == 1
    for number, measures in enumerate(ran.measures):
        parts = {name.removeprefix("loss/"): value for name, value in measures.items()}
        assert measures["loss"] == pytest.approx(total(parts, distill=number >= 2), rel=1e-5)
        assert abs(total(parts, True) - total(parts, False)) > 1e-3


def test_steps_are_counted(ran):
    assert int(ran.before.step) == 0 and int(ran.state.step) == 4 and ran.state.step.dtype == jnp.int32


def test_the_state_is_taken_over(ran):
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(ran.fresh))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(ran.state))


def test_only_the_pooler_stays(ran):
    before, after = flatten(ran.before.params), flatten(ran.state.params)
    same = {path for path, leaf in before.items() if np.array_equal(leaf, after[path])}
    assert same == {"encoder/pooler/kernel", "encoder/pooler/bias"}

    @jax.jit
    def loss(params, rows):
        return loss_and_parts(MODEL, config(), params, rows, False, jax.random.key(1))[0]

    assert loss(ran.state.params, batch()) < loss(ran.before.params, batch())


def test_dropout_is_another_at_each_step(ran):
    assert ran.by_step[0][0] == ran.by_step[0][1] == ran.measures[0]["loss/dense"]
    assert ran.by_step[1][0] == ran.by_step[1][1] != ran.by_step[0][0]


@pytest.mark.parametrize(("start", "expected"), [(-1, [0, 0, 0]), (0, [1, 1, 1]), (2, [0, 0, 1])])
def test_when_distillation_is_on(monkeypatch, start, expected):
    def loss(model, settings, params, rows, distill, key, sub_batches):
        return params["sparse_linear"]["kernel"].sum() * rows.query_ids.sum(), {"distill": distill}

    monkeypatch.setattr(train.step, "loss_and_parts", loss)
    settings = config(distill_start=start)
    mesh, optimizer = make_mesh(), make_optimizer(settings)
    with jax.set_mesh(mesh):
        state = make_state({"sparse_linear": {"kernel": np.ones((2, 1), np.float32)}}, optimizer, mesh)
        step = make_step(MODEL, settings, optimizer, mesh, state)
        seen = []
        for _ in expected:
            state, measures = step(state, batch())
            seen.append(int(measures["distill"]))
    assert seen == expected
    # The norm before clipping: what tells that training is about to break.
    assert float(measures["gradient_norm"]) == pytest.approx(np.sqrt(2) * abs(batch().query_ids.sum()))


@pytest.mark.parametrize("sub_batches", [ONE_PASS, SubBatches(2, 4)])
def test_what_is_frozen_has_no_gradient_and_batches_accumulate(params, sub_batches):
    settings = config(frozen=("encoder",), accumulate=2, distill_start=-1)
    mesh, optimizer = make_mesh(), make_optimizer(settings)
    with jax.set_mesh(mesh):
        state = make_state(jax.tree.map(np.array, params), optimizer, mesh)
        step, moved = make_step(MODEL, settings, optimizer, mesh, state, sub_batches), []
        for _ in range(2):
            state, measures = step(state, batch())
            now = zip(flatten(state.params).items(), flatten(params).values(), strict=True)
            moved.append({path.split("/")[0] for (path, x), before in now if np.any(x != before)})
    assert moved == [set(), {"heads"}]
    # The whole norm too, or what is frozen would be shown to be trained.
    norms = {name: float(value) for name, value in measures.items() if name.startswith("gradient_norm")}
    assert norms["gradient_norm/encoder"] == 0.0 < min(norms["gradient_norm/sparse"], norms["gradient_norm/colbert"])
    assert norms["gradient_norm"] == pytest.approx(math.hypot(*norms.values()) / 2**0.5)
