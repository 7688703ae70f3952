"""The encoder: XLM-RoBERTa in Flax NNX, equal to transformers' XLMRobertaModel with the same weights.

Not here: the heads (heads.py), and dropout on attention weights, which fused attention kernels do not have.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from m3jax.attention import attention
from m3jax.config import M3Config
from m3jax.sharding import BATCH, LOOKED_UP, constrain, platform

# What the backward pass computes again of a layer: what goes element by element, all but the products with weights (attention
# too), or all. To keep everything is no choice: a GELU alone would keep three float32 arrays of four times the width, for which
# a GPU waits longer than for computing them (4 × 512, rows of 128 and of 600 tokens, two CPU cores: it saves 6 and 12% of the
# time, for 1.5 and 2.6 × the memory; RESULTS.md, "Training").
Remat = Literal["elements", "all_but_products", "all"]
_products = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
KEPT = {
    "elements": lambda primitive, *given, **params: (
        primitive.name in _ATTENTION or _products(primitive, *given, **params)
    ),
    "all_but_products": _products,
    "all": None,
}
# Attention with a gradient of its own: as JAX names splash's, Pallas's, cuDNN's, and that of long rows on CPU (custom_vjp).
_ATTENTION = {"pallas_call", "custom_vjp_call", "dot_product_attention_fwd_wrapper"}


def positions_from_ids(ids: Int[Array, "b l"], pad_id: int) -> Int[Array, "b l"]:
    """Position of each token: pad_id + the number of non-pad ids up to and including it; a pad id has pad_id (PAPER §1).

    It follows the ids, not the mask, as the reference does: a literal `<pad>` inside a text has position pad_id.

    >>> positions_from_ids(jnp.array([[0, 7, 1]]), 1)
    Array([[2, 3, 1]], dtype=int32)
    """
    real = (ids != pad_id).astype(jnp.int32)
    return jnp.cumsum(real, axis=1) * real + pad_id


# std 1/√inputs is 0.03 at width 1024, near XLM-R's 0.02, with which a small model's layers would be all but off.
_KERNEL_INIT = nnx.initializers.lecun_normal()


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _linear(
    x: Float[Array, "*n i"], kernel: Float[Array, "i o"], bias: Float[Array, " o"], dtype: jnp.dtype
) -> Float[Array, "*n o"]:
    """x · kernel + bias, float32: the product in the kernel's dtype, its sums float32 and then rounded to `dtype`.

    Autodiff's own gradient would be products of float32 with halves, which GPUs and TPUs compute as float32, many times slower.
    """
    return _linear_forward(x, kernel, bias, dtype)[0]


def _linear_forward(x: Array, kernel: Array, bias: Array, dtype: jnp.dtype) -> tuple[Array, tuple[Array, ...]]:
    return _dot(x, kernel, (x.ndim - 1,), (0,), dtype).astype(jnp.float32) + bias, (x, kernel)


def _linear_backward(dtype: jnp.dtype, kept: tuple[Array, ...], gradient: Array) -> tuple[Array, ...]:
    x, kernel = kept
    # The gradient of the bias sums up what is rounded, so that no float32 of it is ever written.
    gradient = gradient.astype(kernel.dtype)
    rows = tuple(range(x.ndim - 1))
    to_x = _dot(gradient, kernel, (x.ndim - 1,), (1,), dtype)
    if platform() == "cpu" and x.shape[-1] > gradient.shape[-1]:
        # XLA writes a product's first factor anew, transposed, which takes as long as the product: the narrower of the two.
        to_kernel = _dot(gradient, x, rows, rows, dtype).T
    else:
        to_kernel = _dot(x, gradient, rows, rows, dtype)
    to_bias = gradient.sum(rows, dtype=jnp.float32)
    return to_x.astype(x.dtype), to_kernel.astype(kernel.dtype), to_bias


_linear.defvjp(_linear_forward, _linear_backward)


def _dot(a: Array, b: Array, over_a: tuple[int, ...], over_b: tuple[int, ...], dtype: jnp.dtype) -> Array:
    return jax.lax.dot_general(a, b, ((over_a, over_b), ((), ())), preferred_element_type=dtype)


class Linear(nnx.Module):
    """A linear layer whose matrix product runs in the kernel's dtype and whose result is float32.

    On GPU and TPU the sums are rounded to the kernel's dtype before the bias is added: halves take half the memory and the
    time of moving it. `exact` keeps them, as CPUs do, whose products of halves are fast with float32 results only.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        rngs: nnx.Rngs,
        kernel_init: nnx.Initializer = _KERNEL_INIT,
        *,
        exact: bool = False,
    ):
        self.kernel = nnx.Param(kernel_init(rngs.params(), (inputs, outputs)))
        self.bias = nnx.Param(nnx.initializers.zeros(rngs.params(), (outputs,)))
        self.exact = exact

    def __call__(self, x: Float[Array, "*n i"]) -> Float[Array, "*n o"]:
        kernel = self.kernel[...]
        kept = self.exact or platform() == "cpu"
        return _linear(x.astype(kernel.dtype), kernel, self.bias[...], jnp.dtype(jnp.float32 if kept else kernel.dtype))


def layer_norm(config: M3Config, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # use_fast_variance computes E[x²] - E[x]², which loses digits that PyTorch keeps.
    return nnx.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, use_fast_variance=False, rngs=rngs)


def _embedding(config: M3Config, rows: int, rngs: nnx.Rngs, zero_row: int | None = None) -> nnx.Embed:
    normal = nnx.initializers.normal(config.initializer_range)

    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        table = normal(key, shape, dtype)
        return table if zero_row is None else table.at[zero_row].set(0.0)

    return nnx.Embed(rows, config.hidden_size, embedding_init=init, rngs=rngs)


class Embeddings(nnx.Module):
    """Token + position + type embeddings, then LayerNorm."""

    def __init__(self, config: M3Config, rngs: nnx.Rngs):
        self.word_embeddings = _embedding(config, config.vocab_size, rngs, zero_row=config.pad_token_id)
        self.position_embeddings = _embedding(
            config, config.max_position_embeddings, rngs, zero_row=config.pad_token_id
        )
        self.token_type_embeddings = _embedding(config, config.type_vocab_size, rngs)
        self.layer_norm = layer_norm(config, rngs)

    def __call__(self, ids: Int[Array, "b l"], positions: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        # take gives NaN past the table, where indexing would silently clamp.
        words = jnp.take(self.word_embeddings.embedding[...], ids, axis=0).astype(jnp.float32)
        return self.at_positions(constrain(words, LOOKED_UP), positions)

    def at_positions(self, words: Float[Array, "b l d"], positions: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        """The block from its second step on, for vectors in the place of token embeddings."""
        # Every token has type 0, the only one of XLM-R.
        places = jnp.take(self.position_embeddings.embedding[...], positions, axis=0)
        places = constrain(places, LOOKED_UP)
        return self.layer_norm(_own_rows(words + places + self.token_type_embeddings.embedding[0]))


class Layer(nnx.Module):
    """One post-norm transformer layer; the residual stream is float32 whatever the matrix products run in."""

    def __init__(self, config: M3Config, rngs: nnx.Rngs):
        width = config.hidden_size
        self.q = Linear(width, width, rngs)
        self.k = Linear(width, width, rngs)
        self.v = Linear(width, width, rngs)
        self.attention_out = Linear(width, width, rngs)
        self.attention_norm = layer_norm(config, rngs)
        self.up = Linear(width, config.intermediate_size, rngs)
        self.down = Linear(config.intermediate_size, width, rngs)
        self.output_norm = layer_norm(config, rngs)
        self.heads = config.num_attention_heads

    def __call__(
        self,
        hidden: Float[Array, "b l d"],
        segments: Int[Array, "b l"],
        dropout: float,
        keys: Key[Array, "b"] | None,
        *,
        packed: bool,
    ) -> Float[Array, "b l d"]:
        q, k, v = self.projected(hidden, hidden)
        return self.after(hidden, attention(q, k, v, segments, packed=packed), dropout, keys)

    def projected(self, queries: Float[Array, "b l d"], seen: Float[Array, "b m d"]) -> tuple[Array, Array, Array]:
        """q `[b, l, h, k]` of the queries, k and v `[b, m, h, k]` of what they see, in the kernels' dtype."""
        q, k, v = (
            project(x).astype(self.q.kernel.dtype).reshape(*x.shape[:2], self.heads, -1)
            for project, x in ((self.q, queries), (self.k, seen), (self.v, seen))
        )
        return q, k, v

    def after(
        self,
        hidden: Float[Array, "b l d"],
        attended: Float[Array, "b l h k"],
        dropout: float,
        keys: Key[Array, "b"] | None,
    ) -> Float[Array, "b l d"]:
        """The layer from its attention on."""
        first, second = (None, None) if keys is None else split_keys(keys, 2)
        mixed = self.attention_out(attended.reshape(hidden.shape))
        hidden = self.attention_norm(hidden + drop(mixed, dropout, first))
        return _own_rows(self.output_norm(hidden + drop(self.down(gelu(self.up(hidden))), dropout, second)))


class Encoder(nnx.Module):
    """XLM-RoBERTa: embeddings, layers, and the pooler that released files carry and M3 never reads."""

    def __init__(self, config: M3Config, rngs: nnx.Rngs):
        self.embeddings = Embeddings(config, rngs)
        self.layers = nnx.List([Layer(config, rngs) for _ in range(config.num_hidden_layers)])
        if config.pooler:
            self.pooler = Linear(config.hidden_size, config.hidden_size, rngs)

    def __call__(
        self,
        ids: Int[Array, "b l"],
        positions: Int[Array, "b l"],
        segments: Int[Array, "b l"],
        *,
        packed: bool = True,
        dropout: float = 0.0,
        keys: Key[Array, "b"] | None = None,
        remat: Remat = "elements",
    ) -> Float[Array, "b l d"]:
        """Hidden states of every token, float32.

        ids, positions, segments: [b, l]; a token attends to the tokens of its own segment, segment 0 is padding. packed: as in
        `attention`. dropout: probability on hidden states, in training only; needs `keys`, one a row, so that what is dropped
        of a row does not depend on the rows beside it. remat: what of each layer the backward pass computes again.
        """
        each = None if keys is None else split_keys(keys, 1 + len(self.layers))
        hidden = drop(self.embeddings(ids, positions), dropout, None if each is None else each[0])
        graph = nnx.split(self.layers[0])[0]
        states = [nnx.state(layer) for layer in self.layers]
        of_layers = None if each is None else each[1:]

        def run(hidden: Array, one: tuple[nnx.State, Array | None]) -> tuple[Array, None]:
            state, layer_keys = one
            return nnx.merge(graph, state)(hidden, segments, dropout, layer_keys, packed=packed), None

        if platform() == "gpu":
            # One after the other: a loop takes a quarter longer there, as it copies what is kept for the gradient into stacks
            # and out of them (RESULTS.md, "On a GPU"). Of "elements" XLA keeps what it finds cheaper to keep.
            run = jax.checkpoint(run, prevent_cse=remat != "elements", policy=KEPT[remat])
            for number, state in enumerate(states):
                hidden, _ = run(hidden, (state, None if of_layers is None else of_layers[number]))
            return hidden
        # The layers are alike: one is traced, compiled and run in a loop over the stacked parameters of all.
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        run = jax.checkpoint(run, prevent_cse=False, policy=KEPT[remat])
        return jax.lax.scan(run, hidden, (stacked, of_layers))[0]


def _own_rows(hidden: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
    """The same, whole on the device that has the row.

    fsdp splits the width of tables and kernels. Left alone, XLA splits the hidden states as the tables are, and devices send
    each other those of all rows, several times a layer, in place of the weights.
    """
    return constrain(hidden, BATCH)


def gelu(x: Array) -> Array:
    """x · Φ(x) by erf, as PyTorch computes it (the tanh form is 7e-4 off; jax.nn.gelu's erfc takes twice as long on CPU)."""
    return 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5))


def split_keys(keys: Key[Array, "b"], count: int) -> Key[Array, "n b"]:
    """`count` keys of each row's key."""
    return jax.vmap(lambda key: jax.random.split(key, count), out_axes=1)(keys)


def drop(x: Float[Array, "b l d"], rate: float, keys: Key[Array, "b"] | None) -> Float[Array, "b l d"]:
    """Inverted dropout; without a rate or keys, x itself."""
    if rate == 0.0 or keys is None:
        return x
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, x.shape[1:]))(keys)
    return jnp.where(kept, x / (1.0 - rate), 0.0)
