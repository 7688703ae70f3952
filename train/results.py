"""What a run leaves behind: results.json and metrics.jsonl, their types, how they are checked and read.

Nothing is measured or shown here (evaluation.py; tables.py, report.py).
"""

import math
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NotRequired, TypedDict, cast, get_args, get_origin, get_type_hints, is_typeddict

from m3jax.retrieval import FUNCTIONS
from train.files import parse_object, read_lines

# Begins the label of a row that was measured before training.
BEFORE = "before "
METRICS = {"ndcg_at_10": "nDCG@10", "recall_at_100": "Recall@100"}


class Evaluation(TypedDict):
    """Scores of one model on one test set: {"bm25" or a function: {metric: value}}."""

    name: str
    model: Literal["trained", "untrained"]
    scores: dict[str, dict[str, float]]
    queries: NotRequired[int]
    passages: NotRequired[int]
    warnings: NotRequired[list[str]]


class Top(TypedDict):
    """One passage that a function found; `matched` holds substrings of it or SentencePiece pieces."""

    text: str
    score: float
    relevant: NotRequired[bool]
    matched: NotRequired[list[str]]


class Example(TypedDict):
    """One query and the first passages by each function."""

    query: str
    tops: dict[str, list[Top]]
    language: NotRequired[str]


class Results(TypedDict):
    """The content of results.json."""

    name: str
    date: NotRequired[str]
    config: NotRequired[dict[str, Any]]
    parameters: NotRequired[int]
    rows: NotRequired[int]
    seconds: NotRequired[dict[str, float]]
    hardware: NotRequired[str]
    versions: NotRequired[dict[str, str]]
    commands: NotRequired[list[str]]
    model: NotRequired[str]
    losses: NotRequired[
        dict[str, dict[str, float]]
    ]  # of stage 1: {"trained" or "untrained": {part: on held-out texts}}
    evaluations: NotRequired[list[Evaluation]]
    example: NotRequired[Example | None]


def _check(value: Any, kind: Any, place: str) -> None:
    """Raises ValueError at the first part of `value` that is not of `kind`, naming its place."""
    if get_origin(kind) is UnionType:
        if value is None:
            return
        kind = get_args(kind)[0]
    expected: Any = dict if is_typeddict(kind) else get_origin(kind) or kind
    if expected is Any:
        return
    if expected is Literal:
        fits, wanted = value in get_args(kind), f"one of {get_args(kind)}"
    elif expected is float:
        fits, wanted = type(value) in (int, float) and math.isfinite(value), "a finite number"
    else:
        fits, wanted = type(value) is expected, f"a value of type {expected.__name__}"
    if not fits:
        raise ValueError(
            f"{place}: expected {wanted}, got {value!r:.80}. Run the evaluation again, or correct the file."
        )
    if is_typeddict(kind):
        if missing := sorted(kind.__required_keys__ - value.keys()):
            raise ValueError(f"{place}: expected the keys {missing} too, got {sorted(value)}. Add them.")
        for key, inner in get_type_hints(kind).items():
            if key in value:
                _check(value[key], inner, f"{place}: {key}")
    elif expected in (list, dict):
        for key, item in enumerate(value) if expected is list else value.items():
            _check(item, get_args(kind)[-1], f"{place}[{key!r}]")


def read_results(path: Path) -> Results:
    """results.json of a run. ValueError that names the path where the file is missing or not as `Results` describes it."""
    _found(path)
    try:
        results = parse_object(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}. Correct or remove it.") from None
    _check(results, Results, str(path))
    seen = set()
    for evaluation in results.get("evaluations", []):
        which = (evaluation["name"], evaluation["model"])
        if which in seen:
            raise ValueError(f"{path}: expected one evaluation per test set and model, got {which} twice. Rename one.")
        seen.add(which)
    return cast(Results, results)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The logged lines, one a step; a resumed run logs some steps again, and then the later value counts.

    ValueError that names the path and line where one is not an object of numbers with an integer "step".
    """
    steps: dict[int, dict[str, float]] = {}
    _found(path)
    for where, line in read_lines(path):
        try:
            row = parse_object(line)
        except ValueError as error:
            raise ValueError(f"{where}: {error}. Correct or remove it.") from None
        if type(row.get("step")) is not int:
            raise ValueError(f"{where}: expected an integer 'step', got {row.get('step')!r}. Correct the line.")
        for key, value in row.items():
            # A loss that became NaN is a fact to show, so finiteness is not asked for here.
            if type(value) not in (int, float):
                raise ValueError(f"{where}: expected a number in {key!r}, got {value!r}. Correct the line.")
        steps.setdefault(row["step"], {}).update(row)
    return [steps[step] for step in sorted(steps)]


def names_of(results: Mapping[str, Any]) -> list[str]:
    """The test sets, in their order."""
    return list(dict.fromkeys(evaluation["name"] for evaluation in results.get("evaluations", [])))


def cells_of(results: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """{row label: {test set: {metric: value}}}; BM25 first, then the trained functions, then the untrained ones."""
    known = ("bm25", *FUNCTIONS)
    cells: dict[tuple[bool, int, str], dict[str, dict[str, float]]] = {}
    for evaluation in results.get("evaluations", []):
        for function, scores in evaluation["scores"].items():
            untrained = evaluation["model"] == "untrained" and function != "bm25"
            place = known.index(function) if function in known else len(known)
            label = (BEFORE if untrained else "") + ("BM25" if function == "bm25" else function)
            cells.setdefault((untrained, place, label), {})[evaluation["name"]] = scores
    return {key[2]: cells[key] for key in sorted(cells)}


def notes_of(results: Mapping[str, Any]) -> list[str]:
    """Sizes of the test sets and the warnings of their evaluations, each once."""
    notes = []
    for evaluation in results.get("evaluations", []):
        name = evaluation["name"]
        sizes = [f"{evaluation[key]:,} {key}" for key in ("queries", "passages") if key in evaluation]
        notes += [f"{name}: {', '.join(sizes)}"] * bool(sizes)
        notes += [f"{name}: warning: {warning}" for warning in evaluation.get("warnings", [])]
    return list(dict.fromkeys(notes))


def ndcg_of(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """{test set: {row label: nDCG@10}}."""
    cells = cells_of(results)
    return {
        name: {label: row[name]["ndcg_at_10"] for label, row in cells.items() if "ndcg_at_10" in row.get(name, {})}
        for name in names_of(results)
    }


def _found(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: expected a file, as every run directory has it, got none. Give a run directory.")
