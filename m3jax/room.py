"""The disk that embeddings of texts will take: estimated from some of them, said on stderr, refused where it is not free.

Not here: the check of each shard as it is written (shards.py).
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from m3jax import shards
from m3jax.arguments import Plan
from m3jax.model import M3
from m3jax.tokenization import cls_columns

# Of a sample that are tokenised, to the end of a text: about 1.3 s on one core.
_CHARACTERS = 1 << 22


def bytes_a_text(m3: M3, sample: Sequence[str], plan: Plan, colbert_dtype: str) -> dict[str, float]:
    """The bytes that each output takes, per text: of dense what they are, of the others what the sample has on average."""
    ids: list[np.ndarray] = []
    characters = 0
    for i in np.random.default_rng(0).permutation(len(sample)):
        # What is wrong with a text is said when its turn comes, with its number.
        if isinstance(text := sample[i], str) and characters < _CHARACTERS:
            sound = text.encode("utf-8", "replace").decode()
            # One by one, so that Ctrl-C waits for one only.
            ids += m3.tokenizer.encode([plan.instruction + sound], plan.max_length, mcls=plan.mcls)[0]
            characters += len(sound)
    vectors = np.mean([len(text) - len(cls_columns(len(text), mcls=plan.mcls)) for text in ids] or [0])
    terms = np.mean([len(set(text.tolist()) - m3.tokenizer.unused_ids) for text in ids] or [0])
    cut = plan.asked.width or sys.maxsize
    colbert = min(m3.config.colbert_dim, cut) * np.dtype(colbert_dtype).itemsize + 4 * (colbert_dtype == "int8")
    sizes = {"dense": 4 * min(m3.config.hidden_size, cut), "sparse": 8 * terms + 8, "colbert": vectors * colbert + 8}
    return {name: float(size) for name, size in sizes.items() if getattr(plan.asked, name)}


def check(directory: Path, count: int | None, sizes: Mapping[str, float], came: int, *, say: bool) -> None:
    """Say what each output of count texts will take; ValueError where what is still to come does not fit on the disk.

    count: None where it is not known. sizes: bytes a text. came: texts that are there already.
    """
    free = shards.free(directory)
    many = 1_000_000 if count is None else count
    each = [f"{name} {'about ' * (name != 'dense')}{many * size:,.0f}" for name, size in sizes.items()]
    coming = max(0, many - came) * sum(sizes.values())
    if say:
        said = f"{'each ' * (count is None)}{many:,} texts take {', '.join(each)} bytes; {free:,} are free"
        said += "; how many come is not known, so each shard is checked" * (count is None)
        said += f"; {came:,} texts are there" * bool(came)
        print(f"{directory}: {said}", file=sys.stderr, flush=True)
    if count is not None and coming > free:
        raise ValueError(
            f"{directory}: about {coming:,.0f} bytes are to be written, but {free:,} are free; make room, leave an output "
            "out, or store colbert in int8"
        )
