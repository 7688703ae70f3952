"""The loss and gradient of stage 1 on a whole batch and in sub-batches.

Not here: the losses themselves (test_retromae.py), and whole runs (e2e/test_train_retromae.py).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("optax", reason="training needs the train extra")

from configs import base
from m3jax import retromae
from m3jax.model import flatten
from tests.small_texts import MASK, MODEL, batch, close
from train.data.texts import TextBatch
from train.reconstruction import loss_and_parts
from train.sub_batch import ONE_PASS, SubBatches

POSITIONS = "encoder/embeddings/position_embeddings/embedding"


@pytest.fixture(scope="module")
def params():
    return retromae.init(MODEL, jax.random.key(0))


def value_and_gradient(params, parts, **changes):
    settings = base.get_config()
    settings.update(dropout=0.2, **changes)
    ids, mask, _ = (jnp.concatenate([x, x[:1]]) for x in batch())

    def loss(params):
        return loss_and_parts(MODEL, MASK, settings, params, TextBatch(ids, mask), jax.random.key(0), parts)[0]

    return jax.jit(jax.value_and_grad(loss))(params)


def test_in_sub_batches_as_in_one(params):
    whole, gradient = value_and_gradient(params, ONE_PASS)
    value, found = value_and_gradient(params, SubBatches(texts=2))
    np.testing.assert_allclose(value, whole, rtol=1e-6)
    close(found, gradient)


@pytest.mark.parametrize("parts", [ONE_PASS, SubBatches(texts=2)])
def test_positions_that_are_frozen_have_no_gradient(params, parts):
    gradient = flatten(value_and_gradient(params, parts, frozen=("positions",))[1])
    assert {path for path, x in gradient.items() if np.any(x) and "position" in path} == set()
    assert np.any(gradient[POSITIONS.replace("position", "word")])
    assert np.any(flatten(value_and_gradient(params, parts)[1])[POSITIONS])
