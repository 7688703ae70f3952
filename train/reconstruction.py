"""The step of stage 1, down both masked-language losses of a batch of texts, and these losses on held-out texts.

Not here: the losses (m3jax/retromae.py), where texts come from (data/texts.py), and the run (pretrain.py).
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from m3jax.batching import bucket_length, pad
from m3jax.config import M3Config
from m3jax.model import M3, Params
from m3jax.retromae import Targets, losses, targets
from train import Config
from train.data.streams import LengthGroup
from train.data.texts import TextBatch, Texts
from train.flops import reconstruction_flops
from train.processes import placed, rows_held
from train.step import TrainState, cast_kernels, precision, step_on, trained
from train.sub_batch import ONE_PASS, SubBatches, sum_in

# Tokens of a device that are measured at a time: the largest text there is.
_MEASURED_TOKENS = 8192


def loss_and_parts(
    model: M3Config,
    mask_id: int,
    config: Config,
    params: Params,
    batch: Any,
    key: jax.Array,
    sub_batches: SubBatches = ONE_PASS,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of stage 1 on one global batch, and as measures its two parts and the work that it took.

    batch: a `TextBatch` of device arrays.
    """
    each = targets(model, batch.ids, batch.mask, config.encoder_mask)
    total = Targets(each.encoder.sum(), each.decoder.sum())
    keys = jax.random.split(key, len(batch.ids))

    def part(
        params: Params, ids: jax.Array, mask: jax.Array, keys: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        # Cast in here: what the parts give to the gradient of a parameter is summed in float32.
        ours = cast_kernels(trained(config, params), config.dtype)
        shares = _shares(config, mask_id)
        return losses(model, ours, ids, mask, keys, total, dropout=config.dropout, remat=config.remat, **shares)

    value, parts = sum_in(sub_batches.texts, part, params, batch.ids, batch.mask, keys)
    measures = {"loss": value} | {f"loss/{name}": of for name, of in parts.items()}
    return value, measures | work(model, batch, total)


def make_step(
    model: M3Config,
    mask_id: int,
    config: Config,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    state: TrainState,
    sub_batches: SubBatches = ONE_PASS,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted step for states placed like `state`, whose buffers it takes over."""

    def loss(params: Params, batch: Any, done: jax.Array, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return loss_and_parts(model, mask_id, config, params, batch, key, sub_batches)

    return step_on(loss, config, optimizer, mesh, state)


def work(model: M3Config, batch: Any, total: Targets) -> dict[str, jax.Array]:
    """Of a global batch: its real tokens, the places for them with padding, and the model's FLOPs on the real ones."""
    lengths = batch.mask.sum(axis=1)
    return {
        "tokens": lengths.sum(),
        "places": jax.numpy.float32(batch.mask.size),
        "flops": reconstruction_flops(model, lengths, total.encoder + total.decoder),
    }


def _shares(config: Config, mask_id: int) -> dict[str, Any]:
    return {"mask_id": mask_id, "masked": config.encoder_mask, "seen": config.decoder_seen}


class HeldOut:
    """The mean losses over the targets of texts that are not trained on: the same masks each time, whatever the devices are.

    look: called before each batch; what it raises breaks off.
    """

    def __init__(
        self,
        config: Config,
        model: M3Config,
        mask_id: int,
        texts: Texts,
        groups: list[LengthGroup],
        mesh: Mesh,
        look: Callable[[], None],
    ):
        self._texts, self._groups, self._mesh, self._look = texts, groups, mesh, look
        self._pad_id = model.pad_token_id
        if texts.lengths.max() > groups[-1].max_length:
            raise ValueError(
                f"data.dev: held-out texts have up to {texts.lengths.max()} token ids, the length groups end at "
                f"{groups[-1].max_length}. Add a group, or lower passage_max_length."
            )
        one = Targets(jax.numpy.int32(1), jax.numpy.int32(1))

        @jax.jit
        def sums(params: Params, batch: Any, texts: jax.Array) -> tuple[dict[str, jax.Array], Targets]:
            # A key a text, by its place among all.
            keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(config.seed), texts)
            ours = cast_kernels(params, config.dtype)
            with jax.default_matmul_precision(precision(config.dtype)):
                _, found = losses(model, ours, batch.ids, batch.mask, keys, one, **_shares(config, mask_id))
            each = targets(model, batch.ids, batch.mask, config.encoder_mask)
            return found, Targets(each.encoder.sum(), each.decoder.sum())

        self._sums = sums

    def __call__(self, m3: M3) -> dict[str, float]:
        """{"dev/encoder": loss, "dev/decoder": loss} of a model, in nats a target."""
        held, parts = rows_held(self._mesh)
        found, count = dict.fromkeys(("encoder", "decoder"), 0.0), dict.fromkeys(("encoder", "decoder"), 0)
        bounds = [0, *(group.max_length for group in self._groups)]
        for low, high in itertools.pairwise(bounds):
            members = np.flatnonzero((self._texts.lengths > low) & (self._texts.lengths <= high))
            if not len(members):
                continue
            length = min(bucket_length(int(self._texts.lengths[members].max()), 128), high)
            rows = parts * max(1, _MEASURED_TOKENS // length)
            for start in range(0, len(members), rows):
                self._look()
                these = members[start : start + rows]
                ids, mask = pad(self._texts.ids(these), rows, length, self._pad_id)  # rows that are left have no target
                mine = np.arange(rows).reshape(parts, -1)[held].ravel()
                batch = placed(TextBatch(ids[mine], mask[mine]), self._mesh)
                given, number = jax.device_get(self._sums(m3.params, batch, np.resize(these, rows)))
                for name in found:
                    found[name] += float(given[name])
                    count[name] += int(getattr(number, name))
        return {f"dev/{name}": found[name] / max(1, count[name]) for name in found}
