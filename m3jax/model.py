"""M3: config, parameters and tokenizer of one model, and `apply`, the pure function from token ids to Representations.

Not here: texts (embedder.py), files (weights.py, checkpoint.py).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int, Key

from m3jax.config import M3Config
from m3jax.heads import Heads
from m3jax.representations import Representations
from m3jax.sharding import path_name
from m3jax.tokenization import Tokenizer
from m3jax.xlm_roberta import Encoder, Remat, positions_from_ids

Params = dict[Any, Any]  # nested dict of arrays, the shape of `init`'s result; layers have their number as key


class Network(nnx.Module):
    """The encoder and its heads."""

    def __init__(self, config: M3Config, rngs: nnx.Rngs):
        self.encoder = Encoder(config, rngs)
        self.heads = Heads(config, rngs)


@functools.lru_cache(maxsize=64)
def abstract(network_of: Callable[[M3Config, nnx.Rngs], Any], config: M3Config) -> tuple[nnx.GraphDef[Any], Any]:
    """The graph of a network with an `encoder`, and its state as shapes. Tracing 24 layers takes seconds: one is traced and
    copied."""
    one = dataclasses.replace(config, num_hidden_layers=1)
    network = nnx.eval_shape(lambda: network_of(one, nnx.Rngs(0)))
    layer = network.encoder.layers[0]
    network.encoder.layers = nnx.List([nnx.clone(layer) for _ in range(config.num_hidden_layers)])
    return nnx.split(network)


def init(config: M3Config, key: Key[Array, ""]) -> Params:
    """Random float32 parameters: tables normal with std `initializer_range`, kernels 1/√inputs; biases and the rows of
    `<pad>` zero."""
    return nnx.to_pure_dict(nnx.state(Network(config, nnx.Rngs(key))))


def shapes(config: M3Config) -> Params:
    """The tree of `init` as jax.ShapeDtypeStruct, without making an array."""
    return nnx.to_pure_dict(abstract(Network, config)[1])


def cast(params: Params, dtype: Any) -> Params:
    """Matrices in `dtype`, which their products then run in; vectors (biases, LayerNorm) stay float32: they are small
    and every activation passes through them."""
    return jax.tree.map(lambda x: x.astype(dtype if x.ndim > 1 else jnp.float32), params)


def flatten(params: Params) -> dict[str, Any]:
    """{"encoder/layers/0/q/kernel": leaf, …}, in the tree's own order.

    >>> flatten({"layers": {0: {"kernel": 7}}})
    {'layers/0/kernel': 7}
    """
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def unflatten(flat: Mapping[str, Any]) -> Params:
    """The nested dict that `flatten` took apart; numbers in a path are layer numbers.

    >>> unflatten({"layers/0/kernel": 7})
    {'layers': {0: {'kernel': 7}}}
    """
    tree: Params = {}
    for path, leaf in flat.items():
        *parents, last = (int(key) if key.isdecimal() else key for key in path.split("/"))
        node: Params = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def check_tree(
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    *,
    source: Any,
    extra: Sequence[str] = (),
    name: Callable[[str], str] = str,
) -> None:
    """ValueError that lists every parameter missing, left over (`extra` too) or misshapen, under the source's `name`s."""
    lines = [f"missing: {name(path)}" for path in expected if path not in found]
    lines += [f"left over: {name(path)}" for path in found if path not in expected]
    lines += [f"left over: {tensor}" for tensor in extra]
    lines += [
        f"misshapen: {name(path)} is {found[path]}, expected {shape} (our layout: kernels are [inputs, outputs])"
        for path, shape in expected.items()
        if path in found and tuple(found[path]) != tuple(shape)
    ]
    if lines:
        raise ValueError(
            f"{source}: the tensors must be those of the config's sizes; {len(lines)} are not. Take the config.json that "
            "the weights were saved with.\n  " + "\n  ".join(lines)
        )


def apply(
    config: M3Config,
    params: Params,
    ids: Int[Array | np.ndarray, "b l"],
    mask: Bool[Array | np.ndarray, "b l"],
    *,
    dropout: float = 0.0,
    key: Key[Array, ""] | Key[Array, "b"] | None = None,
    remat: Remat = "elements",
) -> Representations:
    """The representations of b texts, one a row: a pure function to jit, grad, vmap and shard.

    ids: token ids, `<s>` first, filled up with pad_token_id. mask: True at real tokens; texts start at column 0. Padding
    changes nothing. dropout (probability on hidden states) needs a key, or one a row. remat: what the backward pass computes
    again of each layer, to save memory: what goes by "elements", "all_but_products" (of matrices with weights) or "all". On a
    mesh, call it under `jax.set_mesh`: the kernels of GPU and TPU are split by the mesh in context.
    An id past the vocabulary gives NaN. Raises ValueError where l is beyond the position table.
    """
    ids, mask = jnp.asarray(ids), jnp.asarray(mask)
    if ids.shape[1] > config.max_length:
        raise ValueError(
            f"rows must fit the position table: at most {config.max_length} tokens, got {ids.shape[1]}; cut the texts "
            "or take a model with more positions"
        )
    if dropout and key is None:
        raise ValueError(f"dropout needs a PRNG key, got dropout={dropout} and key=None")
    network = nnx.merge(abstract(Network, config)[0], params)
    positions = positions_from_ids(ids, config.pad_token_id)
    keys = jax.random.split(key, len(ids)) if key is not None and key.ndim == 0 else key
    hidden = network.encoder(
        ids, positions, mask.astype(jnp.int32), packed=False, dropout=dropout, keys=keys, remat=remat
    )
    return network.heads(hidden, ids, mask)


@dataclasses.dataclass(frozen=True, repr=False)
class M3:
    """A model that is ready to encode: `m3jax.load` gives one.

    Raises ValueError where the tokenizer has ids that the embedding table lacks.
    """

    config: M3Config
    params: Params
    tokenizer: Tokenizer

    def __post_init__(self) -> None:
        if self.tokenizer.vocab_size > self.config.vocab_size:
            raise ValueError(
                f"the tokenizer must fit the embedding table: it has ids up to {self.tokenizer.vocab_size - 1}, the "
                f"table {self.config.vocab_size} rows; take the tokenizer that the weights were trained with"
            )
        ids = {name: getattr(self.tokenizer, f"{name}_id") for name in ("cls", "pad", "eos", "unk")}
        expected = {name: getattr(self.config, f"{name}_token_id") for name in ids}
        if ids != expected:
            raise ValueError(
                f"special ids of tokenizer and config must agree: the config has {expected}, the tokenizer {ids}"
            )

    def __repr__(self) -> str:
        count = sum(x.size for x in jax.tree.leaves(self.params))
        c = self.config
        return f"M3({c.num_hidden_layers} layers × {c.hidden_size}, {count:,} parameters, {c.max_length} tokens)"

    def tokens(self, weights: dict[str, float] | list[dict[str, float]]) -> Any:
        """Lexical weights with readable terms: {"70": 0.2} → {"▁What": 0.2}; `▁a` (starts a word) and `a` stay apart.

        weights: one dict of `Embeddings.lexical_weights` or a list of them; the answer has the same form, heaviest first.
        """
        if isinstance(weights, list):
            return [self.tokens(one) for one in weights]
        heaviest = sorted(weights.items(), key=lambda item: -item[1])
        pieces = self.tokenizer.pieces([int(term) for term, _ in heaviest])
        return dict(zip(pieces, (weight for _, weight in heaviest), strict=True))
