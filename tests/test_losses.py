import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3jax import losses
from tests.arrays import from_numpy
from tests.naive_losses import LAMBDAS, PARTS, naive_distillation, naive_info_nce, naive_logs, naive_m3, scores

candidates, distillation = from_numpy(losses.candidates), from_numpy(losses.distillation)
info_nce, m3_loss = from_numpy(losses.info_nce), from_numpy(losses.m3_loss)


def naive_m3_jax(made, positives, temperature, distill, allowed):
    """The same on full arrays in jnp, log of a quotient of exponentials, for its gradient."""

    def probabilities(x):
        weights = jnp.exp(x / temperature) * allowed
        return weights / weights.sum(axis=1, keepdims=True)

    rows = np.arange(len(positives))
    hard = {n: -jnp.log(probabilities(made[n])[rows, positives]).mean() for n in (*PARTS, "hybrid")}
    loss = (sum(lam * hard[n] for lam, n in zip(LAMBDAS, PARTS, strict=True)) + hard["hybrid"]) / 4
    if not distill:
        return loss
    target = jax.lax.stop_gradient(probabilities(made["hybrid"]))
    soft = {n: -(target * jnp.log(jnp.where(allowed, probabilities(made[n]), 1.0))).sum(axis=1).mean() for n in PARTS}
    return (loss + sum(lam * soft[n] for lam, n in zip(LAMBDAS, PARTS, strict=True)) / 3) / 2


naive_grad = jax.jit(jax.grad(naive_m3_jax), static_argnums=3)


def some_forbidden():
    """Of 4 rows × 8 passages: row 1's positive is row 3's text too, and row 0's hard negative."""
    identity = np.stack([np.arange(8), np.full(8, 9)], axis=1).astype(np.uint32)
    identity[6] = identity[1] = identity[2]
    positives = np.arange(4) * 2
    return np.asarray(candidates(positives, identity, identity[positives][:, None]))


run = jax.jit(lambda made, positives, temperature, distill, allowed: m3_loss(
    made, positives, temperature=temperature, distill=distill, allowed=allowed
))  # fmt: skip
grad = jax.jit(jax.grad(lambda made, positives, temperature, distill, allowed: m3_loss(
    made, positives, temperature=temperature, distill=distill, allowed=allowed
)[0]))  # fmt: skip


@pytest.mark.parametrize("temperature", [0.02, 1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_parts_by_hand(temperature, masked):
    made, positives = scores()
    allowed = some_forbidden() if masked else None
    for distill in (0.0, 1.0):
        loss, parts = run(made, positives, temperature, distill, allowed)
        assert set(parts) == {*PARTS, "hybrid", "distill/dense", "distill/sparse", "distill/colbert"}
        for name in (*PARTS, "hybrid"):
            expected = naive_info_nce(made[name], positives, temperature, allowed)
            np.testing.assert_allclose(parts[name], expected, rtol=1e-5)
            np.testing.assert_allclose(info_nce(made[name], positives, temperature, allowed), expected, rtol=1e-5)
        for name in PARTS:
            expected = naive_distillation(made["hybrid"], made[name], temperature, allowed)
            np.testing.assert_allclose(parts[f"distill/{name}"], expected, rtol=1e-5)
            got = distillation(made["hybrid"], made[name], temperature, allowed)
            np.testing.assert_allclose(got, expected, rtol=1e-5)
        np.testing.assert_allclose(loss, naive_m3(made, positives, temperature, distill, allowed), rtol=1e-5)
        assert loss.dtype == jnp.float32 and loss.shape == ()


@pytest.mark.parametrize("distill", [0.0, 1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_the_full_arrays(distill, masked):
    made, positives = scores(seed=1)
    allowed = some_forbidden() if masked else np.ones((4, 8), bool)
    got = grad(made, positives, 0.1, distill, allowed)
    expected = naive_grad(made, positives, 0.1, distill, allowed)
    for name in made:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-4, atol=1e-6)
        assert np.isfinite(got[name]).all() and got[name].any()
        assert not got[name][~allowed].any()


def test_gradients_by_finite_differences():
    made, positives = scores(rows=2, seed=2)
    got = grad(made, positives, 0.1, 1.0, None)
    step = 1e-5
    for name in made:
        for index in np.ndindex(made[name].shape):
            ends = []
            for sign in (1, -1):
                moved = {n: x.astype(np.float64) for n, x in made.items()}
                moved[name][index] += sign * step
                ends.append(naive_m3(moved, positives, 0.1, 1.0, teacher=made["hybrid"]))
            np.testing.assert_allclose(got[name][index], (ends[0] - ends[1]) / (2 * step), atol=2e-5)


def test_the_teacher_has_no_gradient():
    made, _ = scores()
    grads = jax.grad(lambda t, s: distillation(t, s, 0.1), argnums=(0, 1))(
        jnp.asarray(made["hybrid"]), jnp.asarray(made["dense"])
    )
    assert not grads[0].any() and grads[1].any()


def test_a_student_equal_to_its_teacher_has_the_entropy_and_no_gradient():
    made, _ = scores()
    value, slope = jax.value_and_grad(lambda s: distillation(made["dense"], s, 0.5))(made["dense"])
    p = np.exp(made["dense"] / 0.5)
    p /= p.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(value, -(p * np.log(p)).sum(axis=1).mean(), rtol=1e-5)
    np.testing.assert_allclose(slope, 0, atol=1e-7)


def test_switching_distillation_on_compiles_nothing_again():
    made, positives = scores()
    traces = []

    @jax.jit
    def step(made, distill):
        traces.append(distill)
        return m3_loss(made, positives, distill=distill)[0]

    before, after = step(made, jnp.float32(0)), step(made, jnp.float32(1))
    assert len(traces) == 1
    np.testing.assert_allclose(before, naive_m3(made, positives, 0.02, False), rtol=1e-5)
    np.testing.assert_allclose(after, naive_m3(made, positives, 0.02, True), rtol=1e-5)
    np.testing.assert_allclose(m3_loss(made, positives)[0], before, rtol=1e-6)  # off by default, temperature 0.02


def test_other_loss_weights():
    made, positives = scores()
    one = m3_loss(made, positives, temperature=0.5, loss_weights=(0.0, 1.0, 0.0), distill=1.0)[0]
    plain = (naive_info_nce(made["sparse"], positives, 0.5) + naive_info_nce(made["hybrid"], positives, 0.5)) / 4
    expected = (plain + naive_distillation(made["hybrid"], made["sparse"], 0.5) / 3) / 2
    np.testing.assert_allclose(one, expected, rtol=1e-5)


@pytest.mark.parametrize("names", [("dense",), ("sparse", "colbert"), ("dense", "colbert")])
def test_functions_that_are_left_out(names):
    made, positives = scores()
    hard = {name: naive_info_nce(made[name], positives, 0.5) for name in (*names, "hybrid")}
    weighted = sum(LAMBDAS[PARTS.index(name)] * hard[name] for name in names)
    if len(names) == 1:
        loss, parts = m3_loss({names[0]: made[names[0]]}, positives, temperature=0.5, loss_weights=LAMBDAS, distill=1.0)
        assert set(parts) == {*names}
        np.testing.assert_allclose(loss, weighted, rtol=1e-5)
        return
    given = {name: made[name] for name in (*names, "hybrid")}
    loss, parts = m3_loss(given, positives, temperature=0.5, loss_weights=LAMBDAS, distill=1.0)
    assert set(parts) == {*given, *(f"distill/{name}" for name in names)}
    taught = [LAMBDAS[PARTS.index(name)] * naive_distillation(made["hybrid"], made[name], 0.5, None) for name in names]
    np.testing.assert_allclose(loss, ((weighted + hard["hybrid"]) / 3 + sum(taught) / 2) / 2, rtol=1e-5)


@pytest.mark.parametrize("distill", [0.0, 1.0])
def test_the_widths_of_a_function_are_averaged(distill):
    made, positives = scores()
    short = {"dense@8": made["dense"] ** 2, "dense@4": made["dense"] - made["colbert"]}
    options = {"temperature": 0.5, "distill": distill}
    loss, parts = m3_loss(made | short, positives, **options)
    one_each = [m3_loss(made | {"dense": x}, positives, **options)[0] for x in (made["dense"], *short.values())]
    np.testing.assert_allclose(loss, sum(one_each) / 3, rtol=1e-5)
    np.testing.assert_allclose(parts["dense@8"], naive_info_nce(short["dense@8"], positives, 0.5), rtol=1e-5)


def test_order_of_rows_and_of_candidates_does_not_matter():
    made, positives = scores()
    rows, columns = np.array([3, 1, 0, 2]), np.array([5, 0, 7, 2, 1, 4, 3, 6])
    turned = {name: x[rows][:, columns] for name, x in made.items()}
    place = np.argsort(columns)[positives[rows]]
    allowed = some_forbidden()
    before, after = run(made, positives, 0.1, 1.0, allowed), run(turned, place, 0.1, 1.0, allowed[rows][:, columns])
    np.testing.assert_allclose(after[0], before[0], rtol=1e-6)
    slope = grad(made, positives, 0.1, 1.0, allowed)
    for name, got in grad(turned, place, 0.1, 1.0, allowed[rows][:, columns]).items():
        np.testing.assert_allclose(got, slope[name][rows][:, columns], atol=1e-6)


def test_a_forbidden_candidate_is_as_if_it_were_not_there():
    made, positives = scores()
    forbidden = np.ones((4, 8), bool)
    forbidden[:, 5] = False
    kept = np.delete(np.arange(8), 5)
    without = {name: x[:, kept] for name, x in made.items()}
    got = run(made, positives, 0.05, 1.0, forbidden)
    expected = run(without, np.array([0, 2, 4, 5]), 0.05, 1.0, None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, expected)


def test_candidates_leave_out_every_text_known_to_answer():
    a, b, c, d = [1, 1], [2, 1], [3, 1], [1, 2]  # half a hash in common is another text
    identity = np.array([a, b, a, c, d, b], np.uint32)
    known = np.array([[a, a], [a, b], [d, c]], np.uint32)
    allowed = np.asarray(candidates(np.array([0, 2, 4]), identity, known))
    assert allowed.tolist() == [
        [True, True, False, True, True, True],  # its own a, not the other
        [False, False, True, True, True, False],  # b answers it too, though drawn for nobody
        [True, True, True, False, True, True],
    ]


def test_a_duplicate_positive_is_never_pushed_away():
    made, positives = scores()
    allowed = some_forbidden()
    assert not allowed[1, [1, 6]].any() and not allowed[3, [1, 2]].any()
    assert allowed[np.arange(4), positives].all() and allowed.sum() == 4 * 8 - 4
    slopes = grad(made, positives, 0.1, 1.0, allowed)
    for slope in slopes.values():
        assert not slope[~allowed].any()
    assert np.abs(grad(made, positives, 0.1, 1.0, None)["dense"][~allowed]).min() > 0


def test_one_candidate_left_is_no_loss_and_no_nan():
    made, positives = scores()
    allowed = np.arange(8) == positives[:, None]
    loss, parts = run(made, positives, 0.02, 1.0, allowed)
    assert float(loss) == 0 and not any(map(float, parts.values()))
    assert not any(np.asarray(x).any() for x in grad(made, positives, 0.02, 1.0, allowed).values())


def test_scores_far_apart_do_not_overflow():
    made, positives = scores()
    huge = {name: x * 1e4 for name, x in made.items()}
    loss, _ = run(huge, positives, 0.02, 1.0, some_forbidden())
    assert np.isfinite(loss)
    np.testing.assert_allclose(loss, naive_m3(huge, positives, 0.02, True, some_forbidden()), rtol=1e-5)
    assert all(np.isfinite(x).all() for x in grad(huge, positives, 0.02, 1.0, some_forbidden()).values())


def test_half_precision_scores_are_summed_in_float32():
    made, positives = scores()
    half = {name: jnp.asarray(x, jnp.bfloat16) for name, x in made.items()}
    rounded = {name: np.asarray(x, np.float32) for name, x in half.items()}
    loss, _ = run(half, positives, 0.02, 1.0, None)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, naive_m3(rounded, positives, 0.02, True), rtol=1e-5)


def own_group_only():
    """Candidates of 4 rows × 8 passages without in-batch negatives; row 3 has no second passage."""
    identity, present = np.arange(16, dtype=np.uint32).reshape(8, 2), np.arange(8) != 7
    positives = np.arange(4) * 2
    return np.asarray(candidates(positives, identity, identity[positives][:, None], present, np.ones(4, bool)))


def test_candidates_of_rows_without_in_batch_negatives_and_of_places_without_a_passage():
    identity = np.arange(12, dtype=np.uint32).reshape(6, 2)
    positives, known = np.array([0, 2, 4]), np.arange(12, dtype=np.uint32).reshape(6, 2)[[0, 2, 4]][:, None]
    known = np.concatenate([known, identity[[0, 5, 4]][:, None]], axis=1)  # row 1 knows passage 5
    present = np.array([True, True, True, False, True, True])
    allowed = np.asarray(candidates(positives, identity, known, present, np.array([True, False, False])))
    assert allowed.astype(int).tolist() == [
        [1, 1, 0, 0, 0, 0],  # its own group
        [1, 1, 1, 0, 1, 0],  # nobody at 3, 5 answers it
        [1, 1, 1, 0, 1, 1],  # passages of the first row are its negatives all the same
    ]


def test_peer_2_2_without_in_batch_negatives_every_head_and_the_ensemble_see_the_own_group():
    """PEER §2.2: there the ensemble sees one column, its loss is 0, and it distils towards uniform."""
    made, positives = scores()
    allowed = own_group_only()
    assert allowed.astype(int).tolist() == [[int(c // 2 == r and c < 7) for c in range(8)] for r in range(4)]
    for distill in (0.0, 1.0):
        loss, parts = run(made, positives, 0.1, distill, allowed)
        for name in (*PARTS, "hybrid"):
            own = [-naive_logs(made[name][r, 2 * r : 2 * r + 2 - r // 3], 0.1, None)[0] for r in range(4)]
            np.testing.assert_allclose(parts[name], np.mean(own), rtol=1e-5)
            assert parts[name] > 1e-2
        np.testing.assert_allclose(loss, naive_m3(made, positives, 0.1, distill, allowed), rtol=1e-5)
    teachers = [
        [made["hybrid"][r, 2 * r : 2 * r + 2] / 0.1, made["dense"][r, 2 * r : 2 * r + 2] / 0.1] for r in range(3)
    ]
    softened = [[np.exp(t - np.logaddexp(*t)), s - np.logaddexp(*s)] for t, s in teachers]
    np.testing.assert_allclose(parts["distill/dense"], -sum(t @ s for t, s in softened) / 4, rtol=1e-4)
    for slope in grad(made, positives, 0.1, 1.0, allowed).values():
        assert not slope[~allowed].any() and slope[:3].any() and not slope[3].any()


def test_the_paper_s_first_version_adds_what_the_fourth_averages():
    made, positives = scores()
    ones = {"temperature": 0.1, "loss_weights": (1.0, 1.0, 1.0)}
    averaged, parts = m3_loss(made, positives, distill=1.0, **ones)
    added, _ = m3_loss(made, positives, distill=1.0, summed=True, **ones)
    by_hand = sum(float(parts[name]) for name in (*PARTS, "hybrid")) / 4
    by_hand += sum(float(parts[f"distill/{name}"]) for name in PARTS) / 3
    np.testing.assert_allclose(added, by_hand, rtol=1e-5)
    np.testing.assert_allclose(added, 2 * averaged, rtol=1e-6)
    before = m3_loss(made, positives, summed=True, **ones)[0]
    np.testing.assert_allclose(before, m3_loss(made, positives, **ones)[0], rtol=1e-6)  # until distillation starts
