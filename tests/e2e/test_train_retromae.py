"""Whole runs of stage 1 on a few texts: what they leave, go on from, start from and refuse.

Not here: the losses (test_retromae.py), the texts (test_texts.py), and how well anything is learnt.
"""

import functools
import operator
import shutil
import warnings

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

pytest.importorskip("ml_collections", reason="training needs the train extra")
pytest.importorskip("tensorboardX", reason="training needs the train extra")
pytest.importorskip("tensorflow_datasets", reason="training needs the train extra")

import convert.__main__
import m3jax
import train.loop
import train.preemption
from configs import base, retromae
from m3jax import checkpoint, weights
from m3jax.model import flatten
from tests.real_processes import train_on_two
from tests.small_run import SIZES, WORDS, write
from train.preemption import Stopped
from train.pretrain import _OF_OTHER_STAGES, _start, pretrain
from train.results import read_metrics, read_results
from train.sub_batch import SubBatches

pytestmark = pytest.mark.usefixtures("compiled_quickly")


@pytest.fixture(scope="module")
def configured(tmp_path_factory, tiny_tokenizer_json):
    """configured(output, key=value, …): configs/retromae.py at small sizes, on eight texts."""
    data = tmp_path_factory.mktemp("texts")
    (data / "tokenizer.json").write_text(tiny_tokenizer_json, encoding="utf-8")
    random = np.random.default_rng(0)
    for name in ("train", "dev"):
        write(data / f"{name}.jsonl", [{"text": " ".join(random.choice(WORDS, 3))} for _ in range(8)])

    def make(output, **changes):
        config = retromae.get_config()
        config.output, config.tokenizer = str(output), str(data / "tokenizer.json")
        config.model.update(SIZES)
        config.data.update(train=str(data / "train.jsonl"), dev=str(data / "dev.jsonl"), folder=str(data / "prepared"))
        config.update(length_groups=((32, 4),), passage_max_length=32, steps=4, learning_rate=1e-2, dropout=0.1)
        config.update(log_every=1, evaluate_every=2, save_every=2)
        config.update_from_flattened_dict(changes)
        return config

    return make


@pytest.fixture(scope="module")
def ran(configured, tmp_path_factory):
    """A whole run; its steps, compiled once, are those of all runs of this file."""
    steps = []

    def compiled_once(make, **_):
        steps.append(steps[0] if steps else make(SubBatches()))
        return steps[0]

    run = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.loop, "CompiledStep", compiled_once)
        pretrain(configured(run))
        yield run


def test_what_a_run_leaves(ran):
    results, metrics = read_results(ran / "results.json"), read_metrics(ran / "metrics.jsonl")
    before, after = results["losses"]["untrained"], results["losses"]["trained"]
    assert after["encoder"] < before["encoder"] and after["decoder"] < before["decoder"]
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    assert all(np.isclose(row["loss"], row["loss/encoder"] + row["loss/decoder"]) for row in metrics)
    assert [row.get("dev/decoder") for row in metrics][3] == after["decoder"]
    assert [("dev/encoder" in row) for row in metrics] == [False, True, False, True]
    assert all(row[f"gradient_norm/{part}"] > 0 for row in metrics for part in ("encoder", "lm_head", "decoder"))
    assert "Masked-language loss" in (ran / "report.html").read_text(encoding="utf-8")
    names = {path.name for path in (ran / "model").iterdir()}
    assert "model.safetensors" in names and not {"sparse_linear.pt", "colbert_linear.pt"} & names
    card = (ran / "model" / "README.md").read_text(encoding="utf-8")
    assert f"| trained, loss on held-out texts | {after['encoder']:.3f} | {after['decoder']:.3f} |" in card


def test_it_looks_whether_to_stop_while_it_measures(configured, tmp_path, monkeypatch):
    def look(preemption):
        raise Stopped("at a look")

    monkeypatch.setattr(train.preemption.Preemption, "look", look)
    with pytest.raises(Stopped, match="at a look"):
        pretrain(configured(tmp_path / "run"))
    assert not (tmp_path / "run" / "model").exists()


def test_stage_2_starts_from_the_encoder(ran):
    with pytest.raises(ValueError, match=r"an M3 model needs its heads"):
        m3jax.load(ran / "model")
    _, params, _ = weights.read(ran / "model", heads="init")
    last = checkpoint.stored_shapes(ran / "checkpoints")
    assert {path: x.shape for path, x in flatten(params).items() if path.startswith("encoder/")} == {
        path: x.shape for path, x in last.items() if path.startswith("encoder/")
    }
    assert not any(path.startswith("heads/") for path in last) and "lm_head/bias" in last


def test_a_run_that_was_stopped_is_the_one_that_was_not(ran, configured, tmp_path):
    shutil.copytree(ran, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    shutil.rmtree(tmp_path / "run" / "model")
    pretrain(configured(tmp_path / "run"))
    expected, found = (load_file(run / "model" / "model.safetensors") for run in (ran, tmp_path / "run"))
    assert expected.keys() == found.keys() and all((found[name] == x).all() for name, x in expected.items())
    rows = [[row["loss"] for row in read_metrics(run / "metrics.jsonl")] for run in (ran, tmp_path / "run")]
    assert rows[0] == rows[1]
    with pytest.raises(ValueError, match=r"encoder_mask was 0\.3, is 0\.5"):
        pretrain(configured(tmp_path / "run", encoder_mask=0.5))


@pytest.mark.parametrize(
    ("mesh", "parts"), [({"fsdp": 2}, 1), ({"data": 1, "fsdp": 2, "tensor": 2}, 2)], ids=["2 x 2 x 1", "1 x 2 x 2"]
)
def test_two_processes_train_as_one(ran, configured, tmp_path, mesh, parts, capfd):
    """Their four devices, each with its rows one by one, as one device with all of them at once; what they began one ends."""
    config, run = configured(tmp_path / "run"), tmp_path / "run"
    usual = leaves(retromae.get_config())
    settings = {key: value for key, value in leaves(config).items() if value != usual[key]}
    settings |= {f"mesh.{axis}": size for axis, size in mesh.items()} | {"sub_batch_tokens": 1}
    first, second = train_on_two(settings, config="retromae")
    assert "report" in first and not second.strip()
    assert ("texts in 2 sub-batches" in first) == (parts == 2)

    def assert_same():
        expected, found = (
            [{key: row[key] for key in row if key == "gradient_norm" or "loss" in key or "dev/" in key} for row in rows]
            for rows in (read_metrics(one / "metrics.jsonl") for one in (ran, run))
        )
        assert found == [pytest.approx(row, rel=1e-4) for row in expected]
        expected, found = (load_file(one / "model" / "model.safetensors") for one in (ran, run))
        assert expected.keys() == found.keys()
        for name, x in expected.items():
            # Softmax takes that bias out: its gradient is rounding, of which Adam makes whole steps.
            if not name.endswith("self.key.bias"):
                np.testing.assert_allclose(found[name], x, rtol=0, atol=1e-4, err_msg=name)

    assert_same()
    shutil.rmtree(run / "checkpoints" / "4")
    shutil.rmtree(run / "model")
    pretrain(config)
    assert "going on after step 2" in capfd.readouterr().out
    assert_same()


def leaves(config, prefix=""):
    """Keys as flags name them, and values."""
    found = {}
    for key, value in config.items():
        found |= leaves(value, f"{prefix}{key}.") if hasattr(value, "items") else {prefix + key: value}
    return found


def test_a_masked_language_model_s_head_is_where_the_head_starts(ran, configured, tmp_path, tiny_tokenizer, capsys):
    """From its own directory, and through a conversion that makes its position table longer."""
    directory, random = tmp_path / "xlmr", np.random.default_rng(1)
    shutil.copytree(ran / "model", directory)
    tensors = load_file(directory / "model.safetensors")
    tensors = {f"roberta.{name}": x for name, x in tensors.items() if not name.startswith("pooler")}
    head = {name: random.normal(size=(16, 16) if name == "dense.weight" else 16) for name in
            ("dense.weight", "dense.bias", "layer_norm.weight", "layer_norm.bias")}  # fmt: skip
    head["bias"] = random.normal(size=tiny_tokenizer.vocab_size)
    tensors |= {f"lm_head.{name}": x.astype(np.float32) for name, x in head.items()}
    tensors["lm_head.decoder.weight"] = tensors["roberta.embeddings.word_embeddings.weight"].copy()
    save_file(tensors, directory / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        convert.__main__.main(
            ["from-pytorch", str(directory), str(tmp_path / "orbax"), "--heads", "init", "--extend-positions", "66"]
        )
        for start, positions in ((directory, 34), (tmp_path / "orbax", 66)):
            m3 = _start(configured(tmp_path, init_from=str(start), tokenizer=""))
            assert m3.config.max_position_embeddings == positions
            np.testing.assert_array_equal(
                m3.params["lm_head"]["dense"]["kernel"], head["dense.weight"].T.astype(np.float32)
            )
            np.testing.assert_array_equal(m3.params["lm_head"]["bias"], head["bias"].astype(np.float32))
            assert "the language-model head is that of" in capsys.readouterr().out
    m3 = _start(configured(tmp_path, init_from=str(ran / "model"), tokenizer=""))
    assert "has no language-model head" in capsys.readouterr().out
    assert {*m3.params} == {"encoder", "lm_head", "decoder"}
    expected = jax.tree.map(np.shape, flatten(train.pretrain.retromae.shapes(m3.config)))
    assert jax.tree.map(np.shape, flatten(m3.params)) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_mask": 0.0}, "encoder_mask = 0.0, expected a share above 0"),
        ({"decoder_seen": 1.5}, "decoder_seen = 1.5, expected a probability"),
        ({"plan_only": True}, "plan_only = True, which is of the later stages alone"),
        ({"data.test": "sets"}, "data.test = 'sets', which is of the later stages alone"),
        ({"data.train": ""}, 'data.train = "", expected texts'),
        ({"passage_max_length": 64}, "passage_max_length must fit the position table, at most 32, got 64"),
        ({"tokenizer": ""}, "random weights need a tokenizer"),
        ({"temperature": 0.1}, "temperature = 0.1, which is of the later stages alone; expected 0.02"),
        ({"group_size": 2}, "group_size = 2, which is of the later stages alone; expected 8"),
    ],
)
def test_what_is_refused(configured, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        pretrain(configured(tmp_path, **changes))


def test_held_out_texts_that_no_group_takes_are_refused(configured, tmp_path):
    train, dev = (
        str(write(tmp_path / f"{name}.jsonl", [{"text": "fox " * count}] * 8))
        for name, count in (("train", 1), ("dev", 20))
    )
    with pytest.raises(
        ValueError, match=r"data.dev: held-out texts have up to \d+ token ids, the length groups end at 5"
    ):
        pretrain(configured(tmp_path / "run", length_groups=((5, 4),), **{"data.dev": dev, "data.train": train}))


@pytest.mark.parametrize("frozen", [("encoder",), ("sparse",)])
def test_stage_1_trains_the_encoder(configured, tmp_path, frozen):
    with pytest.raises(ValueError, match=r"frozen = .*; expected \(\) or \('positions',\)"):
        pretrain(configured(tmp_path / "run", frozen=frozen))


def test_keys_of_the_later_stages_are_refused_but_for_what_base_says():
    stage = {key: value for key, value in _OF_OTHER_STAGES.items() if key not in ("keep_best", "distill_start")}
    settings = base.get_config()
    assert {key: functools.reduce(operator.getitem, key.split("."), settings) for key in stage} == stage
