"""A run's model card: what its results and settings tell of the model that it releases.

Not here: how a card looks and how the model is used (m3jax/card.py).
"""

import json
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from m3jax import hub
from m3jax.card import make_card
from m3jax.config import M3Config
from m3jax.losses import PARTS
from m3jax.retrieval import FUNCTIONS
from train.data import cldr
from train.results import BEFORE, METRICS, cells_of, notes_of


def card_of_run(model: M3Config, results: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """The card of a run's model from the content of results.json, which may lack its evaluations yet.

    settings: what the trained model depends on. The text is the same whenever and wherever the run is finished: it holds no
    time, and of a path that names a place on this machine the last part only. Languages are those of the demo set; rows of
    JSONL do not tell theirs.
    """
    config = results["config"]
    start = config["init_from"]
    data = [path.strip() for path in config["data"]["train"].split(",") if path.strip()]
    demo = [path.split("/")[0] == "cldr" for path in data]
    training = {
        "start": (start if hub.is_name(start) else f"{_shown(start)}, a local model") if start else "random weights",
        "data": ", ".join(
            f"{path} (names and facts of Unicode CLDR)" if known else _shown(path)
            for path, known in zip(data, demo, strict=True)
        ),
        "rows": f"{results['rows']:,}",
    }
    kept = {key: config[key] for key in ("query_max_length", "passage_max_length")} | dict(settings)
    training |= {key: _value(value) for key, value in kept.items() if key != "init_from"}
    cells = {
        row: {test: {METRICS[metric]: value for metric, value in of.items()} for test, of in tests.items()}
        for row, tests in cells_of(results).items()
    }
    return make_card(
        model,
        results["parameters"],
        name=results["name"],
        base_model=start if hub.is_name(start) else None,
        untrained=[function for function in PARTS if function not in config["functions"]],
        languages=cldr.LANGUAGES if all(demo) else (),
        training=training,
        measured={row: tests for row, tests in cells.items() if row in FUNCTIONS},
        compared={
            f"{row.removeprefix(BEFORE)}, before training" if row.startswith(BEFORE) else row: tests
            for row, tests in cells.items()
            if row not in FUNCTIONS
        },
        notes=notes_of(results),
    )


def _shown(path: str) -> str:
    return PurePath(path).name if PurePath(path).is_absolute() else path


def _value(value: Any) -> str:
    return value if value and isinstance(value, str) else json.dumps(value)
