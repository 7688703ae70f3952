"""Parity at the size of BAAI/bge-m3, 24 × 1024 in float32: m3jax.encode and FlagEmbedding's BGEM3FlagModel beside float64.

Run it as `python tests/benchmarks/full_size_parity.py TOKENIZER.json [--geometry 24x1024] [--length 8192]` with the `peer`
extra; 10 GB of memory, 5 GB of disk; at length 1024 a quarter of an hour on two cores. TOKENIZER.json is one of at most
250,002 ids, such as XLM-R's. The weights are random, as tests/parity/conftest.py draws them: far from the small initial
values, with which every token would get one vector. float64 is transformers' XLMRobertaModel with the heads on the same
weights: two float32 programs differ by the rounding of both.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
import transformers
from FlagEmbedding import BGEM3FlagModel

import m3jax
from convert.texts import default_texts
from m3jax.config import M3Config
from m3jax.weights import HEAD_FILES
from tests.parity.conftest import randomised


class Answer(NamedTuple):
    """What a program gives for one text."""

    dense: np.ndarray  # [d]
    lexical: dict[str, float]
    colbert: np.ndarray  # [tokens - 1, d]


def make(size: M3Config, tokenizer: Path, directory: Path) -> None:
    """A released directory by PyTorch alone."""
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
    heads = {"sparse_linear": torch.nn.Linear(size.hidden_size, 1)}
    heads["colbert_linear"] = torch.nn.Linear(size.hidden_size, size.hidden_size)
    for seed, (name, head) in enumerate(heads.items()):
        torch.save(randomised(torch, head, seed).state_dict(), directory / HEAD_FILES[name])
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


def by_flag_embedding(directory: Path, texts: list[str], length: int) -> list[Answer]:
    model = BGEM3FlagModel(str(directory), use_fp16=False, devices="cpu")
    how = {"return_sparse": True, "return_colbert_vecs": True, "max_length": length, "batch_size": 1}
    given = [model.encode(text, **how) for text in texts]
    return [
        Answer(one["dense_vecs"], {k: float(x) for k, x in one["lexical_weights"].items()}, one["colbert_vecs"])
        for one in given
    ]


def by_m3jax(directory: Path, texts: list[str], length: int) -> list[Answer]:
    given = m3jax.encode(m3jax.load(directory), texts, colbert=True, max_length=length)
    assert given.dense_vecs is not None and given.colbert_vecs is not None
    return [Answer(*one) for one in zip(given.dense_vecs, given.lexical_weights, given.colbert_vecs, strict=True)]


@torch.inference_mode()
def by_float64(directory: Path, texts: list[str], length: int) -> list[Answer]:
    model = transformers.XLMRobertaModel.from_pretrained(directory, dtype=torch.float32).double().eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    heads = {name: torch.load(directory / file, weights_only=True) for name, file in HEAD_FILES.items()}

    def head(name: str, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ heads[name]["weight"].double().T + heads[name]["bias"].double()

    answers = []
    for text in texts:
        inputs = tokenizer(text, truncation=True, max_length=length, return_tensors="pt")
        hidden = model(**inputs).last_hidden_state[0]
        assert hidden.dtype == torch.float64
        lexical: dict[str, float] = {}
        for term, weight in zip(inputs["input_ids"][0].tolist(), head("sparse_linear", hidden)[:, 0], strict=True):
            if term > 3 and weight > lexical.get(str(term), 0.0):  # 0 to 3: <s>, <pad>, </s>, <unk>
                lexical[str(term)] = float(weight)
        answers.append(Answer(hidden[0].numpy(), lexical, head("colbert_linear", hidden[1:]).numpy()))
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--geometry", default="24x1024", help="layers x width; heads of 64")
    parser.add_argument("--length", type=int, default=8192, help="tokens of the longest text")
    given = parser.parse_args()
    layers, width = map(int, given.geometry.split("x"))
    size = M3Config(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=width // 64, intermediate_size=4 * width
    )
    short = default_texts(512)
    texts = [*short, " ".join(short * 40)]
    with tempfile.TemporaryDirectory() as name:
        make(size, given.tokenizer, Path(name))
        theirs, ours, true = (f(Path(name), texts, given.length) for f in (by_flag_embedding, by_m3jax, by_float64))
    lengths = np.array([len(one.colbert) + 1 for one in true])
    print(
        "The largest difference of each kind: 1 − cosine of dense and of colbert vectors; lexical weights, and their mean."
    )
    print("tokens, texts, largest weight        between              dense  colbert  lexical     mean")
    for low, high in ((0, 64), (65, min(511, given.length - 1)), (512, given.length - 1), (given.length, given.length)):
        some = np.flatnonzero((low <= lengths) & (lengths <= high))
        if not some.size:
            continue
        largest = max(max(true[i].lexical.values(), default=0.0) for i in some)
        start = f"{lengths[some].min()} to {lengths[some].max()}, {some.size}, {largest:.2f}"
        for between, a, b in (
            ("FlagEmbedding, m3jax", theirs, ours),
            ("FlagEmbedding, float64", theirs, true),
            ("m3jax, float64", ours, true),
        ):
            lexical = np.concatenate([_differences(a[i].lexical, b[i].lexical) for i in some])
            dense, colbert = (
                max(_past_cosine(getattr(a[i], kind), getattr(b[i], kind)) for i in some)
                for kind in ("dense", "colbert")
            )
            print(f"{start:<28} {between:>23} {dense:12.1e} {colbert:8.1e} {lexical.max():8.1e} {lexical.mean():8.1e}")


def _differences(a: dict[str, float], b: dict[str, float]) -> np.ndarray:
    return np.array([abs(a.get(k, 0.0) - b.get(k, 0.0)) for k in a.keys() | b.keys()])


def _past_cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float((1 - (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).max(initial=0.0))


if __name__ == "__main__":
    main()
