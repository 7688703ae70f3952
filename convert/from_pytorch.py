"""Write a model as an Orbax checkpoint, which training starts from and restores onto any mesh, every tensor's dtype and bits
kept; with it goes the head of a masked-language model, for stage 1 of training.

Not here: what the formats are (m3jax/weights.py, m3jax/checkpoint.py).
"""

import argparse

from convert.positions import extend_positions
from m3jax import M3, checkpoint, sources


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """SRC, DST and what may change on the way."""
    parser.add_argument(
        "src", help="a released directory (also of sentence-transformers or FlagEmbedding), or a hub name"
    )
    parser.add_argument("dst", help="the checkpoint to write")
    parser.add_argument("--revision", help="of a hub name: a branch, tag or commit; without it, main")
    parser.add_argument(
        "--heads",
        choices=("require", "init"),
        default="require",
        help="init: random heads where SRC has none, to train",
    )
    parser.add_argument(
        "--extend-positions", type=int, metavar="ROWS", help="rows of the position table, 8194 for 8192 tokens"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace DST where it holds what an earlier conversion wrote"
    )


def run(given: argparse.Namespace) -> M3:
    """Convert; the model that was written."""
    with sources.local(given.src, revision=given.revision) as directory:  # fetched once for both
        config, params, tokenizer = sources.read(directory, heads=given.heads)
        lm_head = sources.read_lm_head(directory, config)
    if given.extend_positions is not None:
        config, params = extend_positions(config, params, given.extend_positions)
    m3 = M3(config, params, tokenizer)
    checkpoint.write(m3, given.dst, lm_head=lm_head, replace=given.overwrite, progress=True)
    return m3
