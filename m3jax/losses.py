"""Contrastive and distillation losses from score matrices [B, P]: InfoNCE, self-distillation, teachers, the M3 loss (PAPER §2).

Not here: how scores come about (scores.py), and what a batch is. Every sum is float32.
"""

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt32

PARTS = ("dense", "sparse", "colbert")

# PAPER §2, v4: λ of dense, sparse, colbert; a random sparse head makes its loss huge at first.
LOSS_WEIGHTS = (1.0, 0.1, 1.0)


def candidates(
    positives: Int[Array, "b"],
    identity: UInt32[Array, "p 2"],
    known: UInt32[Array, "b m 2"],
    present: Bool[Array, "p"] | None = None,
    own_group: Bool[Array, "b"] | None = None,
) -> Bool[Array, "b p"]:
    """Which passages a row's softmax ranges over: its positive, and all others that are not known to answer it too.

    positives: column of each row's positive. identity: a 64-bit hash of each passage's text, in two words. known: the
    same of all positives of each row, a row with fewer than m filled up with one of them. Two rows that share a positive
    would otherwise push it away from each other's query. present: False where no passage is, all are by default. own_group:
    rows without in-batch negatives, whose candidates are those of their own p / b columns; none by default.

    >>> one, two, other = [1, 1], [2, 2], [8, 8]
    >>> identity = jnp.array([one, two, other], jnp.uint32)
    >>> candidates(jnp.array([0, 1]), identity, jnp.array([[one, two], [two, two]], jnp.uint32))
    Array([[ True, False,  True],
           [ True,  True,  True]], dtype=bool)
    """
    columns = jnp.arange(len(identity))
    allowed = ~(known[:, :, None] == identity).all(axis=-1).any(axis=1)
    if present is not None:
        allowed &= present
    if own_group is not None:
        group = columns // (len(identity) // len(known))
        allowed &= ~own_group[:, None] | (group == jnp.arange(len(known))[:, None])
    return allowed | (columns == positives[:, None])


def info_nce(
    scores: Float[Array, "b p"],
    positives: Int[Array, "b"],
    temperature: float | Float[Array, ""],
    allowed: Bool[Array, "b p"] | None = None,
    counted: Bool[Array, "b"] | None = None,
) -> Float[Array, ""]:
    """− mean over rows of log softmax(scores / temperature) at the positive's column.

    allowed: the candidates of each row, all by default; the positive must be one of them. counted: rows whose loss is not
    taken as 0, all by default.

    >>> info_nce(jnp.array([[0.0, 0.0]]), jnp.array([0]), 1.0)
    Array(0.6931472, dtype=float32)
    """
    logs = jnp.take_along_axis(_log_softmax(scores, temperature, allowed), positives[:, None], axis=1)[:, 0]
    return -(logs if counted is None else jnp.where(counted, logs, 0.0)).mean()


def distillation(
    teacher: Float[Array, "b p"],
    student: Float[Array, "b p"],
    temperature: float | Float[Array, ""],
    allowed: Bool[Array, "b p"] | None = None,
) -> Float[Array, ""]:
    """− mean over rows of Σ softmax(teacher / temperature) · log softmax(student / temperature); no gradient to the teacher.

    >>> distillation(jnp.array([[0.0, 0.0]]), jnp.array([[0.0, 0.0]]), 1.0)
    Array(0.6931472, dtype=float32)
    """
    target = jnp.exp(_log_softmax(jax.lax.stop_gradient(teacher), temperature, allowed))
    return _cross_entropy(target, student, temperature, allowed)


def group_distillation(
    teacher: Float[Array, "b g"],
    student: Float[Array, "b p"],
    positives: Int[Array, "b"],
    temperature: float | Float[Array, ""],
    teacher_temperature: float | Float[Array, ""] = 1.0,
) -> Float[Array, ""]:
    """− mean over rows of Σ t · log softmax(student / temperature), over the row's group.

    t = softmax(teacher / teacher_temperature). teacher: scores of the g columns of a row's group, the positive's first, −inf
    where a passage has none, which then is not of the group; the loss of a row without scores is 0. FlagEmbedding's "kl_div".

    >>> group_distillation(jnp.array([[0.0, 0.0]]), jnp.array([[0.0, 0.0, 9.0]]), jnp.array([0]), 1.0)
    Array(0.6931472, dtype=float32)
    """
    target, scored = _targets(teacher, teacher_temperature)
    own = jnp.take_along_axis(student, _columns(teacher, positives), axis=1)
    return _cross_entropy(target, own, temperature, scored)


def sequential_distillation(
    teacher: Float[Array, "b g"],
    student: Float[Array, "b p"],
    positives: Int[Array, "b"],
    temperature: float | Float[Array, ""],
    teacher_temperature: float | Float[Array, ""] = 1.0,
    allowed: Bool[Array, "b p"] | None = None,
) -> Float[Array, ""]:
    """− mean over rows of Σ_i t_i · log softmax(student / temperature) at passage i among all candidates but those before i.

    i counts the passages of the row's group from the teacher's highest score down: each is to beat those that the teacher puts
    below it and everything outside the group. teacher, t: as in `group_distillation`; a passage without a score is a
    candidate like those of other rows. allowed: the candidates, all by default. FlagEmbedding's "m3_kd_loss", which takes a
    group in the order it comes in; its authors' first code sorted it.

    >>> sequential_distillation(jnp.array([[0.0, 0.0]]), jnp.array([[0.0, 0.0]]), jnp.array([0]), 1.0)
    Array(0.3465736, dtype=float32)
    """
    target, scored = _targets(teacher, teacher_temperature)
    logits, columns = student.astype(jnp.float32) / temperature, _columns(teacher, positives)
    in_group = ((columns[:, :, None] == jnp.arange(logits.shape[1])) & scored[:, :, None]).any(axis=1)
    outside = ~in_group if allowed is None else allowed & ~in_group
    others = jax.nn.logsumexp(logits, axis=1, where=outside, keepdims=True)
    own = jnp.where(scored, jnp.take_along_axis(logits, columns, axis=1), -jnp.inf)
    order = jnp.argsort(-teacher, axis=1)  # what has no score comes last; equal scores stay in the order they came in
    target, scored, own = (jnp.take_along_axis(x, order, axis=1) for x in (target, scored, own))
    below = jnp.logaddexp(jax.lax.cumlogsumexp(own, axis=1, reverse=True), others)
    return -jnp.where(scored, target * (own - below), 0.0).sum(axis=1).mean()


def m3_loss(
    scores: Mapping[str, Float[Array, "b p"]],
    positives: Int[Array, "b"],
    *,
    temperature: float | Float[Array, ""] = 0.02,
    loss_weights: tuple[float, float, float] = LOSS_WEIGHTS,
    distill: Shaped[Array, ""] | float | bool = False,
    summed: bool = False,
    allowed: Bool[Array, "b p"] | None = None,
    teacher: Literal["", "group", "sequential"] = "",
    teacher_scores: Float[Array, "b g"] | None = None,
    teacher_temperature: float | Float[Array, ""] = 1.0,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The M3 objective of PAPER §2 (v4) and its parts, unweighted.

    scores: "dense", "sparse", "colbert", "hybrid", each [b, p]. L = (Σ λ·L_* + L_hybrid) / 4; with self-distillation
    L' = Σ λ·L'_* / 3 and the loss is (L + L') / 2, or L + L' where `summed` (v1). distill: 0 before self-distillation starts, 1
    after; it may be a traced array, so that starting compiles nothing again. Parts: the names of `scores`, and "distill/…" of
    each but "hybrid".

    A function that is left out of `scores` takes no part, and the sums are divided by the fewer parts there are; a single one
    needs no "hybrid", which would be itself, and then there is no self-distillation. "dense@256" beside "dense" is a shorter
    vector of the same function: the losses of a function's widths are averaged.

    teacher: "group" adds `group_distillation` from `teacher_scores` to each L_*, "sequential" puts `sequential_distillation`
    in the place of the InfoNCE of rows that have scores; both are parts "teacher/…", which "" has not. Each of these parts
    is a mean over all rows, so that they add up to the loss.
    """
    taught, counted = {}, None
    if teacher:
        assert teacher_scores is not None
        given = positives, temperature, teacher_temperature
        if teacher == "group":
            taught = {name: group_distillation(teacher_scores, of, *given) for name, of in scores.items()}
        else:
            taught = {name: sequential_distillation(teacher_scores, of, *given, allowed) for name, of in scores.items()}
            counted = ~jnp.isfinite(teacher_scores).any(axis=1)
    parts = {name: info_nce(of, positives, temperature, allowed, counted) for name, of in scores.items()}
    hard = {name: value + taught.get(name, 0.0) for name, value in parts.items()}
    parts |= {f"teacher/{name}": value for name, value in taught.items()}

    widths = {part: [name for name in scores if name.split("@")[0] == part] for part in PARTS}
    weights = {
        name: w / len(widths[part]) for w, part in zip(loss_weights, PARTS, strict=True) for name in widths[part]
    }
    count = sum(bool(names) for names in widths.values())
    contrastive = jnp.asarray(sum(w * hard[name] for name, w in weights.items()))
    if "hybrid" not in scores:
        return contrastive / count, parts
    contrastive = (contrastive + hard["hybrid"]) / (count + 1)
    distilled = {name: distillation(scores["hybrid"], scores[name], temperature, allowed) for name in weights}
    total = contrastive + sum(w * distilled[name] for name, w in weights.items()) / count
    loss = jnp.where(jnp.asarray(distill) > 0, total if summed else total / 2, contrastive)
    return loss, parts | {f"distill/{name}": value for name, value in distilled.items()}


def _targets(teacher: Array, temperature: float | Array) -> tuple[Array, Array]:
    """softmax(teacher / temperature) over each row's scores, 0 where there is none; and where there is one."""
    scored = jnp.isfinite(teacher)
    # The softmax of a row without scores is NaN, of which nothing is used.
    return jnp.where(scored, jnp.exp(_log_softmax(teacher, temperature, scored)), 0.0), scored


def _columns(teacher: Array, positives: Array) -> Array:
    """The columns of each row's group, [b, g]."""
    return positives[:, None] + jnp.arange(teacher.shape[1])


def _cross_entropy(target: Array, student: Array, temperature: float | Array, allowed: Array | None) -> Array:
    """− mean over rows of Σ target · log softmax(student / temperature) over the allowed columns."""
    logs = _log_softmax(student, temperature, allowed)
    if allowed is not None:
        logs = jnp.where(allowed, logs, 0.0)  # 0 · -inf is NaN
    return -(target * logs).sum(axis=1).mean()


def _log_softmax(scores: Array, temperature: float | Array, allowed: Array | None) -> Array:
    logits = scores.astype(jnp.float32) / temperature
    return jax.nn.log_softmax(logits if allowed is None else jnp.where(allowed, logits, -jnp.inf), axis=1)
