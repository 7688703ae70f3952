"""Stage 1, RetroMAE (PAPER §3; Xiao et al. 2022, arXiv:2205.12035): the encoder, a language-model head, the one-layer enhanced
decoder, and the sum of both masked-language losses, whose logits are never there for all positions at once.

Not here: what a batch is, and the step (train/). Every token that is masked becomes `<mask>`, and tokens are masked one by one;
the reference's code masks whole words, and as BERT did leaves a tenth of them as they are and draws another tenth at random.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from m3jax.attention import attend
from m3jax.config import M3Config
from m3jax.model import Params, abstract
from m3jax.sharding import BATCH, STACKED, batch_groups, constrain
from m3jax.xlm_roberta import (
    KEPT,
    Encoder,
    Layer,
    Linear,
    Remat,
    drop,
    gelu,
    layer_norm,
    positions_from_ids,
    split_keys,
)

# The decoder's queries are computed in blocks, and what they see is drawn in squares, of so many positions.
_SQUARE = 128
# Positions of a device whose logits are there at a time: 1 GB of them in float32 over 250,002 terms.
_LOGITS_AT_A_TIME = 1024


class LanguageHead(nnx.Module):
    """transformers' RobertaLMHead: linear, GELU and LayerNorm, then the products with the word embeddings, plus a bias.

    The products are `vocabulary_loss`; here are what comes before them and their bias.
    """

    def __init__(self, config: M3Config, rngs: nnx.Rngs):
        self.dense = Linear(config.hidden_size, config.hidden_size, rngs)
        self.layer_norm = layer_norm(config, rngs)
        self.bias = nnx.Param(nnx.initializers.zeros(rngs.params(), (config.vocab_size,)))

    def __call__(self, hidden: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return self.layer_norm(gelu(self.dense(hidden)))


class Network(nnx.Module):
    """All parameters of stage 1; the decoder's embeddings and the head's matrix are the encoder's tables."""

    def __init__(self, config: M3Config, rngs: nnx.Rngs):
        self.encoder = Encoder(config, rngs)
        self.lm_head = LanguageHead(config, rngs)
        self.decoder = Layer(config, rngs)


def init(config: M3Config, key: Key[Array, ""]) -> Params:
    """Random float32 parameters, drawn as `model.init` draws them: the trees `encoder`, `lm_head` and `decoder`."""
    return nnx.to_pure_dict(nnx.state(Network(config, nnx.Rngs(key))))


def shapes(config: M3Config) -> Params:
    """The tree of `init` as jax.ShapeDtypeStruct, without making an array."""
    return nnx.to_pure_dict(abstract(Network, config)[1])


class Targets(NamedTuple):
    """How many tokens are to be found: of those that the encoder reads as `<mask>`, and by the decoder all."""

    encoder: Int[Array, "*b"]
    decoder: Int[Array, "*b"]


def targets(config: M3Config, ids: Int[Array, "b l"], mask: Bool[Array, "b l"], masked: float = 0.3) -> Targets:
    """The targets of each row.

    The decoder's are its tokens but CLS, EOS, PAD and UNK; the encoder's of these n the share `masked`, rounded, and at least
    one where there is any.

    >>> [int(n[0]) for n in targets(M3Config.tiny(), jnp.array([[0, 7, 8, 9, 7, 3, 2, 1]]), jnp.array([[True] * 7 + [False]]))]
    [1, 4]
    """
    n = _content(config, ids, mask).sum(axis=1)
    return Targets(jnp.minimum(n, jnp.maximum(1, jnp.round(masked * n).astype(jnp.int32))), n)


def losses(
    config: M3Config,
    params: Params,
    ids: Int[Array, "b l"],
    mask: Bool[Array, "b l"],
    keys: Key[Array, "b"],
    total: Targets,
    *,
    mask_id: int,
    masked: float = 0.3,
    seen: float = 0.5,
    dropout: float = 0.0,
    remat: Remat = "elements",
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The sum of the encoder's and the decoder's loss on some rows of a batch, and each by its name, which has no gradient.

    A loss is Σ − log softmax(logits)[token] over the targets of these rows, divided by `total`, the sums of `targets` over the
    whole batch: so the losses of the parts of a batch add up to the batch's, its mean over targets.

    ids, mask: as `model.apply` takes them, texts whole. keys: one a row; what is masked, seen and dropped of a row is a
    function of its key alone, whatever rows and padding are beside it. mask_id: the id of `<mask>`. masked: the share of a
    text's tokens that the encoder does not see (PAPER §3: 0.3). seen: the probability with which a position of the decoder
    sees each other one (0.5). dropout, remat: as in `model.apply`, of the decoder's layer too.
    """
    network = nnx.merge(abstract(Network, config)[0], params)
    to_mask, to_encoder, to_seen, *to_decoder = split_keys(keys, 6)
    number = targets(config, ids, mask, masked)
    positions = positions_from_ids(ids, config.pad_token_id)

    most = max(1, round(masked * ids.shape[1]))
    places = _drawn_places(to_mask, _content(config, ids, mask), most)
    is_target = jnp.arange(most) < number.encoder[:, None]
    read = jax.vmap(lambda row, at, hidden: row.at[at].set(jnp.where(hidden, mask_id, row[at])))(ids, places, is_target)
    hidden = network.encoder(
        read, positions, mask.astype(jnp.int32), packed=False, dropout=dropout, keys=to_encoder, remat=remat
    )
    # Of the decoder's layer the backward pass computes again what it does of the encoder's.
    decode = jax.checkpoint(functools.partial(_decoded, network, dropout=dropout, seen=seen), policy=KEPT[remat])
    rebuilt = decode(hidden[:, 0], ids, positions, mask, to_seen, to_decoder)

    at_masks = jnp.take_along_axis(hidden, places[:, :, None], axis=1)
    of_decoder = _content(config, ids, mask) / jnp.maximum(total.decoder, 1)
    of_encoder = is_target / jnp.maximum(total.encoder, 1)
    weights = jnp.concatenate([of_encoder, of_decoder], axis=1)
    head, table = network.lm_head, network.encoder.embeddings.word_embeddings.embedding[...]
    # One head for both, and so one gradient of its table, the largest array there is.
    loss, each = vocabulary_loss(
        head(jnp.concatenate([at_masks, rebuilt], axis=1)).astype(head.dense.kernel.dtype),
        table,
        head.bias[...],
        jnp.concatenate([jnp.take_along_axis(ids, places, axis=1), ids], axis=1),
        weights,
    )
    each = jax.lax.stop_gradient(each * weights)
    return loss, {"encoder": each[:, :most].sum(), "decoder": each[:, most:].sum()}


def _content(config: M3Config, ids: Array, mask: Array) -> Array:
    return mask & ~jnp.isin(ids, jnp.array(config.unused_ids))


def _drawn_places(keys: Key[Array, "b"], content: Bool[Array, "b l"], most: int) -> Int[Array, "b n"]:
    """Of each row `most` of its places in a random order, those of the content first: the first k are a random k of it."""
    # A key a place, so that the draw of one does not depend on how many follow it.
    columns = jnp.arange(content.shape[1])
    draw = jax.vmap(jax.vmap(lambda key, at: jax.random.uniform(jax.random.fold_in(key, at)), (None, 0)), (0, None))
    return jax.lax.top_k(jnp.where(content, draw(keys, columns), -1.0), most)[1]


def _decoded(
    network: Network,
    sentence: Float[Array, "b d"],
    ids: Int[Array, "b l"],
    positions: Int[Array, "b l"],
    mask: Bool[Array, "b l"],
    keys: Key[Array, "b"],
    dropout_keys: list[Key[Array, "b"]],
    *,
    dropout: float,
    seen: float,
) -> Float[Array, "b l d"]:
    """The hidden states of the enhanced decoder: at each position what it makes of the sentence and of the tokens it sees."""
    embeddings, layer = network.encoder.embeddings, network.decoder
    of_queries, of_tokens, of_layer = dropout_keys
    # The sentence embedding at every position, which only the position embedding tells apart.
    queries = embeddings.at_positions(jnp.broadcast_to(sentence[:, None], (*ids.shape, sentence.shape[1])), positions)
    queries = drop(queries, dropout, of_queries)
    tokens = drop(embeddings(ids, positions), dropout, of_tokens)
    q, k, v = layer.projected(queries, jnp.concatenate([sentence[:, None], tokens[:, 1:]], axis=1))
    return layer.after(queries, enhanced_attention(q, k, v, mask, keys, seen), dropout, of_layer)


def enhanced_attention(
    q: Float[Array, "b l h k"],
    k: Float[Array, "b l h k"],
    v: Float[Array, "b l h k"],
    mask: Bool[Array, "b l"],
    keys: Key[Array, "b"],
    seen: float = 0.5,
) -> Float[Array, "b l h k"]:
    """Attention of each position over what `seen_in_block` draws for it, in blocks of queries: never [l, l] at once."""
    length = q.shape[1]
    blocks = -(-length // _SQUARE)
    filled = jnp.pad(q, ((0, 0), (0, blocks * _SQUARE - length), (0, 0), (0, 0)))
    in_blocks = filled.reshape(len(q), blocks, _SQUARE, *q.shape[2:]).swapaxes(0, 1)

    # Checkpointed: the backward pass draws and computes a block again instead of keeping its weights.
    @jax.checkpoint
    def one(block: tuple[Array, Array]) -> Array:
        number, queries = block
        return attend(queries, k, v, seen_in_block(keys, mask, number, seen))

    attended = jax.lax.map(one, (jnp.arange(blocks), in_blocks))
    return attended.swapaxes(0, 1).reshape(filled.shape)[:, :length]


def seen_in_block(
    keys: Key[Array, "b"], mask: Bool[Array, "b l"], block: Int[Array, ""] | int, seen: float = 0.5
) -> Bool[Array, "b s l"]:
    """What each of the s = 128 positions of a block of queries sees of its row: column 0, the sentence embedding, always;
    itself and padding never; each other position with the probability `seen`.

    Drawn in squares by the row's key, the block and the square: the same whatever the row's padded length is.
    """
    rows, columns = block * _SQUARE + jnp.arange(_SQUARE)[:, None], jnp.arange(mask.shape[1])
    squares = -(-mask.shape[1] // _SQUARE)

    def of_row(key: Array) -> Array:
        each = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, block), jnp.arange(squares))
        drawn = jax.vmap(lambda square: jax.random.bernoulli(square, seen, (_SQUARE, _SQUARE)))(each)
        return drawn.swapaxes(0, 1).reshape(_SQUARE, -1)[:, : mask.shape[1]]

    others = jax.vmap(of_row)(keys) & (rows != columns)
    return (others | (columns == 0)) & mask[:, None, :]


@jax.custom_vjp
def vocabulary_loss(
    hidden: Float[Array, "b n d"],
    table: Float[Array, "v d"],
    bias: Float[Array, " v"],
    tokens: Int[Array, "b n"],
    weights: Float[Array, "b n"],
) -> tuple[Float[Array, ""], Float[Array, "b n"]]:
    """Σ weights · e, and e = − log softmax(hidden · tableᵀ + bias) at each position's token, which is without gradient.

    The products run in hidden's dtype, their sums are float32. Positions go through in blocks, so that only a block's logits
    are there. As the result is one number, its gradient is known up to a factor when the logits are there: it is computed with
    them, and no logits are computed twice. weights have no gradient.

    >>> one = jnp.ones((1, 1, 1))
    >>> vocabulary_loss(one, jnp.zeros((2, 1)), jnp.zeros(2), jnp.zeros((1, 1), int), one[0])[0]
    Array(0.6931472, dtype=float32)
    """
    table, blocks = _whole(table, hidden.dtype), _in_blocks(hidden, tokens)
    each = jax.lax.map(lambda block: _entropies(_logits(block[0], table, bias), block[1])[0], blocks)
    each = _joined(each, tokens.shape)
    return (weights * each).sum(), each


def _vocabulary_loss_forward(
    hidden: Array, table: Array, bias: Array, tokens: Array, weights: Array
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    ours, terms = _whole(table, hidden.dtype), jnp.arange(len(bias))

    def one(sums: tuple[Array, Array], block: tuple[Array, ...]) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        x, found, weight = block
        logits = _logits(x, ours, bias)
        each, normalizer = _entropies(logits, found)
        to_logits = weight[..., None] * (jnp.exp(logits - normalizer) - (terms == found[..., None]))
        to_bias = sums[1] + to_logits.sum((1, 2))
        to_logits = to_logits.astype(x.dtype)
        to_x = jnp.einsum("grsv,vd->grsd", to_logits, ours, preferred_element_type=jnp.float32)
        to_table = sums[0] + jnp.einsum("grsv,grsd->gvd", to_logits, x, preferred_element_type=jnp.float32)
        return (constrain(to_table, BATCH), constrain(to_bias, BATCH)), (each, to_x.astype(x.dtype))

    # Each group of devices that has rows of its own sums up for itself: one exchange in the end, none a block.
    nothing = [constrain(jnp.zeros((batch_groups(), *x.shape), jnp.float32), BATCH) for x in (table, bias)]
    (to_table, to_bias), (each, to_hidden) = jax.lax.scan(
        one, (nothing[0], nothing[1]), _in_blocks(hidden, tokens, weights)
    )
    each, to_hidden = _joined(each, tokens.shape), _joined(to_hidden, hidden.shape)
    return ((weights * each).sum(), each), (to_hidden, to_table.sum(axis=0), to_bias.sum(axis=0))


def _vocabulary_loss_backward(kept: tuple[Array, ...], gradient: tuple[Array, Array]) -> tuple[Any, ...]:
    to_hidden, to_table, to_bias = ((gradient[0] * x).astype(x.dtype) for x in kept)
    return to_hidden, to_table, to_bias, None, None


vocabulary_loss.defvjp(_vocabulary_loss_forward, _vocabulary_loss_backward)


def _whole(table: Array, dtype: jnp.dtype) -> Array:
    """The table as the products take it, on every device: split, it would be gathered for each block."""
    return constrain(table.astype(dtype), PartitionSpec())


def _logits(x: Array, table: Array, bias: Array) -> Array:
    return jnp.einsum("grsd,vd->grsv", x, table, preferred_element_type=jnp.float32) + bias


def _entropies(logits: Array, tokens: Array) -> tuple[Array, Array]:
    """− log softmax(logits) at the tokens, and the logarithm of the softmax's sum, whose last axis has length 1."""
    normalizer = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return (normalizer - jnp.take_along_axis(logits, tokens[..., None], axis=-1))[..., 0], normalizer


def _in_blocks(*arrays: Array) -> tuple[Array, ...]:
    """[b, n, …] → [blocks, g, r, s, …], positions filled up with zeros: of each of the g groups of devices its own r rows."""
    groups = batch_groups()
    rows, length = arrays[0].shape[0] // groups, arrays[0].shape[1]
    blocks = -(-length // max(1, _LOGITS_AT_A_TIME // rows))
    size = -(-length // blocks)

    def split(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, blocks * size - length), *((0, 0),) * (x.ndim - 2)))
        return constrain(jnp.moveaxis(x.reshape(groups, rows, blocks, size, *x.shape[2:]), 2, 0), STACKED)

    return tuple(split(x) for x in arrays)


def _joined(x: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of `_in_blocks` for one array."""
    return constrain(jnp.moveaxis(x, 0, 2).reshape(shape[0], -1, *shape[2:])[:, : shape[1]], BATCH)
