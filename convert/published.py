"""Whether a copy of BAAI/bge-m3 gives the scores that BAAI published: `python -m convert verify --published DIR`.

Not here: comparing two models (verify.py).
"""

from pathlib import Path

import m3jax

# PAPER §6, last lines: the released weights in fp16, whose steps are 4.9e-4 from 0.5 to 1; two of them are let pass. Where
# the texts share no term, the score is 0 whatever the precision.
_QUERIES = ("What is BGE M3?", "Defination of BM25")
_PASSAGES = (
    "BGE M3 is an embedding model supporting dense retrieval, lexical matching and multi-vector interaction.",
    "BM25 is a bag-of-words retrieval function that ranks a set of documents based on the query terms appearing in each "
    "document",
)
PUBLISHED = {
    ("dense", "q0", "p0"): (0.6265, 1e-3),
    ("dense", "q0", "p1"): (0.3477, 1e-3),
    ("dense", "q1", "p0"): (0.3499, 1e-3),
    ("dense", "q1", "p1"): (0.678, 1e-3),
    ("sparse", "q0", "p0"): (0.19554901, 1e-3),
    ("sparse", "q0", "q1"): (0.0, 0.0),
    ("colbert", "q0", "p0"): (0.7797, 1e-3),
    ("colbert", "q0", "p1"): (0.4620, 1e-3),
}


def check(directory: str | Path) -> None:
    """Print each published score beside that of a directory or hub name, run by m3jax in float32; SystemExit(1) where one
    is past its tolerance."""
    m3 = m3jax.load(directory, dtype="float32")
    texts = m3jax.encode(m3, [*_QUERIES, *_PASSAGES], colbert=True)
    scores = m3jax.score(texts, texts)
    rows = {"q0": 0, "q1": 1, "p0": 2, "p1": 3}
    past = 0
    for (function, one, two), (score, tolerance) in PUBLISHED.items():
        here = float(getattr(scores, function)[rows[one], rows[two]])
        difference = abs(here - score)
        past += difference > tolerance
        print(
            f"{function:<7} ({one}, {two})  published {score:.4f}  here {here:.4f}  difference {difference:.1e}  "
            f"tolerance {tolerance:.0e}{'  PAST IT' if difference > tolerance else ''}"
        )
    print(f"{past} of {len(PUBLISHED)} past tolerance" if past else "as published, within tolerance")
    if past:
        raise SystemExit(1)
