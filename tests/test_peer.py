"""What FlagEmbedding 1.4.2 gets wrong, point by point, and for each the tests that would fail if m3jax did the same.

`PEER §2.N` in the docstring of a test is point N here.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
POINTS = {
    1: (
        'same-dataset batches without a prompt train every query as "None" + text',
        "tests/parity/test_data_parity.py::test_peer_2_1_a_row_without_a_prompt",
        "tests/test_builders.py::test_peer_2_1_a_row_without_a_prompt_has_none",
    ),
    2: (
        "without in-batch negatives the ensemble is an IndexError, or its loss is 0 and distils towards uniform",
        "tests/parity/test_training_parity.py::test_peer_2_2_own_group_as_candidates",
        "tests/test_losses.py::test_peer_2_2_without_in_batch_negatives_every_head_and_the_ensemble_see_the_own_group",
        "tests/test_step_loss.py::test_peer_2_2_own_groups_and_places_without_a_passage",
    ),
    3: (
        "negatives of other devices serve the dense loss alone, with 1/W of the gradient on W devices",
        "tests/test_sub_batch.py::test_on_eight_devices_as_on_one_and_each_computes_its_own_rows",
    ),
    4: (
        "a model without heads loads with random ones, and nothing says so",
        "tests/parity/test_encode_parity.py::test_missing_heads_are_an_error",
    ),
    5: (
        "padding changes colbert scores: padded vectors are zeros, which floor the maximum at 0",
        "tests/parity/test_training_parity.py::test_padding_does_not_change_colbert_scores",
    ),
    6: (
        "sub-batches of unequal lengths crash when all heads are trained",
        "tests/test_sub_batch.py::test_on_eight_devices_as_on_one_and_each_computes_its_own_rows",
    ),
    7: (
        "a run that goes on gets the same data again, and counts the steps to self-distillation from 0",
        "tests/test_pipeline.py::test_peer_2_7_resumed_equals_never_stopped",
        "tests/e2e/test_resume.py::test_killed_while_saving_and_between_it_goes_on_as_if_never_stopped",
    ),
    8: (
        "encode takes every RuntimeError for memory that ran out, ends in an unrelated one, fails on [], and computes the "
        "first batch twice",
        "tests/test_encoding_run.py::test_other_errors_come_through",
        "tests/test_encoding_run.py::test_a_text_that_does_not_fit_alone",
        "tests/test_encoding_run.py::test_peer_2_8_each_token_is_computed_once",
        "tests/test_embedder.py::test_no_texts",
    ),
    9: (
        "keyword arguments that do not exist are swallowed; a row without negatives divides by zero",
        "tests/test_embedder.py::test_bad_arguments",
        "tests/parity/test_data_parity.py::test_peer_2_9_a_row_without_negatives",
        "tests/test_pipeline.py::test_peer_2_9_rows_without_negatives",
    ),
    10: (
        "texts that are too long are cut silently",
        "tests/test_embedder.py::test_texts_are_cut_with_one_warning",
        "tests/test_builders.py::test_peer_2_10_texts_cut_are_counted_in_one_warning_every_time",
    ),
    11: (
        "only the total loss is logged; a sparse head that collapses goes unseen",
        "tests/e2e/test_train.py::test_metrics",
        "tests/test_meter.py::test_a_collapsed_sparse_head_is_said_once",
    ),
    12: (
        "encode's colbert arrays are views that keep the whole padded batch in memory",
        "tests/test_embedder.py::test_shapes_and_types",
    ),
}


@pytest.mark.parametrize("point", POINTS)
def test_each_point_has_its_tests(point):
    _, *tests = POINTS[point]
    assert tests
    for test in tests:
        path, _, name = test.partition("::")
        functions = [x for x in ast.parse((ROOT / path).read_text()).body if isinstance(x, ast.FunctionDef)]
        (found,) = (x for x in functions if x.name == name)
        assert re.search(rf"PEER §2\.{point}\b", ast.get_docstring(found) or ""), test


def test_no_point_is_left_out():
    assert [*POINTS] == [*range(1, 13)]
