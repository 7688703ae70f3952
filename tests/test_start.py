"""What a run starts from; whole runs that refuse to start are in e2e/test_train_refusals.py."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets", reason="training needs the train extra")

import m3jax
from configs import base
from m3jax.config import M3Config
from m3jax.model import M3, cast, init
from tests.small_run import small_config
from train.settings import check
from train.start import read_rows, start_data, start_model, with_length_groups, with_steps


def test_a_batch_divides_by_the_devices():
    config = base.get_config()
    config.length_groups = ((64, 16), (128, 12))
    assert with_length_groups(config, 4).length_groups == ((64, 16), (128, 12))
    with pytest.raises(ValueError, match=r"8 devices .* up to 128 tokens it is 12; the nearest sizes are 8 and 16$"):
        with_length_groups(config, 8)
    both = r"up to 64 tokens it is 16; the nearest sizes are 32; up to 128 tokens it is 12; the nearest sizes are 32$"
    with pytest.raises(ValueError, match=both):
        with_length_groups(config, 32)


@pytest.mark.parametrize(
    ("group_size", "stage"), [(8, {500: 1152, 3000: 432, 8192: 192}), (1, {500: 16800, 8192: 2496})]
)
def test_the_papers_batches_are_of_as_many_devices_as_there_are(group_size, stage, tmp_path):
    """PAPER §4: stage 3 on 24 devices; stage 2, which had 96, on a quarter of them."""
    config = base.get_config()
    config.update(output=str(tmp_path), group_size=group_size)
    groups = dict(with_length_groups(config, 24).length_groups)
    assert len(groups) == 9 and {length: groups[length] for length in stage} == stage
    assert config.length_groups == ()


@pytest.mark.parametrize("group", [(0, 4), (64, 0), (64,), (64.0, 4)])
def test_what_is_no_length_group(group):
    config = base.get_config()
    config.length_groups = ((64, 16), group)
    with pytest.raises(ValueError, match="length_groups holds pairs"):
        with_length_groups(config, 1)


def test_weights_that_leave_nothing_to_train():
    config = base.get_config()
    config.update(functions=("sparse",), loss_weights=(1.0, 0.0, 1.0), distill_start=-1)
    with pytest.raises(ValueError, match=r"loss_weights = \(1.0, 0.0, 1.0\), which is 0 for all of functions"):
        check(config)
    config.update(functions=("sparse", "dense"), hybrid_weights=(0.0, 0.0, 0.0))
    with pytest.raises(ValueError, match=r"have: hybrid_weights = \(0.0, 0.0, 0.0\), which is 0"):
        check(config)


def test_self_distillation_that_never_starts_is_said(recwarn):
    config = base.get_config()
    check(config)
    assert not recwarn.list
    config.steps = config.distill_start = 1000
    with pytest.warns(UserWarning, match="distill_start = 1000 is not reached in 1000 steps"):
        check(config)
    config.update(steps=0, epochs=2)
    check(config)  # not known yet
    batches = SimpleNamespace(streams=[SimpleNamespace(batches_a_round=500)])
    with pytest.warns(UserWarning, match="distill_start = 1000 is not reached in 1000 steps"):
        assert with_steps(config, batches).steps == 1000


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_to_go_on_with_is_float32_in_host_memory(tiny_tokenizer, tmp_path, dtype):
    """The mesh splits it; a copy on each device beside that would cost as much again as the largest part of a run."""
    model = M3Config.tiny(vocab_size=tiny_tokenizer.vocab_size)
    params = cast(init(model, jax.random.key(0)), dtype)
    m3jax.save(M3(model, params, tiny_tokenizer), tmp_path / "model")
    config = base.get_config()
    config.data.train, config.init_from = "rows.jsonl", str(tmp_path / "model")
    config.query_max_length = config.passage_max_length = 64
    found = start_model(config).params
    assert all(isinstance(x, np.ndarray) and x.dtype == np.float32 for x in jax.tree.leaves(found))
    assert all(
        np.array_equal(x, np.float32(y)) for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True)
    )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("objective", "v2", r"objective = 'v2', expected one of \('v4', 'v1'\)"),
        ("teacher", "kl_div", r"teacher = 'kl_div', expected one of \('', 'group', 'sequential'\)"),
        ("teacher_temperature", 0.0, "teacher_temperature = 0.0, expected above 0"),
        ("shuffle_segments", 1.5, "shuffle_segments = 1.5, expected from 0 to 1"),
        ("loss_weights", (1.0, 1.0), r"loss_weights = \(1.0, 1.0\), expected three numbers from 0 up, or \(\)"),
        ("functions", ("dense", "lexical"), r"functions = \('dense', 'lexical'\), expected some of"),
        ("functions", (), r"functions = \(\), expected some of"),
        (
            "functions",
            ("dense",),
            "distill_start = 6000 with dense alone, which has no hybrid to learn from; expected -1",
        ),
        ("heads", "requir", r"heads = 'requir', expected one of \('require', 'init'\)"),
        ("output", "gs://bucket/run", "output = 'gs://bucket/run', expected a local folder"),
        ("data.folder", "gs://bucket/data", "data.folder = 'gs://bucket/data', expected a local folder"),
        ("frozen", ("dense",), r"frozen = \('dense',\), expected some of"),
        ("frozen", ("encoder", "sparse", "colbert"), "frozen = .*, which leaves nothing to train"),
        ("accumulate", 0, "accumulate = 0, expected at least 1"),
        ("accumulate", 3, "steps = 10000, expected a multiple of accumulate = 3"),
        ("seed", 2**32, "seed = 4294967296, expected from 0 to below"),
        ("sub_batch_tokens", -1, "sub_batch_tokens = -1, expected from 0 up"),
        ("remat", "none", r"remat = 'none', expected one of \('elements', "),
        ("dtype", "float16", r"dtype = 'float16', expected one of \('float32', 'bfloat16'\)"),
        ("learning_rate_scale.sparse", 0.0, "learning_rate_scale.sparse = 0.0, expected above 0"),
        ("teacher_temperature", 2.0, "teacher_temperature = 2.0, but no teacher is set; expected 1.0"),
        ("keep_best", "dev/all/mrr", "keep_best = 'dev/all/mrr', expected '' or one of dev/dense/"),
        (
            "checkpoints",
            "s3://bucket/run",
            "checkpoints = 's3://bucket/run', expected a local folder or gs://…, .* renames in others, s3:// too",
        ),
    ],
)
def test_settings_that_no_run_can_have(key, value, message):
    config = base.get_config()
    check(config)
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=f"settings that no run can have: {message}"):
        check(config)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("colbert", "functions", ("dense", "sparse")),
        ("colbert", "frozen", ("colbert",)),
        ("encoder", "frozen", ("encoder",)),
    ],
)
def test_a_rate_of_what_is_not_trained_is_refused(name, key, value):
    config = base.get_config()
    config.learning_rate_scale[name] = 2.0
    check(config)
    config[key] = value
    with pytest.raises(ValueError, match=rf"learning_rate_scale.{name} = 2.0, but {name} is not trained"):
        check(config)


def test_a_teacher_has_passages_to_tell_apart():
    config = base.get_config()
    config.update(teacher="group", group_size=2)
    check(config)
    config.group_size = 1
    with pytest.raises(ValueError, match=r"teacher = 'group' with group_size = 1, .* expected group_size of 2 or more"):
        check(config)


def test_one_function_has_no_hybrid():
    config = base.get_config()
    config.update(functions=("dense",), distill_start=-1, keep_best="")
    check(config)
    config.hybrid_weights = (1.0, 0.0, 0.0)
    with pytest.raises(ValueError, match=r"hybrid_weights = .* with dense alone, which has no hybrid; expected"):
        check(config)


def test_sizes_are_those_of_random_weights(tiny_tokenizer, tmp_path):
    """Left at what base.py has, or given as the model has them, they say nothing; others would be passed over."""
    model = M3Config.tiny(vocab_size=tiny_tokenizer.vocab_size)
    m3jax.save(M3(model, init(model, jax.random.key(0)), tiny_tokenizer), tmp_path / "model")
    config = base.get_config()
    config.update(init_from=str(tmp_path / "model"), query_max_length=16, passage_max_length=16)
    config.model.hidden_size = model.hidden_size
    assert start_model(config).config == model
    config.model.num_hidden_layers = 3
    with pytest.raises(
        ValueError, match=rf"num_hidden_layers = {model.num_hidden_layers}, got .*num_hidden_layers': 3"
    ):
        start_model(config)


def test_weights_of_datasets_are_checked_before_rows_are_read(small_data, tmp_path):
    config = small_config(small_data, tmp_path, **{"data.weights": (1.0, 2.0)})
    with pytest.raises(ValueError, match=r"one number above 0 for each dataset, 1 in all; \(1.0, 2.0\) came"):
        start_data(config, [tmp_path / "not-there.jsonl"], start_model(config))


def test_shorter_vectors_are_those_of_a_trained_function():
    config = base.get_config()
    config.functions, config.matryoshka.colbert = ("dense", "sparse"), (8,)
    with pytest.raises(ValueError, match=r"matryoshka.colbert = \(8,\), but colbert is not among functions"):
        check(config)


@pytest.mark.parametrize(
    ("function", "widths"),
    [("dense", (16,)), ("dense", (0,)), ("dense", (8, 8)), ("colbert", (6,)), ("colbert", (2.5,))],
)
def test_widths_of_random_weights(small_data, tmp_path, function, widths):
    config = small_config(small_data, tmp_path, **{"model.colbert_dim": 6})
    found = start_model(config, values=False)
    assert found.config.colbert_dim == 6 and found.params["heads"]["colbert_linear"]["kernel"].shape == (16, 6)
    config.matryoshka.update(dense=(8, 15), colbert=(5,))
    start_model(config, values=False)
    config.matryoshka[function] = widths
    with pytest.raises(ValueError, match=f"matryoshka.{function} holds widths from 1 to below the full one"):
        start_model(config, values=False)


@pytest.fixture
def rows_with_scores(tmp_path, tiny_tokenizer):
    """rows_with_scores(teacher, scored): what read_rows gives for three rows, the first `scored` of which have scores."""

    def read(teacher, scored):
        config = base.get_config()
        row = {"query": "fox", "pos": ["the fox"], "neg": ["a dog"]}
        rows = [row | ({"pos_scores": [1], "neg_scores": [0]} if i < scored else {}) for i in range(3)]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        config.data.train, config.data.folder = str(tmp_path / "rows.jsonl"), str(tmp_path / "data")
        config.query_max_length = config.passage_max_length = 64
        config.teacher = teacher
        return read_rows(config, [tmp_path / "rows.jsonl"], tiny_tokenizer)

    return read


@pytest.mark.parametrize(
    ("teacher", "scored", "message"),
    [
        ("", 0, None),
        ("", 2, "2 of 3 rows carry pos_scores or neg_scores, which are not used: --config.teacher says how to."),
        ("group", 3, None),
        ("sequential", 1, "2 of 3 rows have no pos_scores and neg_scores: they are trained without the teacher."),
    ],
)
def test_what_is_said_of_a_teacher_s_scores(rows_with_scores, recwarn, teacher, scored, message):
    assert len(rows_with_scores(teacher, scored)) == 3
    assert [str(w.message) for w in recwarn if w.category is UserWarning] == [message] * bool(message)


def test_a_teacher_without_scores_is_an_error(rows_with_scores):
    with pytest.raises(
        ValueError, match=r"teacher = 'group' needs rows with pos_scores .* none of the 3 rows of .* has them"
    ):
        rows_with_scores("group", 0)
