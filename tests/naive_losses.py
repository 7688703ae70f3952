"""The losses of PAPER §2 once more, a row and a column at a time in Python's floats: what m3jax.losses is held to."""

import math

import numpy as np

PARTS = ("dense", "sparse", "colbert")
LAMBDAS = (1.0, 0.1, 1.0)


def scores(rows=4, group=2, seed=0):
    """Four score matrices [rows, rows * group] in [-1, 1], and the positives' columns."""
    rng = np.random.default_rng(seed)
    made = {name: rng.uniform(-1, 1, (rows, rows * group)).astype(np.float32) for name in (*PARTS, "hybrid")}
    return made, np.arange(rows) * group


def naive_logs(row, temperature, allowed):
    """Column → log softmax of one row over the allowed columns."""
    logits = {column: float(s) / temperature for column, s in enumerate(row) if allowed is None or allowed[column]}
    top = max(logits.values())
    total = top + math.log(math.fsum(math.exp(x - top) for x in logits.values()))
    return {column: x - total for column, x in logits.items()}


def naive_info_nce(matrix, positives, temperature, allowed=None):
    rows = [
        -naive_logs(row, temperature, None if allowed is None else allowed[b])[int(positives[b])]
        for b, row in enumerate(matrix)
    ]
    return sum(rows) / len(rows)


def naive_distillation(teacher, student, temperature, allowed=None):
    total = 0.0
    for b in range(len(teacher)):
        own = None if allowed is None else allowed[b]
        target, logs = naive_logs(teacher[b], temperature, own), naive_logs(student[b], temperature, own)
        total -= math.fsum(math.exp(target[column]) * logs[column] for column in logs)
    return total / len(teacher)


def naive_m3(made, positives, temperature, distill, allowed=None, teacher=None):
    """PAPER §2, by hand; `teacher`: hybrid scores held fixed, for finite differences."""
    teacher = made["hybrid"] if teacher is None else teacher
    terms = [
        lam * naive_info_nce(made[n], positives, temperature, allowed) for lam, n in zip(LAMBDAS, PARTS, strict=True)
    ]
    plain = (sum(terms) + naive_info_nce(made["hybrid"], positives, temperature, allowed)) / 4
    if not distill:
        return plain
    taught = [
        lam * naive_distillation(teacher, made[n], temperature, allowed) for lam, n in zip(LAMBDAS, PARTS, strict=True)
    ]
    return (plain + sum(taught) / 3) / 2
