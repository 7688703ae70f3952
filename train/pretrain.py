"""The story of stage 1: texts → encoder, head and decoder → (step, log, measure, save)* → the encoder alone, released.

Not here: the steps themselves, which are those of every stage (loop.py), and what one computes (reconstruction.py).
"""

import dataclasses
import datetime
import functools
import operator
import shlex
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

import m3jax
from m3jax import retromae, sources
from m3jax.card import make_encoder_card
from m3jax.model import M3, Params
from m3jax.sharding import make_mesh
from train import Config
from train.console import say
from train.data.streams import LengthGroup
from train.data.texts import TextBatches, Texts, prepare_texts
from train.data.tfds_sets import PREFIX
from train.files import write_json
from train.loop import Clock, hardware, run_steps, versions
from train.optimizer import make_optimizer
from train.preemption import Preemption
from train.processes import first_then_others, is_first, on_host, rows_held
from train.reconstruction import HeldOut, make_step
from train.settings import check
from train.start import length_step, listed, new_model, path_of, with_length_groups

# A run goes on only with these as it began, and with the same texts.
_KEPT = (
    *("stage", "seed", "init_from", "length_groups", "accumulate", "encoder_mask", "decoder_seen", "frozen", "steps"),
    *("learning_rate", "learning_rate_scale", "warmup", "weight_decay", "clip", "adam_b1", "adam_b2", "adam_eps"),
    *("dropout", "dtype"),
)
# What would do nothing here, and the value that says so: but for two, base.py's own.
_OF_OTHER_STAGES = {
    "query_max_length": 512,
    "group_size": 8,
    "functions": ("dense", "sparse", "colbert"),
    "temperature": 0.02,
    "objective": "v4",
    "hybrid_weights": (),
    "loss_weights": (),
    "teacher": "",
    "teacher_temperature": 1.0,
    "keep_best": "",
    "distill_start": -1,
    "shuffle_segments": 0.0,
    "plan_only": False,
    "data.test": "",
    "epochs": 0,
    "data.held_out": 0.0,
    "data.weights": (),
    "data.same_dataset": True,
    "matryoshka.dense": (),
    "matryoshka.colbert": (),
    "learning_rate_scale.sparse": 1.0,
    "learning_rate_scale.colbert": 1.0,
    "heads": "require",
}


def pretrain(config: Config) -> dict[str, Any]:
    """Run stage 1 from its beginning or its last checkpoint to the released encoder (every key is in configs/base.py).

    Returns the content of results.json on the first of several processes. Raises ValueError, before training starts, on data,
    sizes or settings that cannot be trained, and during it on a loss that is not finite; Stopped when SIGTERM asks for it.
    """
    _check(config)
    with Preemption() as preemption:
        return _run(config, preemption)


def _check(config: Config) -> None:
    check(config)
    wrong = []
    for key, nothing in _OF_OTHER_STAGES.items():
        value = functools.reduce(operator.getitem, key.split("."), config)
        if value != nothing:
            wrong.append(f"{key} = {value!r}, which is of the later stages alone; expected {nothing!r}")
    if {*config.frozen} - {"positions"}:
        wrong.append(
            f"frozen = {config.frozen}; expected () or ('positions',): stage 1 trains the encoder and has no heads"
        )
    if not 0 < config.encoder_mask <= 1:
        wrong.append(f"encoder_mask = {config.encoder_mask}, expected a share above 0, at most 1")
    if not 0 <= config.decoder_seen <= 1:
        wrong.append(f"decoder_seen = {config.decoder_seen}, expected a probability")
    if not config.data.train:
        wrong.append('data.train = "", expected texts: .jsonl, .txt, a folder of them, or tfds:NAME')
    if wrong:
        raise ValueError("settings that no run of stage 1 can have: " + "; ".join(wrong))


def _run(config: Config, preemption: Preemption) -> dict[str, Any]:
    run = Path(config.output)
    run.mkdir(parents=True, exist_ok=True)
    clock = Clock()
    m3 = first_then_others(lambda: _start(config), "read or make the model")
    model, mask_id = m3.config, m3.tokenizer.mask_id
    if mask_id is None:
        raise ValueError("stage 1 needs a tokenizer with the token <mask>; this one has none, take XLM-R's")
    if config.passage_max_length > model.max_length:
        raise ValueError(
            f"passage_max_length must fit the position table, at most {model.max_length}, got {config.passage_max_length}; "
            "lower it, or make the table longer with `python -m convert from-pytorch --extend-positions`"
        )
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    held, row_groups = rows_held(mesh)
    config = with_length_groups(config, row_groups)
    groups = [LengthGroup(*group) for group in config.length_groups]
    texts = _texts(config, m3, config.data.train)
    dev = _texts(config, m3, config.data.dev) if config.data.dev else None
    batches = TextBatches(
        texts,
        seed=config.seed,
        groups=groups,
        pad_id=model.pad_token_id,
        step=length_step(mesh, model),
        held=held,
        parts=row_groups,
    )
    say(_describe(config, m3, texts, mesh))
    clock.lap("prepare")
    every = config.to_dict()
    settings = {key: every[key] for key in _KEPT} | {"data": texts.name}
    optimizer, fixed = make_optimizer(config), FrozenConfigDict(config)
    measure = HeldOut(config, model, mask_id, dev, groups, mesh, preemption.look) if dev else None
    losses: dict[str, dict[str, float]] = {}

    def begin(m3: M3, first: int) -> None:
        if measure and config.evaluate_untrained:
            losses["untrained"] = _named(measure(m3))

    trained, first, _ = run_steps(
        config,
        m3,
        batches,
        lambda state, sub_batches: make_step(model, mask_id, fixed, optimizer, mesh, state, sub_batches),
        optimizer,
        mesh,
        settings=settings,
        best="",
        begin=begin,
        measure=measure,
        clock=clock,
        preemption=preemption,
    )
    with jax.set_mesh(mesh):
        if measure:
            losses["trained"] = _named(measure(trained))
    clock.lap("evaluate")
    whole = dataclasses.replace(trained, params={"encoder": on_host(trained.params["encoder"])})
    if not is_first():
        return {}
    count = sum(x.size for x in jax.tree.leaves(whole.params))
    shown = {
        key: str(value) for key, value in (settings | {"texts": len(texts)}).items() if key not in ("init_from", "data")
    }
    table = {
        f"{name}, loss on held-out texts": of
        for name, of in ((name, losses[name]) for name in ("untrained", "trained") if name in losses)
    }
    card = make_encoder_card(model, count, name=config.name, training=shown, measured=table)
    m3jax.save(whole, run / "model", card=card)
    results = {
        "name": config.name,
        "config": every,
        "parameters": count,
        "rows": len(texts),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": clock.seconds(whole=first == 0),
        "hardware": hardware(mesh),
        "versions": versions(),
        "commands": [_next_command(run / "model")],
        "model": "model",
        "losses": losses,
    }
    write_json(run / "results.json", results)
    from train.report import write_report  # here as in contrastive.py: it imports matplotlib

    report = write_report(run)
    took = f" after going on from step {first}" if first else ""
    lines = [f"{row:<40} encoder {of['encoder']:.3f}  decoder {of['decoder']:.3f}" for row, of in table.items()]
    say(
        "\n".join(
            ["", *lines, f"model   {run / 'model'}", f"report  {report}", f"in {clock.total:.0f} s{took}; to go on:"]
        )
    )
    say(f"  {results['commands'][0]}")
    return results


def _named(measured: dict[str, float]) -> dict[str, float]:
    return {name.removeprefix("dev/"): value for name, value in measured.items()}


def _next_command(model: Path) -> str:
    """Stage 2 from the encoder, the pairs still to be named."""
    start = f"--config.init_from={shlex.quote(str(model))}"
    return f"python -m train.main --config configs/dense.py {start} --config.data.train=pairs.jsonl"


def _describe(config: Config, m3: M3, texts: Texts, mesh: Mesh) -> str:
    groups = ", ".join(f"{batch} up to {length} tokens" for length, batch in config.length_groups)
    start = f"from {config.init_from}" if config.init_from else "from random weights"
    return (
        f"{config.name}: {m3}, {start}\n"
        f"  data      {len(texts):,} texts of {config.data.train}\n"
        f"  batches   {groups} on {mesh.size} {'device' if mesh.size == 1 else 'devices'}\n"
        f"  training  {config.steps:,} steps of stage 1, learning rate {config.learning_rate:g}, "
        f"{config.encoder_mask:.0%} masked, {config.decoder_seen:.0%} seen by the decoder\n"
        f"  output    {config.output}"
    )


def _texts(config: Config, m3: M3, named: str) -> Texts:
    def prepare() -> Texts:
        paths = [path if path.startswith(PREFIX) else str(path_of(config, path)) for path in listed(named)]
        return prepare_texts(
            paths, m3.tokenizer, data_dir=Path(config.data.folder), max_length=config.passage_max_length
        )

    return first_then_others(prepare, "tokenise the texts")


def _start(config: Config) -> M3:
    """The model to train, float32: the encoder of `init_from` and its language-model head if it has one; random what is not."""
    key = jax.random.key(config.seed)
    if not config.init_from:
        model, tokenizer = new_model(config)
        return M3(model, retromae.init(model, key), tokenizer)
    if config.tokenizer:
        raise ValueError(f"init_from brings its tokenizer; got tokenizer={config.tokenizer!r} too, leave it out")
    with sources.local(config.init_from) as directory:  # fetched once for both
        model, params, tokenizer = sources.read(directory, heads="init")
        head = sources.read_lm_head(directory, model)
    given: Params = {"encoder": params["encoder"]}
    if head is None:
        say(f"{config.init_from} has no language-model head: it starts random, as the decoder does")
    else:
        say(f"the language-model head is that of {config.init_from}; the decoder starts random")
        given["lm_head"] = head
    # Of one layer: what is drawn is the head and the decoder, whatever the encoder's depth.
    drawn = retromae.init(dataclasses.replace(model, num_hidden_layers=1), key)
    given = {part: given.get(part, drawn[part]) for part in ("encoder", "lm_head", "decoder")}
    return M3(model, jax.tree.map(lambda x: np.asarray(x, np.float32), given), tokenizer)
