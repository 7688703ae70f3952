"""What the parity tests share: PyTorch encoders whose weights hide nothing, their parameters under our names, full precision.

Not here: the references themselves (plain PyTorch and FlagEmbedding), each of which stands in the one file that needs it.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import pytest

from m3jax.config import M3Config
from m3jax.model import Params, flatten, shapes, unflatten
from m3jax.weights import torch_name


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """Accelerators round the inputs of float32 products unless asked not to."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="session")
def geometry() -> Callable[..., M3Config]:
    """geometry(width, layers, **changes): the sizes of M3Config.tiny but for those."""

    def make(width: int, layers: int, **changes: Any) -> M3Config:
        sizes = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 2 * width}
        return M3Config.tiny(**(sizes | changes))

    return make


@pytest.fixture(scope="session")
def torch_encoder() -> Callable[[M3Config, int], Any]:
    """torch_encoder(config, seed): transformers' XLMRobertaModel without dropout, every tensor random.

    Fresh weights have biases of 0, scales of 1 and matrices so small that attention is flat: a bias that is forgotten or a
    matrix that is transposed would hardly show.
    """
    torch = pytest.importorskip("torch", reason="parity with PyTorch needs torch (the `test` extra)")
    transformers = pytest.importorskip("transformers", reason="parity needs transformers (the `test` extra)")
    # Models this small gain nothing from OpenMP, whose waiting threads spin on the cores that XLA wants.
    torch.set_num_threads(1)

    def make(config: M3Config, seed: int) -> Any:
        theirs = transformers.XLMRobertaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            max_position_embeddings=config.max_position_embeddings,
            type_vocab_size=config.type_vocab_size,
            layer_norm_eps=config.layer_norm_eps,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        return randomised(torch, transformers.XLMRobertaModel(theirs), seed, config.num_hidden_layers)

    return make


@pytest.fixture(scope="session")
def torch_heads() -> Callable[[M3Config, int], dict[str, Any]]:
    """torch_heads(config, seed): {"sparse_linear": Linear, "colbert_linear": Linear}, every tensor random."""
    torch = pytest.importorskip("torch", reason="parity with PyTorch needs torch (the `test` extra)")

    def make(config: M3Config, seed: int) -> dict[str, Any]:
        heads = {
            "sparse_linear": torch.nn.Linear(config.hidden_size, 1),
            "colbert_linear": torch.nn.Linear(config.hidden_size, config.colbert_dim),
        }
        for head in heads.values():
            randomised(torch, head, seed)
        with torch.no_grad():
            heads["sparse_linear"].weight /= 4  # token weights up to about 1, as a trained head gives them
        return heads

    return make


def randomised(torch: Any, module: Any, seed: int, layers: int = 1) -> Any:
    """Matrices with a gain of 1.5, LayerNorm scales about 1, biases of 0.2, embeddings of 0.5; in evaluation mode.

    What layers add to their input shrinks with their number, and attention is sharp: otherwise the tokens of a text become
    one and the same vector (24 layers: differences of 4e-6), which would hide every error in it.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim == 1:
                noise *= 0.2
            elif "embeddings" in name:
                noise *= 0.5
            else:
                noise *= (2.5 if "query" in name or "key" in name else 1.5) * tensor.shape[1] ** -0.5
            if "output" in name:
                noise *= 0.6 / layers**0.5
            tensor.copy_(1 + noise if "LayerNorm.weight" in name else noise)
    return module.eval()


@pytest.fixture(scope="session")
def to_ours() -> Callable[[M3Config, Mapping[str, Any]], Params]:
    """to_ours(config, state): the parameter tree of a dict of PyTorch tensors, as far as the dict goes."""

    def convert(config: M3Config, state: Mapping[str, Any]) -> Params:
        names = {path: torch_name(path) for path in flatten(shapes(config))}
        arrays = {path: state[name].detach().numpy() for path, name in names.items() if name in state}
        return unflatten({p: np.array(x.T if p.endswith("/kernel") else x) for p, x in arrays.items()})

    return convert


@pytest.fixture(scope="session")
def peer_module() -> Callable[[str], Any]:
    """peer_module(name): a module of the `peer` extra; skips the test where its package is not installed.

    Not `importorskip`, which skips as well where the package is there and something that it imports is not.
    """

    def find(name: str) -> Any:
        package = name.partition(".")[0]
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"parity with the peer needs {package} (the `peer` extra)")
        return importlib.import_module(name)

    return find


@pytest.fixture(scope="session")
def flag_embedding(peer_module: Callable[[str], Any]) -> Callable[[str], Any]:
    """flag_embedding(module): that module of FlagEmbedding."""
    return lambda module: peer_module(f"FlagEmbedding.{module}")
