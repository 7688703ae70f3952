"""Parity at the size of BAAI/bge-m3, 24 × 1024 in float32: m3jax.encode beside FlagEmbedding's BGEM3FlagModel, to 8192 tokens.

Run it as `python tests/benchmarks/full_size_parity.py TOKENIZER.json [--length 8192]` with the `peer` extra; about ten minutes
on two cores, 10 GB of memory and 5 GB of disk. TOKENIZER.json is one of at most 250,002 ids, such as XLM-R's. The weights are
random, as tests/parity/conftest.py draws them: far from the small initial values, with which every token would get one vector.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
import transformers
from FlagEmbedding import BGEM3FlagModel

import m3jax
from convert.texts import default_texts
from m3jax.config import M3Config
from tests.parity.conftest import randomised


def make(tokenizer: Path, directory: Path) -> None:
    """A released directory by PyTorch alone."""
    size = M3Config()
    config = transformers.XLMRobertaConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        num_hidden_layers=size.num_hidden_layers,
        num_attention_heads=size.num_attention_heads,
        intermediate_size=size.intermediate_size,
        max_position_embeddings=size.max_position_embeddings,
        type_vocab_size=size.type_vocab_size,
        layer_norm_eps=size.layer_norm_eps,
    )
    model = randomised(torch, transformers.XLMRobertaModel(config), 0, size.num_hidden_layers)
    model.save_pretrained(directory)
    heads = {"sparse_linear": torch.nn.Linear(1024, 1), "colbert_linear": torch.nn.Linear(1024, 1024)}
    for seed, (name, head) in enumerate(heads.items()):
        torch.save(randomised(torch, head, seed).state_dict(), directory / f"{name}.pt")
    transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer),
        model_max_length=8192,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
    ).save_pretrained(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--length", type=int, default=8192, help="tokens of the longest text")
    given = parser.parse_args()
    short = default_texts(512)
    texts = [*short, " ".join(short * 40)]
    with tempfile.TemporaryDirectory() as name:
        make(given.tokenizer, Path(name))
        peer = BGEM3FlagModel(name, use_fp16=False, devices="cpu")
        how = {"return_sparse": True, "return_colbert_vecs": True, "max_length": given.length, "batch_size": 1}
        theirs = [peer.encode(text, **how) for text in texts]
        del peer
        ours = m3jax.encode(m3jax.load(name), texts, colbert=True, max_length=given.length)
    assert ours.dense_vecs is not None and ours.colbert_vecs is not None
    print("tokens   1 − cosine, dense   the same, colbert   lexical weights (largest difference, of a largest weight)")
    rows = []
    for i, one in enumerate(theirs):
        dense, colbert = (np.asarray(one[k], np.float64) for k in ("dense_vecs", "colbert_vecs"))
        a, b = one["lexical_weights"], ours.lexical_weights[i]
        rows.append(
            (
                len(ours.colbert_vecs[i]) + 1,
                1
                - dense
                @ ours.dense_vecs[i].astype(np.float64)
                / np.linalg.norm(dense)
                / np.linalg.norm(ours.dense_vecs[i]),
                _past_cosine(colbert, ours.colbert_vecs[i].astype(np.float64)),
                max((abs(float(a.get(k, 0)) - b.get(k, 0)) for k in a.keys() | b.keys()), default=0.0),
                max(b.values(), default=0.0),
            )
        )
    for low, high in ((0, 64), (65, 511), (512, given.length - 1), (given.length, given.length)):
        some = [row for row in rows if low <= row[0] <= high]
        if some:
            worst = [max(column) for column in zip(*some, strict=True)]
            print(
                f"{some[0][0]:>4} to {worst[0]:<5} {worst[1]:12.1e} {worst[2]:20.1e} {worst[3]:18.1e}, {worst[4]:.2f}"
            )


def _past_cosine(a: np.ndarray, b: np.ndarray) -> float:
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    return float((1 - cosine).max(initial=0.0))


if __name__ == "__main__":
    main()
