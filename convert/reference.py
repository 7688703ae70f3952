"""What PyTorch answers: transformers' XLMRobertaModel and tokenizer with the two heads in plain torch, as PAPER §1 has them.

Not here: m3jax's own encode, with which verify.py compares it. torch and transformers are imported inside the functions.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from m3jax.embeddings import Embeddings
from m3jax.weights import HEAD_FILES


def is_installed() -> bool:
    """Whether PyTorch can be asked."""
    return find_spec("torch") is not None and find_spec("transformers") is not None


def encode(directory: Path, texts: Sequence[str], max_length: int) -> Embeddings:
    """The three representations of each text, one text at a time, in float32 on the CPU.

    directory: a released one with both head files. Raises ValueError where PyTorch is not installed, a head file is not
    there, or transformers finds an encoder's tensor missing or one that it does not know.
    """
    if not is_installed():
        raise ValueError(
            'the PyTorch side needs torch and transformers: pip install -e ".[test]", or run it with m3jax'
        )
    import torch
    import transformers

    absent = [file for file in HEAD_FILES.values() if not (directory / file).exists()]
    if absent:
        raise ValueError(
            f"{directory}: PyTorch's side reads the heads from {' and '.join(HEAD_FILES.values())}, but "
            f"{' and '.join(absent)} is not there; add it (`to-pytorch` writes both), or run this side with m3jax"
        )
    transformers.logging.set_verbosity_error()  # what it would say of missing tensors is an error below
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    loaded: Any = transformers.XLMRobertaModel.from_pretrained(
        directory, dtype=torch.float32, add_pooling_layer=False, output_loading_info=True
    )
    model, loading = loaded
    unfit = [
        f"{kind.removesuffix('_keys')}: {key}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        for key in sorted(map(str, loading[kind]))
        if not key.startswith("pooler.")
    ]
    if unfit:
        raise ValueError(
            f"{directory}: transformers must find the encoder's tensors and no others:\n  " + "\n  ".join(unfit)
        )
    heads = {}
    for head, file in HEAD_FILES.items():
        state = torch.load(directory / file, map_location="cpu", weights_only=True)
        heads[head] = (state["weight"].float(), state["bias"].float())
    unused = {tokenizer.cls_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    dense, terms, colbert = [], [], []
    for text in texts:
        inputs = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")
        with torch.inference_mode():
            hidden = model.eval()(**inputs).last_hidden_state[0]
            weights = torch.nn.functional.linear(hidden, *heads["sparse_linear"])[:, 0].relu()
            vectors = torch.nn.functional.linear(hidden[1:], *heads["colbert_linear"])
            dense.append(torch.nn.functional.normalize(hidden[0], dim=0).numpy())
            colbert.append(torch.nn.functional.normalize(vectors, dim=1).numpy())
        largest: dict[int, float] = {}
        for term, weight in zip(inputs["input_ids"][0].tolist(), weights.tolist(), strict=True):
            if term not in unused and weight > largest.get(term, 0.0):
                largest[term] = weight
        terms.append(sorted(largest.items()))
    starts = np.cumsum([0, *map(len, terms)])
    ids, values = [term for row in terms for term, _ in row], [weight for row in terms for _, weight in row]
    sparse = csr_matrix((np.array(values, np.float32), ids, starts), shape=(len(terms), model.config.vocab_size))
    return Embeddings(dense=np.stack(dense), terms=sparse, colbert=colbert)
