"""The plan of a small run beside what the run itself would count; what it leaves, and what it refuses."""

import contextlib
import io
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

pytest.importorskip("tensorflow_datasets", reason="training needs the train extra")
pytest.importorskip("optax", reason="training needs the train extra")

import m3jax
import train.contrastive
import train.main as program
import train.plan
import train.start
import train.step
from m3jax.sharding import make_mesh
from tests.conftest import command_line
from tests.small_run import small_config
from train.compiled import bytes_of
from train.data.pipeline import prefetch
from train.flops import step_flops
from train.optimizer import make_optimizer
from train.plan import format_plan
from train.start import data_paths, read_rows, start_batches, start_model
from train.step import make_state, make_step
from train.sub_batch import SubBatches

pytestmark = pytest.mark.usefixtures("compiled_quickly")
ROOT = Path(__file__).parents[1]
SETTINGS = {"passage_max_length": 15, "length_groups": ((14, 3), (16, 2)), "steps": 50, "remat": "all"}


@pytest.fixture(scope="module")
def config(small_data, tmp_path_factory):
    return small_config(small_data, tmp_path_factory.mktemp("runs") / "planned", plan_only=True, **SETTINGS)


@pytest.fixture(scope="module")
def planned_and_said(config):
    """What the program finds of a plan, and what it says; no parameter is drawn for it."""
    flat = {name: value for name, value in config.items() if not isinstance(value, ConfigDict)}
    nested = {f"{part}.{name}": value for part in ("model", "data") for name, value in config[part].items()}
    flags = [f"--config.{name}={value}" for name, value in (flat | nested).items() if value != ""]
    arguments = ["train.main", f"--config={ROOT / 'configs' / 'base.py'}", *flags]
    found = {}
    with (
        command_line(arguments),
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()) as said,
    ):
        patch.setattr(train.start, "init", lambda *_: pytest.fail("parameters were made"))
        patch.setattr(train.contrastive, "plan", lambda config: found.update(train.plan.plan(config)))
        program.main(program.parse(arguments))
    return found, said.getvalue()


@pytest.fixture(scope="module")
def planned(planned_and_said):
    return planned_and_said[0]


def texts(small_data):
    """Token ids of each query, and of each row's passages, whole."""
    tokenizer = m3jax.Tokenizer.from_file(str(small_data / "tokenizer.json"))
    rows = [json.loads(line) for line in (small_data / "train.jsonl").read_text().splitlines()]
    queries = [len(tokenizer.encode([row["query"]])[0][0]) for row in rows]
    passages = [[len(ids) for ids in tokenizer.encode(row["pos"] + row["neg"])[0]] for row in rows]
    return np.array(queries), np.array(passages)


def test_rows_lengths_and_cuts(planned, small_data):
    queries, passages = texts(small_data)
    cut = (passages > 15).sum()
    assert cut > 0 and planned["counts"]["passages_cut"] == cut and planned["counts"]["queries_cut"] == 0
    longest = np.minimum(passages, 15).max(axis=1)
    assert planned["rows"] == len(queries) == 12
    assert planned["lengths"] == {
        "queries": [(8, (queries <= 8).sum())],
        "passages": [(8, (longest <= 8).sum()), (16, (longest > 8).sum())],
    }


def test_groups(planned, small_data):
    queries, passages = texts(small_data)
    longest = np.maximum(np.minimum(passages, 15).max(axis=1), queries)
    short, long = planned["groups"]
    assert [group["rows"] for group in (short, long)] == [(longest <= 14).sum(), (longest > 14).sum()]
    assert [(group["max_length"], group["batch_size"]) for group in (short, long)] == [(14, 3), (16, 2)]
    assert short["steps"] + long["steps"] == pytest.approx(50)
    epochs = [group["steps"] * group["batch_size"] / group["rows"] for group in (short, long)]
    assert epochs[0] == pytest.approx(epochs[1])  # each round is one of every group


def test_memory_and_work_are_those_of_the_run(planned, config):
    m3, mesh, optimizer = start_model(config), make_mesh(), make_optimizer(config)
    source = read_rows(config, data_paths(config).train, m3.tokenizer)
    state = make_state(m3.params, optimizer, mesh)
    found = {}
    with jax.set_mesh(mesh):
        step = make_step(m3.config, config, optimizer, mesh, state)
        for batch in prefetch(start_batches(config, source, mesh, m3.config), 0, 20):
            lengths = [np.full(*mask.shape) for mask in (batch.query_mask, batch.passage_mask)]
            if len(batch.query_ids) not in found:
                memory = bytes_of(step.lower(state, batch).compile())
                found[len(batch.query_ids)] = (memory, *step_flops(m3.config, *lengths, remat="all"))
    for group in planned["groups"]:
        assert (group["memory"], group["encoder_flops"], group["colbert_flops"]) == found[group["batch_size"]]
    assert planned["checkpoint"] == sum(x.nbytes for x in jax.tree.leaves(state)) and planned["checkpoints"] == 3


def test_the_run_and_the_plan_encode_in_the_same_sub_batches(small_data, tmp_path, monkeypatch):
    """As many as `sub_batch_tokens` holds, of each length group its own; seen where a step encodes."""
    changes = SETTINGS | {"steps": 4, "remat": "elements", "sub_batch_tokens": 20, "evaluate_untrained": False}
    config = small_config(small_data, tmp_path / "run", **changes, **{"data.dev": "", "data.test": ""})
    encoded, encode_in = set(), train.step.encode_in

    def seen(encode, params, *sides):
        encoded.update((*rows[0].shape, parts) for parts, rows in sides)
        return encode_in(encode, params, *sides)

    monkeypatch.setattr(train.step, "encode_in", seen)
    # Of 3 queries of 8 tokens one at a time, and 2 at once; of 6 passages of 14 tokens, and of 4 of 16, one.
    expected = {(3, 8, 3), (6, 14, 6), (2, 8, 1), (4, 16, 4)}
    groups, model = train.plan.plan(config)["groups"], start_model(config, values=False).config
    assert encoded == expected
    for group, parts in zip(groups, (SubBatches(3, 6), SubBatches(1, 4)), strict=True):
        assert group["sub_batches"] == parts.passages
        sides = (group["batch_size"], group["query_tokens"]), (2 * group["batch_size"], group["passage_tokens"])
        flops = step_flops(model, *(np.full(*side) for side in sides), sub_batches=parts)
        assert (group["encoder_flops"], group["colbert_flops"]) == pytest.approx(tuple(flops))
    encoded.clear()
    train.contrastive.train(config)
    assert encoded == expected


def test_what_a_person_sees(planned, config, small_data, capsys):
    numbers = planned | {"rate": 1e9, "devices": 8, "device": "TPU v5e", "dtype": "bfloat16", "checkpoint": 6.8e9}
    groups = [
        {
            "max_length": 500,
            "rows": 1_000_000,
            "batch_size": 1152,
            "steps": 900,
            "query_tokens": 64,
            "passage_tokens": 500,
        },
        {"max_length": 8192, "rows": 50, "batch_size": 8, "steps": 100, "query_tokens": 512, "passage_tokens": 8192},
    ]
    groups[0] |= {"sub_batches": 16, "memory": 12_345_678_901}
    groups[1] |= {"sub_batches": 1, "memory": 7e9}
    groups = [group | {"group_size": 2, "encoder_flops": 3e12, "colbert_flops": 1e12} for group in groups]
    text = format_plan(numbers | {"groups": groups})
    for part in (
        "passages, to 15",
        "1,000,000  1,152 × 2    900    1.04     64 × 500     16  12.35 GB      4   4e+03",
        "8,192         50      8 × 2    100   16.00  512 × 8,192      1   7.00 GB      4   4e+03",
        "4e+15 FLOP, of which colbert 25%",
        "1,111 h 6 min of steps at 0.001 TFLOP/s, what products of large bfloat16 matrices reach on 8 × TPU v5e",
        "6.8 GB; 3 are kept",
    ):
        assert part in text, text
    assert max(map(len, text.splitlines())) <= 120


def test_it_leaves_no_run(planned_and_said, config):
    _, said = planned_and_said
    assert "compiling for 3 queries of 8 tokens and 6 passages of 14" in said and "  checkpoint  " in said
    assert not list(Path(config.output).parent.iterdir())


def test_a_plan_refuses_what_the_run_would(small_data, tmp_path):
    with pytest.raises(ValueError, match="rows, fewer than its batch_size 13"):
        train.contrastive.train(small_config(small_data, tmp_path / "run", plan_only=True, length_groups=((16, 13),)))
    with pytest.raises(ValueError, match="learning_rate"):
        train.contrastive.train(small_config(small_data, tmp_path / "run", plan_only=True, learning_rate=-1.0))
    assert not (tmp_path / "run").exists()


def test_a_model_to_start_from_is_not_read(small_data, tmp_path, monkeypatch):
    """Of a released directory the names of files' tensors, of a checkpoint not even these."""
    first = start_model(small_config(small_data, tmp_path))
    m3jax.save(first, tmp_path / "released")
    monkeypatch.setattr(train.start.sources, "read", lambda *_, **__: pytest.fail("it was read"))
    found = start_model(
        small_config(small_data, tmp_path, init_from=str(tmp_path / "released"), tokenizer=""), values=False
    )
    assert found.config == first.config and found.tokenizer.json == first.tokenizer.json
    assert {type(x) for x in jax.tree.leaves(found.params)} == {jax.ShapeDtypeStruct}
