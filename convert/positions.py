"""`--extend-positions`: a longer position table for a model that was trained on shorter texts.

Not here: training on the longer texts, without which the new positions are a start and no more.
"""

import dataclasses

import numpy as np

from m3jax.config import M3Config
from m3jax.model import Params


def extend_positions(config: M3Config, params: Params, rows: int) -> tuple[M3Config, Params]:
    """Config and parameters with a position table of `rows` rows; what was there stays, bit for bit.

    Row p beyond the old table repeats the trained ones in turn: row first + (p - first) mod (old - first), where first =
    pad_token_id + 1 is the position of `<s>`. The paper extends XLM-R to 8194 rows (PAPER §3, stage 1) and does not say how;
    repeated, neighbours keep the relation that they were trained with, but at the seams. ValueError where rows are fewer.

    >>> config = M3Config.tiny(max_position_embeddings=5)
    >>> params = {"encoder": {"embeddings": {"position_embeddings": {"embedding": np.arange(5.0)[:, None]}}}}
    >>> extend_positions(config, params, 9)[1]["encoder"]["embeddings"]["position_embeddings"]["embedding"].T
    array([[0., 1., 2., 3., 4., 2., 3., 4., 2.]])
    """
    old, first = config.max_position_embeddings, config.pad_token_id + 1
    if rows < old:
        raise ValueError(f"--extend-positions makes a table longer: expected at least its {old} rows, got {rows}")
    table = np.asarray(params["encoder"]["embeddings"]["position_embeddings"]["embedding"])
    source = np.arange(rows)
    source[old:] = first + (source[old:] - first) % (old - first)
    embeddings = params["encoder"]["embeddings"] | {"position_embeddings": {"embedding": table[source]}}
    encoder = params["encoder"] | {"embeddings": embeddings}
    return dataclasses.replace(config, max_position_embeddings=rows), params | {"encoder": encoder}
