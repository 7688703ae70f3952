"""How far encode in bfloat16 is from float32, and each from itself in other batches, per function; weights are random.

Run it as `python tests/benchmarks/bfloat16.py [--geometry 12x256] [--seed 0]`: 256 queries, 48 passages and 2 documents (the
mixes of encode.py), all in one call; for other batches in another order and with --batch-tokens. Dense and colbert: 1 − cosine
of each vector; sparse: what a term's weights differ in. Two numbers are largest and mean. --rounded rounds the results of
linear layers to bfloat16 on CPU too, as GPUs and TPUs do.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

import jax
from encode import table
from texts import MIXES, make_texts, small_tokenizer

import m3jax
from m3jax import xlm_roberta
from m3jax.model import cast
from tests.random_model import random_model


def apart(got: m3jax.Embeddings, other: m3jax.Embeddings) -> dict[str, str | None]:
    colbert = zip(got.colbert, other.colbert, strict=True)
    either = (got.terms + other.terms).nonzero()
    differences = {
        "dense": 1 - (got.dense.astype(float) * other.dense).sum(-1),
        "sparse": np.abs((got.terms - other.terms)[either]),
        "colbert": np.concatenate([1 - (a.astype(float) * b).sum(-1) for a, b in colbert]),
    }
    return {name: f"{values.max():.1e} {values.mean():.1e}" for name, values in differences.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", default="12x256", help="layers x width; heads of 64")
    parser.add_argument("--seed", type=int, default=0, help="of the model's weights")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--counts", type=int, nargs=3, default=(256, 48, 2), help="queries, passages, documents")
    parser.add_argument("--rounded", action="store_true")
    given = parser.parse_args()
    if given.rounded:
        xlm_roberta.platform = lambda: "gpu"
    layers, width = map(int, given.geometry.split("x"))
    with tempfile.TemporaryDirectory() as folder:
        given.tokenizer, given.texts = Path(folder) / "tokenizer.json", None
        small_tokenizer(given.tokenizer)
        tokenizer = m3jax.Tokenizer.from_file(given.tokenizer)
        texts = [
            text
            for (low, high), count in zip(MIXES.values(), given.counts, strict=True)
            for text in make_texts(given, low, high, count)[0]
        ]
    drawn = random_model(
        tokenizer,
        given.seed,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        colbert_dim=width,
    )
    order = np.random.default_rng(0).permutation(len(texts))
    shuffled = [texts[i] for i in order]
    results = {}
    for dtype in ("float32", "bfloat16"):
        m3 = m3jax.M3(drawn.config, cast(jax.device_put(drawn.params), dtype), tokenizer)
        again = m3jax.encode(m3, shuffled, colbert=True, batch_tokens=given.batch_tokens)
        results[dtype] = m3jax.encode(m3, texts, colbert=True), again[np.argsort(order)]
    single, half = results["float32"], results["bfloat16"]
    print(f"{layers} × {width}, seed {given.seed}, {jax.devices()[0].device_kind}, {len(texts)} texts")
    print(f"lexical weights of {single[0].terms.data.mean():.2f} on average, up to {single[0].terms.data.max():.2f}")
    table(
        {
            "float32 in other batches": apart(single[1], single[0]),
            "bfloat16 in other batches": apart(half[1], half[0]),
            "bfloat16 and float32": apart(half[0], single[0]),
        }
    )


if __name__ == "__main__":
    main()
