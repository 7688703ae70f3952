"""Hidden states and their gradients equal those of transformers' XLMRobertaModel with the same weights.

Not here: the heads (test_encode_parity.py) and the losses (test_training_parity.py).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from m3jax.batching import pad
from m3jax.model import flatten
from m3jax.weights import torch_name
from m3jax.xlm_roberta import Encoder, positions_from_ids

torch = pytest.importorskip("torch", reason="parity with PyTorch needs torch (the `test` extra)")

# Largest difference over largest value; the target of both frameworks' float32.
TOLERANCE = 1e-5

# width, layers, heads
GEOMETRIES = [(64, 2, 4), (256, 4, 4), (128, 12, 8), (1024, 2, 16)]


@pytest.mark.parametrize(("width", "layers", "heads"), GEOMETRIES)
def test_hidden_states(geometry, torch_encoder, to_ours, width, layers, heads):
    config = geometry(width, layers, num_attention_heads=heads)
    model = torch_encoder(config, 1)
    texts = _texts(config, [126, 77, 31, 2, 3])
    texts[1][5:7] = config.pad_token_id  # a literal <pad> has position 1, is attended to, and shifts no other token
    expected = [_theirs(model, text) for text in texts]
    # The reference computes each text alone, without padding; ours together, in two batches (the small model; XLA takes
    # its time with the large ones).
    for rows in [[0, 1, 2, 3, 4], [4, 2, 3]][: 2 if width == 64 else 1]:
        ids, mask = pad([texts[row] for row in rows], len(rows) + 1, 126 if 0 in rows else 48, config.pad_token_id)
        hidden = _ours(config, to_ours(config, model.state_dict()), ids, mask)
        for ours, row in zip(hidden, rows, strict=False):
            assert _error(ours[: len(texts[row])], expected[row]) <= TOLERANCE


# One block of 512 queries, one query more; the last length of bge-m3.
@pytest.mark.parametrize("lengths", [(512, 3), (513, 200), (8192,)])
def test_lengths(geometry, torch_encoder, to_ours, lengths):
    config = geometry(64, 2, max_position_embeddings=8194)
    model = torch_encoder(config, 2)
    texts = _texts(config, lengths)
    ids, mask = pad(texts, len(texts), max(lengths), config.pad_token_id)
    hidden = _ours(config, to_ours(config, model.state_dict()), ids, mask)
    for ours, text in zip(hidden, texts, strict=True):
        assert _error(ours[: len(text)], _theirs(model, text)) <= TOLERANCE


def test_gradients(geometry, torch_encoder, to_ours):
    """Every parameter's gradient of a random projection of the hidden states, in more than one block of queries."""
    config = geometry(64, 2, max_position_embeddings=700)
    model = torch_encoder(config, 3)
    texts = _texts(config, [600, 90])
    ids, mask = pad(texts, len(texts), 600, config.pad_token_id)
    weights = np.random.default_rng(4).normal(size=(*ids.shape, config.hidden_size)) * mask[..., None]
    weights = weights.astype(np.float32)

    def loss(params):
        return (_hidden(config, params, jnp.asarray(ids), jnp.asarray(mask)) * weights).sum()

    params = to_ours(config, model.state_dict())
    ours = flatten(jax.jit(jax.grad(loss))(jax.tree.map(jnp.asarray, params)))
    model.zero_grad()
    given = model(input_ids=torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long()).last_hidden_state
    (given * torch.tensor(weights)).sum().backward()
    theirs = {name: tensor.grad for name, tensor in model.named_parameters()}
    for path, gradient in ours.items():
        expected = theirs[torch_name(path)]
        if "/pooler/" in path:
            assert expected is None and not gradient.any()
            continue
        expected = expected.numpy().T if path.endswith("/kernel") else expected.numpy()
        # A key's bias adds the same to all scores of a query, so its gradient is 0 but for rounding: measured by the query's.
        scale = ours[path.replace("/k/", "/q/")] if path.endswith("/k/bias") else expected
        assert _error(gradient, expected, scale) <= 1e-4, path


def _texts(config, lengths):
    rng = np.random.default_rng(0)
    texts = [rng.integers(config.unk_token_id + 1, config.vocab_size, n).astype(np.int32) for n in lengths]
    for text in texts:
        text[0], text[-1] = config.cls_token_id, config.eos_token_id
    return texts


def _hidden(config, params, ids, mask):
    encoder = nnx.merge(nnx.split(nnx.eval_shape(lambda: Encoder(config, nnx.Rngs(0))))[0], params["encoder"])
    return encoder(ids, positions_from_ids(ids, config.pad_token_id), mask.astype(jnp.int32))


def _ours(config, params, ids, mask):
    return np.asarray(jax.jit(_hidden, static_argnums=0)(config, params, jnp.asarray(ids), jnp.asarray(mask)))


def _theirs(model, text):
    with torch.no_grad():
        ids = torch.tensor(text)[None].long()
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0].numpy()


def _error(ours, theirs, scale=None):
    """Largest difference over the largest value of `scale`, by default `theirs`."""
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs if scale is None else np.asarray(scale)).max()
