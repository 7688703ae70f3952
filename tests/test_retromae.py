"""Stage 1 beside a second, naive implementation that holds every mask and every logit, and its losses worked out by hand.

Not here: the encoder (test_xlm_roberta.py), and whole runs (e2e/test_train_retromae.py).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3jax import retromae
from m3jax.retromae import enhanced_attention, losses, seen_in_block, targets, vocabulary_loss
from m3jax.xlm_roberta import Encoder, positions_from_ids
from tests.small_texts import MASK, MODEL, batch, close


@pytest.fixture(scope="module")
def params():
    """Random ones, in which no bias and no row is zero."""
    drawn = retromae.init(MODEL, jax.random.key(0))
    return jax.tree.map(
        lambda x: x + 0.1 * jnp.asarray(np.random.default_rng(x.size).normal(size=x.shape), x.dtype), drawn
    )


def loss_of(params, ids, mask, keys):
    total = retromae.Targets(*(n.sum() for n in targets(MODEL, ids, mask)))
    return losses(MODEL, params, ids, mask, keys, total, mask_id=MASK)


def naive_seen(key, n, share=0.5):
    """[n, n]: what each position sees, place by place."""
    seen = np.zeros((n, n), bool)
    for block in range(-(-n // 128)):
        for square in range(-(-n // 128)):
            of_square = jax.random.fold_in(jax.random.fold_in(key, block), square)
            drawn = np.asarray(jax.random.bernoulli(of_square, share, (128, 128)))
            for i in range(block * 128, min(n, block * 128 + 128)):
                for j in range(square * 128, min(n, square * 128 + 128)):
                    seen[i, j] = j == 0 or (i != j and drawn[i % 128, j % 128])
    return seen


def naive_choice(text, key):
    """Of a text the places that are masked, and what each place sees."""
    to_mask, _, to_seen, *_ = jax.random.split(key, 6)
    drawn = {i: float(jax.random.uniform(jax.random.fold_in(to_mask, i))) for i in content(text)}
    return sorted(drawn, key=lambda i: -drawn[i])[: max(1, round(0.3 * len(drawn)))], naive_seen(to_seen, len(text))


def content(text):
    return [i for i, token in enumerate(text) if token not in (0, 1, 2, 3)]


def naive_losses(params, texts, chosen):
    """Text by text and head by head, with whole matrices of attention and whole logits; without padding."""
    embeddings, decoder, head = params["encoder"]["embeddings"], params["decoder"], params["lm_head"]
    table = embeddings["word_embeddings"]["embedding"]

    def norm(x, of):
        return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5) * of["scale"] + of["bias"]

    def linear(x, of):
        return x @ of["kernel"] + of["bias"]

    def gelu(x):
        return jax.nn.gelu(x, approximate=False)

    def embedded(words):
        places = embeddings["position_embeddings"]["embedding"][2 : 2 + len(words)]
        return norm(words + places + embeddings["token_type_embeddings"]["embedding"][0], embeddings["layer_norm"])

    def entropy(x, token):
        logits = table @ norm(gelu(linear(x, head["dense"])), head["layer_norm"]) + head["bias"]
        return jnp.log(jnp.exp(logits).sum()) - logits[token]

    found = {"encoder": [], "decoder": []}
    for text, (masked, seen) in zip(texts, chosen, strict=True):
        read = text.copy()
        read[masked] = MASK
        graph = retromae.abstract(retromae.Network, MODEL)[0]
        encoder = retromae.nnx.merge(graph, params).encoder
        given = jnp.asarray(read)[None]
        states = encoder(given, positions_from_ids(given, 1), jnp.ones_like(given))[0]
        found["encoder"] += [entropy(states[i], text[i]) for i in masked]

        queries = embedded(jnp.tile(states[0], (len(text), 1)))
        keys_and_values = jnp.concatenate([states[:1], embedded(table[text])[1:]])
        for i in content(text):
            others = np.flatnonzero(seen[i])
            q = linear(queries[i], decoder["q"]).reshape(2, 8)
            k, v = (linear(keys_and_values[others], decoder[of]).reshape(-1, 2, 8) for of in "kv")
            mixed = [jax.nn.softmax(k[:, h] @ q[h] / np.sqrt(8)) @ v[:, h] for h in range(2)]
            state = norm(
                queries[i] + linear(jnp.concatenate(mixed), decoder["attention_out"]), decoder["attention_norm"]
            )
            state = norm(state + linear(gelu(linear(state, decoder["up"])), decoder["down"]), decoder["output_norm"])
            found["decoder"].append(entropy(state, text[i]))
    means = {name: jnp.stack(each).mean() for name, each in found.items()}
    return means["encoder"] + means["decoder"], means


@pytest.fixture(scope="module")
def value_and_gradient(params):
    return jax.jit(jax.value_and_grad(loss_of, has_aux=True))


def test_values_and_gradients_are_those_of_the_naive_losses(params, value_and_gradient):
    (loss, parts), gradient = value_and_gradient(params, *batch())
    ids, mask, keys = batch()
    texts = [np.asarray(row[real]) for row, real in zip(ids, mask, strict=True)]
    chosen = [naive_choice(text, key) for text, key in zip(texts, keys, strict=True)]
    naively = jax.jit(jax.value_and_grad(lambda params: naive_losses(params, texts, chosen), has_aux=True))
    (naive, naive_parts), naive_gradient = naively(params)
    np.testing.assert_allclose(loss, naive, rtol=1e-5)
    close(parts, naive_parts)
    close(gradient, naive_gradient)


def test_padding_changes_nothing(params, value_and_gradient):
    """Over the edge of two squares of what the decoder sees, too."""
    (loss, parts), gradient = value_and_gradient(params, *batch(8))
    (padded, padded_parts), padded_gradient = value_and_gradient(params, *batch(300))
    np.testing.assert_allclose(padded, loss, rtol=1e-6)
    close(padded_parts, parts)
    close(padded_gradient, gradient)


def test_parts_of_a_batch_add_up_to_it(params):
    """In two parts, of rows in another order, by keys that go with the rows."""
    given = tuple(jnp.concatenate([x, x[:1]]) for x in batch())
    total = retromae.Targets(*(n.sum() for n in targets(MODEL, *given[:2])))

    @jax.jit
    def part(params, *rows):
        return jax.value_and_grad(lambda params: losses(MODEL, params, *rows, total, mask_id=MASK, dropout=0.2)[0])(
            params
        )

    value, gradient = part(params, *given)
    parts = [part(params, *(x[np.array(rows)] for x in given)) for rows in ([0, 1], [3, 2])]
    np.testing.assert_allclose(sum(of for of, _ in parts), value, rtol=1e-6)
    close(jax.tree.map(jnp.add, parts[0][1], parts[1][1]), gradient)


def test_a_loss_worked_out_by_hand():
    """With tables of zeros the logits are the bias: of 40 terms one has e^ln 3 = 3, so its probability is 3 / 42, each other's
    1 / 42. Of a text of one such token and a text of seven others the encoder looks for one and two (0.3 of 7, rounded), and
    the decoder for one and seven: a mean over tokens, not over texts."""
    nothing = jax.tree.map(jnp.zeros_like, retromae.init(MODEL, jax.random.key(0)))
    nothing["lm_head"]["bias"] = nothing["lm_head"]["bias"].at[7].set(jnp.log(3.0))
    ids = jnp.array([[0, 7, 2, *[1] * 6], [0, 8, 9, 8, 9, 8, 9, 8, 2]])
    loss, parts = jax.jit(loss_of)(nothing, ids, ids != 1, jax.random.split(jax.random.key(0), 2))
    np.testing.assert_allclose(parts["encoder"], (np.log(42 / 3) + 2 * np.log(42)) / 3, rtol=1e-6)
    np.testing.assert_allclose(parts["decoder"], (np.log(42 / 3) + 7 * np.log(42)) / 8, rtol=1e-6)
    np.testing.assert_allclose(loss, parts["encoder"] + parts["decoder"], rtol=1e-6)


def test_what_the_encoder_reads(monkeypatch):
    """`<mask>` at three tenths of a text's tokens, and never at a special one."""
    read = []

    def called(self, ids, *_, **__):
        jax.debug.callback(lambda x: read.append(np.asarray(x)), ids)
        return jnp.zeros((*ids.shape, MODEL.hidden_size))

    monkeypatch.setattr(Encoder, "__call__", called)
    ids = jnp.asarray(np.r_[0, np.arange(4, 34), 3, 2, 1, 1][None].repeat(64, 0))
    given = retromae.init(MODEL, jax.random.key(0)), ids, ids != 1, jax.random.split(jax.random.key(0), 64)
    jax.block_until_ready(jax.jit(lambda *given: loss_of(*given))(*given))
    jax.effects_barrier()
    masked = read[0] == MASK
    assert (read[0][~masked] == np.asarray(ids)[~masked]).all()
    assert (masked.sum(axis=1) == 9).all()
    assert not masked[:, [0, 31, 32, 33, 34]].any()
    assert masked[:, 1:31].any(axis=0).all() and not masked[:, 1:31].all(axis=0).any()  # another choice for each row


def seen(length, share=0.5, rows=2):
    keys, mask = jax.random.split(jax.random.key(5), rows), jnp.arange(length) < jnp.full((rows, 1), length - 9)
    blocks = [seen_in_block(keys, mask, block, share) for block in range(-(-length // 128))]
    return keys, np.asarray(mask), np.asarray(jnp.concatenate(blocks, axis=1))[:, :length]


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_what_a_position_of_the_decoder_sees(share):
    keys, _, found = seen(310, share)
    n = 301
    assert found[:, :, 0].all()  # the sentence embedding
    assert not found[:, np.arange(1, 310), np.arange(1, 310)].any()  # never itself
    assert not found[:, :, n:].any()  # nor padding
    others = found[:, :, 1:n][~np.broadcast_to(np.eye(310, dtype=bool)[:, 1:n], (2, 310, n - 1))]
    assert abs(others.mean() - share) < 5 * np.sqrt(share * (1 - share) / others.size)
    assert abs((found[:, :-1, 1:n] & found[:, 1:, 1:n]).mean() - share**2) < 0.01  # neighbours draw apart
    assert (found[0] != found[1]).any()
    assert (found[1, :n, :n] == naive_seen(keys[1], n, share)).all()


def test_what_is_seen_is_what_is_mixed():
    """Scores of zero mix the values of what is seen in equal parts; a value for each position shows which these are."""
    keys, mask, expected = seen(310, rows=1)
    zeros, values = jnp.zeros((1, 310, 1, 310)), jnp.eye(310)[None, :, None]
    mixed = enhanced_attention(zeros, zeros, values, jnp.asarray(mask), keys)[0, :, 0]
    np.testing.assert_allclose(mixed, expected[0] / expected[0].sum(axis=1, keepdims=True), atol=1e-6)


def entropies(hidden, table, bias, tokens, weights):
    logs = jax.nn.log_softmax(jnp.einsum("bnd,vd->bnv", hidden, table) + bias)
    each = -jnp.take_along_axis(logs, tokens[..., None], axis=-1)[..., 0]
    return 3 * (weights * each).sum(), each


@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 2e-6), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("at_a_time", [1, 10, 1000])
def test_logits_in_blocks_are_all_logits(monkeypatch, dtype, rtol, at_a_time):
    """Blocks of one position, of five of seven so that the last is filled up, and of all."""
    monkeypatch.setattr(retromae, "_LOGITS_AT_A_TIME", at_a_time)
    random = np.random.default_rng(0)
    hidden, table, bias, weights = (
        jnp.asarray(random.normal(size=n), jnp.float32) for n in ((2, 7, 8), (30, 8), (30,), (2, 7))
    )
    hidden, table = (x.astype(dtype).astype(jnp.float32) for x in (hidden, table))
    tokens = jnp.asarray(random.integers(30, size=(2, 7)))

    def in_blocks(hidden, table, bias):
        loss, each = vocabulary_loss(hidden.astype(dtype), table, bias, tokens, weights)
        return 3 * loss, each

    (loss, each), gradient = jax.jit(jax.value_and_grad(in_blocks, (0, 1, 2), has_aux=True))(hidden, table, bias)
    (expected, all_of_them), full = jax.value_and_grad(entropies, (0, 1, 2), has_aux=True)(
        hidden, table, bias, tokens, weights
    )
    np.testing.assert_allclose(loss, expected, rtol=rtol)
    np.testing.assert_allclose(each, all_of_them, rtol=rtol, atol=1e-6)
    np.testing.assert_allclose(
        in_blocks(hidden, table, bias)[1], all_of_them, rtol=rtol, atol=1e-6
    )  # without gradients
    for one, other in zip(gradient, full, strict=True):
        np.testing.assert_allclose(one, other, atol=rtol * np.abs(other).max())


def taken(function, *shapes):
    """Bytes of what is neither argument nor result in the program of a function and its gradient."""
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    return jax.jit(jax.grad(function)).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def test_logits_are_never_there_for_all_positions():
    rows, length, terms = 8, 8192, 1000
    whole = rows * length * terms * 4
    shapes = ((rows, length, 8), "float32"), ((terms, 8), "float32"), ((terms,), "float32"), ((rows, length), "int32")
    weights = (rows, length), "float32"
    assert taken(lambda *given: vocabulary_loss(*given)[0], *shapes, weights) < whole / 10
    assert taken(lambda *given: entropies(*given)[0], *shapes, weights) >= whole  # the measure sees what is there


def test_attention_is_never_there_for_all_positions():
    length, heads = 8192, 2
    given = ((1, length, heads, 8), "float32"), ((1, length), "bool"), ((1,), jax.random.key(0).dtype)
    whole = heads * length * length * 4
    assert taken(lambda q, *rest: enhanced_attention(q, q, q, *rest).sum(), *given) < whole / 10
