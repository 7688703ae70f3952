"""Losses of a teacher's scores, on a row's group and in sequence, and within the M3 loss."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3jax import losses
from tests.arrays import from_numpy
from tests.naive_losses import LAMBDAS, PARTS, naive_distillation, naive_info_nce, naive_logs, scores

group_distillation, m3_loss = from_numpy(losses.group_distillation), from_numpy(losses.m3_loss)
sequential_distillation = from_numpy(losses.sequential_distillation)


def teachers(rows=4, group=3, seed=5):
    """Scores of a teacher: row 1 has none, row 2 none of its last passage, row 3 two that are equal."""
    made = np.random.default_rng(seed).normal(size=(rows, group)).astype(np.float32)
    made[1], made[2, 2], made[3, 2] = -np.inf, -np.inf, made[3, 0]
    return made


def naive_target(row, temperature):
    """Place → softmax over the scores that there are."""
    scored = {place: math.exp(float(score) / temperature) for place, score in enumerate(row) if score > -np.inf}
    return {place: weight / sum(scored.values()) for place, weight in scored.items()}


def naive_group(teacher, student, positives, temperature, teacher_temperature):
    total = 0.0
    for row, scores_of, first in zip(teacher, student, positives, strict=True):
        target = naive_target(row, teacher_temperature)
        own = [place in target for place in range(len(row))]
        logs = naive_logs(scores_of[first : first + len(row)], temperature, own) if target else {}
        total -= sum(target[place] * logs[place] for place in target)
    return total / len(teacher)


def naive_sequential(teacher, student, positives, temperature, teacher_temperature, allowed=None):
    """One softmax for each passage, as the reference computes it: without the columns of the passages before."""
    total = 0.0
    for b, (row, scores_of, first) in enumerate(zip(teacher, student, positives, strict=True)):
        target = naive_target(row, teacher_temperature)
        left = [True] * len(scores_of) if allowed is None else list(allowed[b])
        for place in sorted(target, key=lambda place: -row[place]):
            total -= target[place] * naive_logs(scores_of, temperature, left)[first + place]
            left[first + place] = False
    return total / len(teacher)


TEACHING = {"group": (group_distillation, naive_group), "sequential": (sequential_distillation, naive_sequential)}


@pytest.mark.parametrize("kind", TEACHING)
@pytest.mark.parametrize(("temperature", "teacher_temperature"), [(0.02, 1.0), (1.0, 0.3)])
def test_teacher_by_hand(kind, temperature, teacher_temperature):
    made, positives = scores(group=3)
    ours, naive = TEACHING[kind]
    given = teachers(), made["dense"], positives, temperature, teacher_temperature
    value = ours(*given)
    assert value.dtype == jnp.float32 and value.shape == ()
    np.testing.assert_allclose(value, naive(*given), rtol=1e-5)
    np.testing.assert_allclose(ours(*given[:4]), naive(*given[:4], 1.0), rtol=1e-5)


def test_sequential_teacher_with_few_candidates_by_hand():
    made, positives = scores(group=3)
    allowed = np.random.default_rng(1).random((4, 12)) < 0.5
    for row in range(4):
        allowed[row, 3 * row : 3 * row + 3] = True
    given = teachers(), made["dense"], positives, 0.1, 1.0
    np.testing.assert_allclose(sequential_distillation(*given, allowed), naive_sequential(*given, allowed), rtol=1e-5)
    own = np.arange(12) // 3 == np.arange(4)[:, None]  # nobody outside
    np.testing.assert_allclose(sequential_distillation(*given, own), naive_sequential(*given, own), rtol=1e-5)


@pytest.mark.parametrize("kind", TEACHING)
@pytest.mark.parametrize("outside", [True, False])
def test_teacher_gradients_by_finite_differences(kind, outside):
    made, positives = scores(group=3, seed=3)
    ours, naive = TEACHING[kind]
    more = {} if kind == "group" or outside else {"allowed": np.arange(12) // 3 == np.arange(4)[:, None]}
    student = made["dense"]
    got = jax.grad(lambda s: ours(teachers(), s, positives, 0.2, 0.7, **more))(jnp.asarray(student))
    assert np.isfinite(got).all() and not got[1].any()  # row 1 has no scores
    step = 1e-5
    for index in np.ndindex(student.shape):
        ends = []
        for sign in (1, -1):
            moved = student.astype(np.float64)
            moved[index] += sign * step
            ends.append(naive(teachers(), moved, positives, 0.2, 0.7, **more))
        np.testing.assert_allclose(got[index], (ends[0] - ends[1]) / (2 * step), atol=2e-5)


def test_the_sequential_teacher_sorts():
    """The order of a group's passages says nothing: only the teacher's order does."""
    made, positives = scores(group=3)
    given, turned = teachers()[2:], np.array([2, 0, 1])
    student = made["dense"][2:]
    moved = student.copy()
    for row in (2, 3):
        moved[row - 2, 3 * row : 3 * row + 3] = student[row - 2, 3 * row + turned]
    given[1, 2] = 7.0  # two equal scores stay in the order they came in
    before = sequential_distillation(given, student, positives[2:], 0.1)
    after = sequential_distillation(given[:, turned], moved, positives[2:], 0.1)
    np.testing.assert_allclose(after, before, rtol=1e-6)


@pytest.mark.parametrize("teacher", ["", "group", "sequential"])
@pytest.mark.parametrize("distill", [0.0, 1.0])
def test_m3_loss_with_a_teacher(teacher, distill):
    """The group's loss comes to the hard one, the sequential one takes its place; rows without scores have the hard one."""
    made, positives = scores(group=3)
    given, allowed = teachers(), np.random.default_rng(1).random((4, 12)) < 0.7
    for row in range(4):
        allowed[row, 3 * row : 3 * row + 3] = True
    loss, parts = m3_loss(
        made, positives, temperature=0.1, distill=distill, allowed=allowed, teacher=teacher, teacher_scores=given,
        teacher_temperature=0.5,
    )  # fmt: skip
    expected = {}
    for name in (*PARTS, "hybrid"):
        hard = naive_info_nce(made[name], positives, 0.1, allowed)
        if teacher == "sequential":
            hard = naive_info_nce(made[name][1:2], positives[1:2], 0.1, allowed[1:2]) / 4
            expected[f"teacher/{name}"] = naive_sequential(given, made[name], positives, 0.1, 0.5, allowed)
        elif teacher:
            expected[f"teacher/{name}"] = naive_group(given, made[name], positives, 0.1, 0.5)
        expected[name] = hard
    for name in PARTS:
        expected[f"distill/{name}"] = naive_distillation(made["hybrid"], made[name], 0.1, allowed)
    assert {name: float(value) for name, value in parts.items()} == pytest.approx(expected, rel=1e-5)

    def total(prefix):
        return sum(
            lam * expected.get(prefix + name, 0) for lam, name in zip((*LAMBDAS, 1), (*PARTS, "hybrid"), strict=True)
        )

    plain = (total("") + total("teacher/")) / 4
    np.testing.assert_allclose(loss, (plain + total("distill/") / 3) / 2 if distill else plain, rtol=1e-5)


def test_without_any_scores_a_teacher_changes_nothing():
    made, positives = scores(group=3)
    none = np.full((4, 3), -np.inf, np.float32)
    plain = m3_loss(made, positives)[0]
    for teacher in ("group", "sequential"):

        def loss(made, teacher=teacher):
            return m3_loss(made, positives, teacher=teacher, teacher_scores=none)[0]

        value, slopes = jax.value_and_grad(loss)(jax.tree.map(jnp.asarray, made))
        np.testing.assert_allclose(value, plain, rtol=1e-6)
        assert all(np.isfinite(slope).all() and slope.any() for slope in slopes.values())
