"""Losses, gradients and AdamW steps equal the reference: plain PyTorch always, and FlagEmbedding's training model where
installed. Not here: anything of train/, whose steps are tested there; this is the mathematics below them.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from m3jax import scores
from m3jax.losses import m3_loss
from m3jax.model import apply, flatten
from m3jax.weights import torch_name

torch = pytest.importorskip("torch", reason="parity with PyTorch needs torch (the `test` extra)")
F = torch.nn.functional

TEMPERATURE = 0.02
ROWS, GROUP = 3, 4
PARTS = ("dense", "sparse", "colbert", "hybrid", "distill/dense", "distill/sparse", "distill/colbert")


class PlainM3(torch.nn.Module):
    """PAPER.md §2 in plain PyTorch, for rows of equal length; `forward` gives (loss, parts)."""

    def __init__(self, model, heads):
        super().__init__()
        self.model = model
        self.sparse_linear, self.colbert_linear = heads["sparse_linear"], heads["colbert_linear"]

    def represent(self, ids):
        hidden = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        weights = torch.relu(self.sparse_linear(hidden))
        terms = (weights * F.one_hot(ids, self.model.config.vocab_size)).amax(dim=1)
        terms = terms * (torch.arange(terms.shape[1]) > 3)
        return F.normalize(hidden[:, 0], dim=-1), terms, F.normalize(self.colbert_linear(hidden[:, 1:]), dim=-1)

    def forward(self, queries, passages, distill):
        (q_dense, q_terms, q_colbert), (p_dense, p_terms, p_colbert) = map(self.represent, (queries, passages))
        s = {"dense": q_dense @ p_dense.T, "sparse": q_terms @ p_terms.T}
        s["colbert"] = torch.einsum("qic,pjc->qpij", q_colbert, p_colbert).amax(dim=3).mean(dim=2)
        s["hybrid"] = s["dense"] + 0.3 * s["sparse"] + s["colbert"]
        logs = {name: F.log_softmax(matrix / TEMPERATURE, dim=1) for name, matrix in s.items()}
        rows = torch.arange(len(queries))
        parts = {name: -log[rows, rows * GROUP].mean() for name, log in logs.items()}
        target = logs["hybrid"].exp().detach()
        parts |= {f"distill/{name}": -(target * logs[name]).sum(1).mean() for name in ("dense", "sparse", "colbert")}
        loss = (parts["dense"] + 0.1 * parts["sparse"] + parts["colbert"] + parts["hybrid"]) / 4
        if distill:
            taught = parts["distill/dense"] + 0.1 * parts["distill/sparse"] + parts["distill/colbert"]
            loss = (loss + taught / 3) / 2
        return loss, parts


class PeerM3(torch.nn.Module):
    """FlagEmbedding's training model, which gives only the total: its calls of the loss functions are the parts, in order."""

    def __init__(self, flag_embedding, model, heads, start_step=-1):
        super().__init__()
        self.peer = flag_embedding("finetune.embedder.encoder_only.m3.modeling").EncoderOnlyEmbedderM3Model(
            {"model": model} | heads,
            tokenizer=SimpleNamespace(cls_token_id=0, pad_token_id=1, eos_token_id=2, unk_token_id=3),
            temperature=TEMPERATURE,
            normalize_embeddings=True,
            unified_finetuning=True,
            use_self_distill=True,
            self_distill_start_step=start_step,
        )
        self.peer.train()
        self.calls = []
        for name in ("compute_loss", "distill_loss"):
            setattr(self.peer, name, self._recorded(getattr(self.peer, name)))

    def _recorded(self, function):
        def call(*args):
            self.calls.append(function(*args))
            # The peer adds to the first of them in place.
            return self.calls[-1].clone()

        return call

    def forward(self, queries, passages, distill, **options):
        self.peer.use_self_distill = distill
        self.calls.clear()
        features = ({"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in (queries, passages))
        loss = self.peer(*features, **options).loss
        return loss, dict(zip(PARTS, self.calls, strict=False))


@pytest.fixture(params=["plain torch", "FlagEmbedding"])
def reference(request, geometry, torch_encoder, torch_heads):
    """reference(layers) → (config, module): `forward(queries, passages, distill)` gives the loss and its parts."""

    def make(layers):
        config = geometry(64, layers, vocab_size=60)
        # relu lets about half of the token weights through.
        model, heads = torch_encoder(config, 11).train(), torch_heads(config, 12)
        if request.param == "plain torch":
            return config, PlainM3(model, heads)
        return config, PeerM3(request.getfixturevalue("flag_embedding"), model, heads)

    return make


@pytest.mark.parametrize("distill", [False, True])
@pytest.mark.parametrize("layers", [2, 5])
def test_loss_and_gradients(reference, to_ours, layers, distill):
    config, module = reference(layers)
    queries, passages = _batch(config, 0)
    # PyTorch freezes the two rows of <pad>, which a literal <pad> in a text reads; here they are parameters like others.
    passages[1, 5] = config.pad_token_id
    expected, expected_parts = module(torch.tensor(queries).long(), torch.tensor(passages).long(), distill)
    expected.backward()
    theirs = _named(module)
    (loss, parts), gradients = jax.jit(jax.value_and_grad(_loss, argnums=1, has_aux=True), static_argnums=0)(
        config, to_ours(config, theirs), queries, passages, float(distill)
    )
    assert _difference(loss, expected) <= 1e-5
    assert set(parts) == set(PARTS) and set(expected_parts) >= set(PARTS[:7 if distill else 4])
    for name, value in expected_parts.items():
        assert value > 1e-2, f"{name} is too small to compare"
        assert _difference(parts[name], value) <= 1e-5, name
    gradients = flatten(gradients)
    assert len(gradients) == len(theirs)
    for path, gradient in gradients.items():
        given = theirs[torch_name(path)].grad
        if "/pooler/" in path:
            assert given is None and not gradient.any()
            continue
        given = given.numpy().T if path.endswith("/kernel") else given.numpy()
        if path.endswith(("word_embeddings/embedding", "position_embeddings/embedding")):
            assert not given[config.pad_token_id].any()
            gradient = gradient.at[config.pad_token_id].set(0.0)
        # A key's bias adds the same to all scores of a query, so its gradient is 0 but for rounding: measured by the query's.
        scale = gradients[path.replace("/k/", "/q/")] if path.endswith("/k/bias") else given
        assert _error(gradient, given, scale) <= 1e-4, path


def test_twenty_adamw_steps(reference, to_ours):
    """Clipping at a global norm of 1, decay 0.01, self-distillation from step 10 on; a new batch every step."""
    config, module = reference(2)
    steps = [_batch(config, step) for step in range(20)]
    params = to_ours(config, _named(module))
    # PyTorch leaves alone what has no gradient: the pooler, which M3 does not read.
    del params["encoder"]["pooler"]
    config = config.__class__(**(vars(config) | {"pooler": False}))
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4, 0.9, 0.999, 1e-8, weight_decay=0.01))

    @jax.jit
    def step(params, state, queries, passages, distill):
        (loss, _), gradients = jax.value_and_grad(_loss, argnums=1, has_aux=True)(
            config, params, queries, passages, distill
        )
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss, optax.global_norm(gradients)

    start = flatten(params)
    state = tx.init(params)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    clipped = 0
    for number, (queries, passages) in enumerate(steps):
        distill = number >= 10
        params, state, loss, norm = step(params, state, queries, passages, float(distill))
        optimizer.zero_grad()
        expected, _ = module(torch.tensor(queries).long(), torch.tensor(passages).long(), distill)
        expected.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        clipped += bool(norm > 1)
        assert _difference(loss, expected) <= 1e-4, f"step {number}"
    assert clipped > 10
    end = flatten(to_ours(config, _named(module)))
    for path, value in flatten(params).items():
        # Adam makes steps of full size of a key bias's gradient, which is rounding alone (and changes no output).
        if not path.endswith("/k/bias"):
            moved = end[path] - np.asarray(start[path])
            assert _error(value - start[path], moved) <= 1e-2, path


def test_distillation_starts_after_the_start_step(reference):
    ...


def _loss(config, params, queries, passages, distill):
    """What train/step.py does with a batch, without its sub-batches."""
    q, p = (apply(config, params, ids, jnp.ones(ids.shape, bool)) for ids in (queries, passages))
    positives = jnp.arange(queries.shape[0]) * GROUP
    return m3_loss(scores.all_scores(q, p), positives, temperature=TEMPERATURE, distill=distill)


def _batch(config, seed):
    """Query ids [ROWS, 7] and passage ids [ROWS · GROUP, 12] without padding, with terms that come back and an <unk>."""
    rng = np.random.default_rng(seed)
    batch = [rng.integers(4, config.vocab_size, shape).astype(np.int32) for shape in ((ROWS, 7), (ROWS * GROUP, 12))]
    for ids in batch:
        ids[:, 0], ids[:, -1] = config.cls_token_id, config.eos_token_id
        ids[:, 3] = ids[:, 1]
    batch[1][0, 2] = config.unk_token_id
    return batch


def _named(module):
    """Parameters under the names of a released directory."""
    return {name.removeprefix("peer.").removeprefix("model."): x for name, x in module.named_parameters()}


def _difference(ours, theirs):
    """Relative difference of two numbers."""
    return abs(float(ours) - theirs.item()) / abs(theirs.item())


def _error(ours, theirs, scale=None):
    """Largest difference over the largest value of `scale`, by default `theirs`."""
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs if scale is None else np.asarray(scale)).max()
