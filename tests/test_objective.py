"""What a configuration makes of the loss: the versions of the paper's objective, and the keys that go before them."""

import pytest

pytest.importorskip("ml_collections", reason="training needs the train extra")

from configs import base
from m3jax.retrieval import FUNCTIONS
from train.objective import hybrid_weights, loss_arguments, measured_functions


@pytest.mark.parametrize(
    ("objective", "w", "loss_weights", "summed"),
    [("v4", (1, 0.3, 1), (1, 0.1, 1), False), ("v1", (1, 1, 1), (1, 1, 1), True)],
)
def test_one_key_chooses_the_version(objective, w, loss_weights, summed):
    config = base.get_config()
    config.objective = objective
    assert hybrid_weights(config) == w
    given = loss_arguments(config)
    assert given == {
        "temperature": 0.02, "loss_weights": loss_weights, "summed": summed, "teacher": "", "teacher_temperature": 1.0,
    }  # fmt: skip


def test_weights_of_the_config_go_before_those_of_the_version():
    config = base.get_config()
    config.update(objective="v1", hybrid_weights=(0.5, 1.0, 0.0), loss_weights=(1.0, 0.0, 2.0), temperature=0.1)
    config.update(teacher="group", teacher_temperature=3.0)
    assert hybrid_weights(config) == (0.5, 1.0, 0.0)
    expected = (0.1, (1.0, 0.0, 2.0), True, "group", 3.0)
    assert tuple(loss_arguments(config).values()) == expected


@pytest.mark.parametrize(
    ("trained", "measured"),
    [
        (("colbert", "dense", "sparse"), FUNCTIONS),
        (("dense",), ("dense",)),
        (("sparse", "dense"), ("dense", "sparse", "dense+sparse")),
    ],
)
def test_a_run_is_measured_by_what_it_trains(trained, measured):
    config = base.get_config()
    config.functions = trained
    assert measured_functions(config) == measured
