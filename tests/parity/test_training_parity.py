"""Losses, gradients and AdamW steps equal the reference: plain PyTorch always, FlagEmbedding's training model where installed.

Not here: anything of train/, whose own tests build on this: the mathematics below it.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from m3jax import scores
from m3jax.batching import pad
from m3jax.losses import group_distillation, m3_loss, sequential_distillation
from m3jax.model import apply, flatten
from m3jax.weights import torch_name
from tests.arrays import from_numpy

torch = pytest.importorskip("torch", reason="parity with PyTorch needs torch (the `test` extra)")
F = torch.nn.functional

TEMPERATURE = 0.02
ROWS, GROUP = 3, 4
PARTS = ("dense", "sparse", "colbert", "hybrid", "distill/dense", "distill/sparse", "distill/colbert")


class PlainM3(torch.nn.Module):
    """PAPER.md §2 in plain PyTorch, for rows of equal length; `forward` gives (loss, parts)."""

    def __init__(self, model, heads, start_step):
        super().__init__()
        self.model = model
        self.sparse_linear, self.colbert_linear = heads["sparse_linear"], heads["colbert_linear"]
        self.start_step, self.step = start_step, 0

    def represent(self, ids):
        hidden = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        weights = torch.relu(self.sparse_linear(hidden))
        terms = (weights * F.one_hot(ids, self.model.config.vocab_size)).amax(dim=1)
        terms = terms * (torch.arange(terms.shape[1]) > 3)
        return F.normalize(hidden[:, 0], dim=-1), terms, F.normalize(self.colbert_linear(hidden[:, 1:]), dim=-1)

    def forward(self, queries, passages):
        (q_dense, q_terms, q_colbert), (p_dense, p_terms, p_colbert) = map(self.represent, (queries, passages))
        s = {"dense": q_dense @ p_dense.T, "sparse": q_terms @ p_terms.T}
        s["colbert"] = torch.einsum("qic,pjc->qpij", q_colbert, p_colbert).amax(dim=3).mean(dim=2)
        s["hybrid"] = s["dense"] + 0.3 * s["sparse"] + s["colbert"]
        logs = {name: F.log_softmax(matrix / TEMPERATURE, dim=1) for name, matrix in s.items()}
        rows = torch.arange(len(queries))
        parts = {name: -log[rows, rows * GROUP].mean() for name, log in logs.items()}
        target = logs["hybrid"].exp().detach()
        parts |= {f"distill/{name}": -(target * logs[name]).sum(1).mean() for name in PARTS[:3]}
        loss = (parts["dense"] + 0.1 * parts["sparse"] + parts["colbert"] + parts["hybrid"]) / 4
        if self.start_step is not None and self.step > self.start_step:
            taught = parts["distill/dense"] + 0.1 * parts["distill/sparse"] + parts["distill/colbert"]
            loss = (loss + taught / 3) / 2
        self.step += 1
        return loss, parts


class PeerM3(torch.nn.Module):
    """FlagEmbedding's model gives only the total; its parts are the values of its two loss functions, in order of calls."""

    def __init__(self, modeling, model, heads, start_step):
        super().__init__()
        self.peer = modeling.EncoderOnlyEmbedderM3Model(
            {"model": model} | heads,
            tokenizer=SimpleNamespace(cls_token_id=0, pad_token_id=1, eos_token_id=2, unk_token_id=3),
            temperature=TEMPERATURE,
            normalize_embeddings=True,
            unified_finetuning=True,
            use_self_distill=start_step is not None,
            self_distill_start_step=-1 if start_step is None else start_step,
        )
        self.peer.train()
        self.values = []
        for name in ("compute_loss", "distill_loss"):
            setattr(self.peer, name, self._recorded(getattr(self.peer, name)))

    def _recorded(self, function):
        def call(*args):
            self.values.append(function(*args))
            return self.values[-1]

        return call

    def forward(self, queries, passages, **options):
        self.values.clear()
        features = ({"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in (queries, passages))
        loss = self.peer(*features, **options).loss
        return loss, dict(zip(PARTS, self.values, strict=False))


@pytest.fixture(params=["plain torch", "FlagEmbedding"])
def reference(request, geometry, torch_encoder, torch_heads):
    """reference(start_step, **sizes) → (config, module): `module(queries, passages)` gives the loss and its parts.

    Self-distillation comes in after step number `start_step` (the first is 0); None: never.
    """

    def make(start_step, width=64, layers=2, **changes):
        config = geometry(width, layers, vocab_size=60, **changes)
        model, heads = torch_encoder(config, 11).train(), torch_heads(config, 12)
        if request.param == "plain torch":
            return config, PlainM3(model, heads, start_step)
        flag_embedding = request.getfixturevalue("flag_embedding")
        return config, PeerM3(flag_embedding("finetune.embedder.encoder_only.m3.modeling"), model, heads, start_step)

    return make


@pytest.mark.parametrize("distill", [False, True])
@pytest.mark.parametrize("sizes", [{}, {"width": 128, "layers": 1, "colbert_dim": 48}], ids=["64x2", "128x1"])
def test_loss_and_gradients(reference, to_ours, sizes, distill):
    """Every part of the loss and the gradient of every parameter; our rows are padded, the reference's are not."""
    config, module = reference(-1 if distill else None, **sizes)
    queries, passages = _batch(config, 0)
    passages[1, 5] = config.pad_token_id  # a literal <pad>
    expected, expected_parts = module(_tensor(queries), _tensor(passages))
    expected.backward()
    theirs = _named(module)
    (loss, (parts, _)), gradients = _gradients(config, to_ours(config, theirs), _pad(queries), _pad(passages), distill)
    assert _difference(loss, expected) <= 1e-5
    assert set(parts) == set(PARTS) and set(expected_parts) >= set(PARTS[: 7 if distill else 4])
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
            # PyTorch freezes the row of <pad> in both tables (padding_idx); here it is a parameter like the others.
            assert not given[config.pad_token_id].any()
            gradient = gradient.at[config.pad_token_id].set(0.0)
        # A key's bias adds the same to all scores of a query, so its gradient is 0 but for rounding: measured by the query's.
        scale = gradients[path.replace("/k/", "/q/")] if path.endswith("/k/bias") else given
        assert _error(gradient, given, scale) <= 1e-4, path


def test_twenty_adamw_steps(reference, to_ours):
    """Clipping at a global norm of 1, decay 0.01, self-distillation after step 9; a new batch every step."""
    config, module = reference(9)
    params = to_ours(config, _named(module))
    start = flatten(params)
    state = ADAMW.init(params)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    clipped = 0
    for step in range(20):
        queries, passages = _batch(config, step)
        (loss, _), gradients = _gradients(config, params, _pad(queries), _pad(passages), step > 9)
        params, state = _update(gradients, state, params)
        optimizer.zero_grad()
        expected, _ = module(_tensor(queries), _tensor(passages))
        expected.backward()
        clipped += bool(torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0) > 1)
        optimizer.step()
        assert _difference(loss, expected) <= 1e-4, f"step {step}"
    assert clipped >= 10
    end = flatten(to_ours(config, _named(module)))
    for path, value in flatten(params).items():
        if "/pooler/" in path:
            assert np.array_equal(value, start[path])
        # Adam makes full steps of a key bias's gradient too, which is rounding alone (and changes no output).
        elif not path.endswith("/k/bias"):
            # Relative to the way gone; an entry whose gradient is about eps has the rounding of its quotient.
            assert _error(value - start[path], end[path] - start[path]) <= 2e-2, path


def test_padding_does_not_change_colbert_scores(flag_embedding):
    """Where the peer is wrong (PEER §2.5): it leaves zeros where padding was, so the max over a passage is never below 0."""
    peer = flag_embedding("finetune.embedder.encoder_only.m3.modeling").EncoderOnlyEmbedderM3Model
    query, passage = np.float32([[[1.0, 0.0]]]), np.float32([[[-0.6, 0.8]]])
    padded = np.pad(passage, ((0, 0), (0, 2), (0, 0)))

    def theirs(passage):
        tensors = (torch.tensor(query), torch.tensor(passage))
        mask = torch.ones(1, 2)  # of the query, <s> included
        return peer.compute_colbert_score(SimpleNamespace(temperature=1.0), *tensors, q_mask=mask).item()

    def ours(passage):
        mask = np.arange(passage.shape[1])[None] < 1
        return from_numpy(scores.colbert_scores)(query, np.ones((1, 1), bool), passage, mask).item()

    assert theirs(passage) == pytest.approx(-0.6) and theirs(padded) == 0.0
    assert ours(passage) == ours(padded) == pytest.approx(-0.6)


@pytest.mark.parametrize("reference", ["FlagEmbedding"], indirect=True)
def test_peer_2_2_own_group_as_candidates(reference, to_ours):
    """Where the peer is wrong (PEER §2.2): without in-batch negatives its ensemble sees one column, whose loss is 0, and
    more rows than a group has passages are an IndexError. Here `allowed` restricts all four alike."""
    config, module = reference(None)
    queries, passages = _batch(config, 0)
    _, expected = module(_tensor(queries), _tensor(passages), no_in_batch_neg_flag=True)
    with pytest.raises(IndexError):
        module(_tensor(queries), _tensor(passages[: ROWS * 2]), no_in_batch_neg_flag=True)
    params = to_ours(config, _named(module))
    (_, (_, s)), _ = _gradients(config, params, _pad(queries), _pad(passages), False)
    allowed = jnp.arange(ROWS)[:, None] == jnp.arange(ROWS * GROUP) // GROUP
    _, parts = m3_loss(s, jnp.arange(ROWS) * GROUP, temperature=TEMPERATURE, allowed=allowed)
    for name in ("dense", "sparse", "colbert"):
        assert _difference(parts[name], expected[name]) <= 1e-5
    own = s["hybrid"][allowed].reshape(ROWS, GROUP) / TEMPERATURE
    assert expected["hybrid"] == 0.0
    assert parts["hybrid"] == pytest.approx(float(-jax.nn.log_softmax(own, axis=1)[:, 0].mean()), rel=1e-5)


@pytest.mark.parametrize(("teacher", "theirs"), [("group", "kl_div"), ("sequential", "m3_kd_loss")])
def test_teacher_s_loss_and_its_gradient(flag_embedding, teacher, theirs):
    """Of score matrices. The peer takes a group in the order that it comes in, so it is sorted here first."""
    model = flag_embedding("abc.finetune.embedder.AbsModeling").AbsEmbedderModel
    rng = np.random.default_rng(3)
    given = -np.sort(-rng.normal(size=(ROWS, GROUP)).astype(np.float32))
    matrix = rng.uniform(-1, 1, (ROWS, ROWS * GROUP)).astype(np.float32)
    scores_of = torch.tensor(matrix, requires_grad=True)
    student = scores_of / TEMPERATURE
    if theirs == "kl_div":
        student = model.get_local_score(None, torch.zeros(ROWS, 1), torch.zeros(ROWS * GROUP, 1), student)
    targets = F.softmax(torch.tensor(given), dim=-1)
    expected = model.distill_loss(theirs, targets, student, group_size=GROUP)
    expected.backward()
    function = {"group": group_distillation, "sequential": sequential_distillation}[teacher]
    positives = jnp.arange(ROWS) * GROUP

    def loss(given, matrix):
        return function(given, matrix, positives, TEMPERATURE)

    value, slope = jax.value_and_grad(loss, argnums=1)(jnp.asarray(given), jnp.asarray(matrix))
    assert _difference(value, expected) <= 1e-5
    assert _error(slope, scores_of.grad.numpy()) <= 1e-5
    if teacher == "sequential":
        # A group that is not sorted is the same to us, and another to the peer: a passage then need not beat a worse one.
        order = np.array([2, 0, 3, 1])
        turned = matrix.reshape(ROWS, ROWS, GROUP).copy()
        for row in range(ROWS):
            turned[row, row] = turned[row, row, order]
        turned = turned.reshape(matrix.shape)
        assert _difference(loss(jnp.asarray(given[:, order]), jnp.asarray(turned)), expected) <= 1e-5
        unsorted = model.distill_loss(theirs, targets[:, order], torch.tensor(turned) / TEMPERATURE, group_size=GROUP)
        assert abs(unsorted.item() - expected.item()) > 0.1


@pytest.mark.parametrize("reference", ["FlagEmbedding"], indirect=True)
@pytest.mark.parametrize(("teacher", "theirs"), [("group", "kl_div"), ("sequential", "m3_kd_loss")])
def test_loss_with_a_teacher(reference, to_ours, teacher, theirs):
    """The whole objective: the teacher comes into the loss of every head and of the ensemble."""
    config, module = reference(-1)
    module.peer.kd_loss_type = theirs
    queries, passages = _batch(config, 0)
    given = -np.sort(-np.random.default_rng(4).normal(size=(ROWS, GROUP)).astype(np.float32))
    expected, _ = module(_tensor(queries), _tensor(passages), teacher_scores=given.ravel().tolist())
    (_, (_, s)), _ = _gradients(config, to_ours(config, _named(module)), _pad(queries), _pad(passages), True)
    positives, more = jnp.arange(ROWS) * GROUP, {"teacher": teacher, "teacher_scores": jnp.asarray(given)}
    loss, _ = m3_loss(s, positives, temperature=TEMPERATURE, distill=True, **more)
    assert _difference(loss, expected) <= 1e-5


def _loss(config, params, queries, passages, distill):
    """What a training step does with a batch: (ids, mask) of queries and of passages."""
    positives = jnp.arange(queries[0].shape[0]) * GROUP
    s = scores.all_scores(apply(config, params, *queries), apply(config, params, *passages))
    loss, parts = m3_loss(s, positives, temperature=TEMPERATURE, distill=distill)
    return loss, (parts, s)


# One compilation for all tests of a geometry: `distill` is traced, and all batches have one shape. XLA's optimisations cost
# twice the time that they would take here; encode's parity runs with them.
_gradients = jax.jit(
    jax.value_and_grad(_loss, argnums=1, has_aux=True),
    static_argnums=0,
    compiler_options={"xla_backend_optimization_level": 0},
)


def _decayed(params):
    """PyTorch leaves alone what has no gradient: the pooler, which M3 never reads."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "pooler" not in jax.tree_util.keystr(path), params)


ADAMW = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(1e-4, 0.9, 0.999, 1e-8, weight_decay=0.01, mask=_decayed)
)


@jax.jit
def _update(gradients, state, params):
    updates, state = ADAMW.update(gradients, state, params)
    return optax.apply_updates(params, updates), state


def _batch(config, seed):
    """Query ids [ROWS, 7] and passage ids [ROWS · GROUP, 12] without padding, with terms that come back and an <unk>."""
    rng = np.random.default_rng(seed)
    batch = [rng.integers(4, config.vocab_size, shape).astype(np.int32) for shape in ((ROWS, 7), (ROWS * GROUP, 12))]
    for ids in batch:
        ids[:, 0], ids[:, -1] = config.cls_token_id, config.eos_token_id
        ids[:, 3] = ids[:, 1]
    batch[1][0, 2] = config.unk_token_id
    return batch


def _pad(ids):
    return pad(list(ids), len(ids), ids.shape[1] + 3, pad_id=1)


def _tensor(ids):
    return torch.tensor(ids).long()


def _named(module):
    """Parameters under the names of a released directory."""
    return {name.removeprefix("peer.").removeprefix("model."): x for name, x in module.named_parameters()}


def _difference(ours, theirs):
    """Relative difference of two numbers."""
    return abs(float(ours) - theirs.item()) / abs(theirs.item())


def _error(ours, theirs, scale=None):
    """Largest difference over the largest value of `scale`, by default `theirs`."""
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs if scale is None else np.asarray(scale)).max()
