"""Contrastive and distillation losses from score matrices [B, P]: InfoNCE, self-distillation and the M3 loss (PAPER §2).

Not here: how scores come about (scores.py), and what a batch is. Every sum is float32.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt32

PARTS = ("dense", "sparse", "colbert")

# PAPER §2, v4: λ of dense, sparse, colbert; a random sparse head makes its loss huge at first.
LOSS_WEIGHTS = (1.0, 0.1, 1.0)


def candidates(
    positives: Int[Array, "b"], identity: UInt32[Array, "p 2"], known: UInt32[Array, "b m 2"]
) -> Bool[Array, "b p"]:
    """Which passages a row's softmax ranges over: its positive, and all others that are not known to answer it too.

    positives: column of each row's positive. identity: a 64-bit hash of each passage's text, in two words. known: the
    same of all positives of each row, a row with fewer than m filled up with one of them. Two rows that share a positive
    would otherwise push it away from each other's query.

    >>> one, two, other = [1, 1], [2, 2], [8, 8]
    >>> identity = jnp.array([one, two, other], jnp.uint32)
    >>> candidates(jnp.array([0, 1]), identity, jnp.array([[one, two], [two, two]], jnp.uint32))
    Array([[ True, False,  True],
           [ True,  True,  True]], dtype=bool)
    """
    own = jnp.arange(len(identity)) == positives[:, None]
    answers = (known[:, :, None] == identity).all(axis=-1).any(axis=1)
    return own | ~answers


def info_nce(
    scores: Float[Array, "b p"],
    positives: Int[Array, "b"],
    temperature: float | Float[Array, ""],
    allowed: Bool[Array, "b p"] | None = None,
) -> Float[Array, ""]:
    """− mean over rows of log softmax(scores / temperature) at the positive's column.

    allowed: the candidates of each row, all by default; the positive must be one of them.

    >>> info_nce(jnp.array([[0.0, 0.0]]), jnp.array([0]), 1.0)
    Array(0.6931472, dtype=float32)
    """
    logs = _log_softmax(scores, temperature, allowed)
    return -jnp.take_along_axis(logs, positives[:, None], axis=1).mean()


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
    logs = _log_softmax(student, temperature, allowed)
    if allowed is not None:
        logs = jnp.where(allowed, logs, 0.0)  # 0 · -inf is NaN
    return -(target * logs).sum(axis=1).mean()


def m3_loss(
    scores: Mapping[str, Float[Array, "b p"]],
    positives: Int[Array, "b"],
    *,
    temperature: float | Float[Array, ""] = 0.02,
    loss_weights: tuple[float, float, float] = LOSS_WEIGHTS,
    distill: Shaped[Array, ""] | float | bool = False,
    allowed: Bool[Array, "b p"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The M3 objective of PAPER §2 (v4) and its parts, unweighted.

    scores: "dense", "sparse", "colbert", "hybrid", each [b, p]. L = (Σ λ·L_* + L_hybrid) / 4; with self-distillation
    L' = Σ λ·L'_* / 3 and the loss is (L + L') / 2. distill: 0 before self-distillation starts, 1 after; it may be a traced
    array, so that starting compiles nothing again. Parts: the names of `scores`, and "distill/…" of each but "hybrid".

    A function that is left out of `scores` takes no part, and the sums are divided by the fewer parts there are; a single one
    needs no "hybrid", which would be itself, and then there is no self-distillation. "dense@256" beside "dense" is a shorter
    vector of the same function: the losses of a function's widths are averaged.
    """
    widths = {part: [name for name in scores if name.split("@")[0] == part] for part in PARTS}
    weights = {
        name: w / len(widths[part]) for w, part in zip(loss_weights, PARTS, strict=True) for name in widths[part]
    }
    count = sum(bool(names) for names in widths.values())
    parts = {name: info_nce(scores[name], positives, temperature, allowed) for name in scores}
    contrastive = jnp.asarray(sum(w * parts[name] for name, w in weights.items()))
    if "hybrid" not in scores:
        return contrastive / count, parts
    contrastive = (contrastive + parts["hybrid"]) / (count + 1)
    taught = {name: distillation(scores["hybrid"], scores[name], temperature, allowed) for name in weights}
    distilled = sum(w * taught[name] for name, w in weights.items()) / count
    loss = jnp.where(jnp.asarray(distill) > 0, (contrastive + distilled) / 2, contrastive)
    return loss, parts | {f"distill/{name}": value for name, value in taught.items()}


def _log_softmax(scores: Array, temperature: float | Array, allowed: Array | None) -> Array:
    logits = scores.astype(jnp.float32) / temperature
    return jax.nn.log_softmax(logits if allowed is None else jnp.where(allowed, logits, -jnp.inf), axis=1)
