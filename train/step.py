"""TrainState and the jitted training step: one global batch in, the next state and named measures out.

Not here: where batches come from (data/pipeline.py), the optimiser's numbers (optimizer.py), the loop (loop.py).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from m3jax.config import M3Config
from m3jax.heads import normalize
from m3jax.losses import candidates, m3_loss
from m3jax.model import Params, apply, flatten, path_name
from m3jax.representations import Representations
from m3jax.scores import all_scores, colbert_scores, dense_scores, term_weights
from m3jax.sharding import BATCH, shardings
from train import Config
from train.data.pipeline import Batch
from train.flops import step_flops
from train.objective import hybrid_weights, loss_arguments
from train.optimizer import FROZEN, parameter_groups
from train.sub_batch import ONE_PASS, SubBatches, encode_in


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step changes: parameters, optimiser state, and the number of steps done (int32 []), which nothing restarts."""

    params: Params
    optimizer: Any
    step: jax.Array


def make_state(params: Params, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state before the first step, placed on the mesh; the optimiser's moments lie where their parameters do.

    It may share the buffers of `params`, which the first step then takes over.
    """
    params = jax.device_put(params, shardings(params, mesh))
    places = shardings(jax.eval_shape(optimizer.init, params), mesh)
    # Without out_shardings the moments would be whole on every device, and the second step would compile again.
    moments = jax.jit(optimizer.init, out_shardings=places)(params)
    return TrainState(params, moments, jax.device_put(jnp.int32(0), NamedSharding(mesh, PartitionSpec())))


def loss_and_parts(
    model: M3Config,
    config: Config,
    params: Params,
    batch: Any,
    distill: jax.Array,
    key: jax.Array,
    sub_batches: SubBatches = ONE_PASS,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The M3 loss of one global batch, and as measures its parts and, where sparse is trained, the terms per text.

    batch: a `Batch` of device arrays. Every query's candidates are all passages of the batch, on whichever device they
    lie, but its other positives; of a row without in-batch negatives those of its group only.
    """

    def encode(params: Params, ids: jax.Array, mask: jax.Array, keys: jax.Array) -> Representations:
        # Cast in here: what the parts give to the gradient of a parameter is summed in float32.
        ours = cast_kernels(trained(config, params), config.dtype)
        found = apply(model, ours, ids, mask, dropout=config.dropout, key=keys, remat=config.remat)
        given = {
            "dense": ("dense", found.dense),
            "sparse": ("token_weights", found.token_weights),
            # Of all that a batch keeps these grow with its tokens, in halves half as much; their products have float32 sums.
            "colbert": ("colbert", found.colbert.astype(config.dtype)),
        }
        # Of what is not trained a sub-batch would compute the gradient too, of zeros.
        return dataclasses.replace(
            found,
            **{
                field: vectors if function in config.functions else jax.lax.stop_gradient(vectors)
                for function, (field, vectors) in given.items()
            },
        )

    query_key, passage_key = jax.random.split(key)
    rows, count = len(batch.query_ids), len(batch.passage_ids)
    queries, passages = encode_in(
        encode,
        params,
        (sub_batches.queries, (batch.query_ids, batch.query_mask, jax.random.split(query_key, rows))),
        (sub_batches.passages, (batch.passage_ids, batch.passage_mask, jax.random.split(passage_key, count))),
    )
    with jax.named_scope("scores"):  # as a profile names it, and the test of what devices send each other
        scores = all_scores(queries, passages, hybrid_weights(config), config.functions)
        for function, widths in config.matryoshka.items():
            scores |= {f"{function}@{width}": _SCORES[function](width, queries, passages) for width in widths}
    positives = jnp.arange(rows) * (count // rows)  # passages are query-major, the positive first
    loss, parts = m3_loss(
        scores,
        positives,
        distill=distill,
        allowed=candidates(
            positives, batch.passage_identity, batch.known_identity, batch.passage_present, batch.own_group
        ),
        teacher_scores=batch.teacher_scores,
        **loss_arguments(config),
    )
    measures = {"loss": loss} | {name if "/" in name else f"loss/{name}": value for name, value in parts.items()}
    if "sparse" in config.functions:
        # A sparse head that collapses shows here first, long before a score does.
        measures["active_terms/query"] = _active_terms(queries, rows)
        measures["active_terms/passage"] = _active_terms(passages, batch.passage_present.sum())
    return loss, measures


def trained(config: Config, params: Params) -> Params:
    """The parameters, those that are frozen as constants: nothing is computed for a gradient of theirs."""
    return jax.tree.map(
        lambda x, group: jax.lax.stop_gradient(x) if group == FROZEN else x, params, parameter_groups(config, params)
    )


def cast_kernels(params: Params, dtype: str) -> Params:
    """The tables of embeddings stay float32: the gradient of a row is a sum over all tokens that have it, which halves would
    not hold."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x.astype(dtype) if path_name(path).endswith("kernel") else x, params
    )


# The scores of the first numbers of each vector alone, normalised again (Matryoshka).
_SCORES = {
    "dense": lambda width, q, p: dense_scores(_narrow(q.dense, width), _narrow(p.dense, width)),
    "colbert": lambda width, q, p: colbert_scores(
        _narrow(q.colbert, width), q.colbert_mask, _narrow(p.colbert, width), p.colbert_mask
    ),
}


def _narrow(vectors: jax.Array, width: int) -> jax.Array:
    return normalize(vectors[..., :width].astype(jnp.float32)).astype(vectors.dtype)


def precision(dtype: str) -> str:
    """Of products of float32 factors in a run with products of `dtype`, as `jax.default_matmul_precision` takes it.

    GPUs and TPUs would round the factors to bfloat16, those of scores among them, which the temperature then magnifies. Vectors
    that bfloat16 layers made are rounded to 8 bits: their scores keep ten and more ("high": TF32 on GPU, three passes on TPU),
    many times faster than float32. Products of bfloat16 factors are what they are.
    """
    return "highest" if dtype == "float32" else "high"


def make_step(
    model: M3Config,
    config: Config,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    state: TrainState,
    sub_batches: SubBatches = ONE_PASS,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted step for states placed like `state`, whose buffers it takes over."""

    def loss(params: Params, batch: Batch, done: jax.Array, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        distill = (config.distill_start >= 0) & (done >= config.distill_start)
        value, measures = loss_and_parts(model, config, params, batch, distill, key, sub_batches)
        return value, measures | work(model, batch, config.frozen)

    return step_on(loss, config, optimizer, mesh, state)


def step_on(
    loss: Callable[[Params, Any, jax.Array, jax.Array], tuple[jax.Array, dict[str, jax.Array]]],
    config: Config,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    state: TrainState,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted step down a loss of (parameters, batch, steps done, the step's key), which gives measures of its own too."""

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        with jax.default_matmul_precision(precision(config.dtype)):
            gradients, measures = jax.grad(loss, has_aux=True)(state.params, batch, state.step, key)
        updates, moments = optimizer.update(gradients, state.optimizer, state.params)
        measures |= gradient_norms(gradients)
        params: Any = optax.apply_updates(state.params, updates)
        return TrainState(params, moments, state.step + 1), measures

    places = jax.tree.map(lambda x: x.sharding, state)
    rows = NamedSharding(mesh, BATCH)
    return jax.jit(step, in_shardings=(places, rows), out_shardings=(places, None), donate_argnums=0)


def gradient_norms(gradients: Params) -> dict[str, jax.Array]:
    """The global norm, before it is clipped, and that of the encoder, of each head and of stage 1's decoder."""
    parts = {"encoder": "encoder/", "sparse": "heads/sparse_linear/", "colbert": "heads/colbert_linear/"}
    parts |= {"lm_head": "lm_head/", "decoder": "decoder/"}
    norms = {"gradient_norm": optax.tree.norm(gradients)}
    for part, prefix in parts.items():
        if of := [x for path, x in flatten(gradients).items() if path.startswith(prefix)]:
            norms[f"gradient_norm/{part}"] = optax.tree.norm(of)
    return norms


def work(model: M3Config, batch: Any, frozen: Sequence[str] = ()) -> dict[str, jax.Array]:
    """Of a global batch: its real tokens, the places for them with padding, and the encoder's FLOPs on the real ones."""
    queries, passages = (mask.sum(axis=-1) for mask in (batch.query_mask, batch.passage_mask))
    return {
        "tokens": queries.sum() + passages.sum(),
        "places": jnp.float32(batch.query_mask.size + batch.passage_mask.size),
        "flops": step_flops(model, queries, passages, frozen=frozen).encoder,
    }


def _active_terms(given: Representations, texts: int | jax.Array) -> jax.Array:
    """Terms with a weight above 0, a text, on average, each counted once; places where no passage is, `<s> </s>`, have none."""
    return (term_weights(given.token_ids, given.token_weights)[1] > 0).sum() / texts
