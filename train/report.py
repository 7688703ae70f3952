"""What a person sees of a finished run: results.json and metrics.jsonl as one HTML page, pictures, and terminal tables.

Nothing is measured or averaged over queries here: the numbers come from the loop and the evaluation; what a run lacks is
left out, never drawn as zero.
"""

import json
import math
import os
import re
import statistics
import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from html import escape
from io import StringIO
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NotRequired, TypedDict, cast, get_args, get_origin, get_type_hints, is_typeddict

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

FUNCTIONS = ("dense", "sparse", "colbert", "dense+sparse", "all")
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
    seconds: NotRequired[dict[str, float]]
    hardware: NotRequired[str]
    versions: NotRequired[dict[str, str]]
    commands: NotRequired[list[str]]
    model: NotRequired[str]
    evaluations: NotRequired[list[Evaluation]]
    example: NotRequired[Example | None]


# ---------------------------------------------------------------------------------------------------- reading


def _check(value: Any, kind: Any, place: str) -> None:
    """Raises ValueError at the first part of `value` that is not of `kind`, naming its place."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return
    if origin is UnionType:
        if value is not None:
            _check(value, arguments[0], place)
        return
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{place}: expected one of {arguments}, got {value!r}. Write the run's record again.")
        return
    expected = dict if is_typeddict(kind) else origin or kind
    fits = isinstance(value, (int, float) if expected is float else expected) and not isinstance(value, bool)
    if expected is bool:
        fits = isinstance(value, bool)
    if not fits or (expected is float and not math.isfinite(value)):
        wanted = "a finite number" if expected is float else expected.__name__
        raise ValueError(f"{place}: expected {wanted}, got {value!r:.80}. Write the run's record again.")
    if is_typeddict(kind):
        if missing := sorted(kind.__required_keys__ - value.keys()):
            raise ValueError(f"{place}: lacks {missing}; it has {sorted(value)}. Write the run's record again.")
        for key, inner in get_type_hints(kind).items():
            if key in value:
                _check(value[key], inner, f"{place}: {key}")
    elif expected is list:
        for index, item in enumerate(value):
            _check(item, arguments[0], f"{place}[{index}]")
    elif expected is dict:
        for key, item in value.items():
            _check(item, arguments[1], f"{place}[{key!r}]")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: a report needs this file as UTF-8 text: {error}. Give a run's directory.") from error


def _parse(text: str, place: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: expected JSON, got {text[:60]!r}: {error}. Write the record again.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{place}: expected a JSON object, got {text[:60]!r}. Write the record again.")
    return value


def _read_results(path: Path) -> Results:
    results = _parse(_read(path), str(path))
    _check(results, Results, str(path))
    seen = set()
    for evaluation in results.get("evaluations", []):
        which = (evaluation["name"], evaluation["model"])
        if which in seen:
            raise ValueError(f"{path}: one evaluation per test set and model, got {which} twice. Name the sets apart.")
        seen.add(which)
    return cast(Results, results)


def _read_metrics(path: Path) -> list[dict[str, float]]:
    """The logged lines, one a step; a resumed run logs some steps again, and then the later value counts."""
    steps: dict[float, dict[str, float]] = {}
    # Only "\n" ends a line of JSONL: str.splitlines would also cut at U+2028 inside a string.
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        row = _parse(line, f"{path}:{number}")
        for key, value in row.items():
            # A loss that became NaN is a fact to show, so finiteness is not asked for here.
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{path}:{number}: expected a number in {key!r}, got {value!r}. Write the line again.")
        if "step" not in row:
            raise ValueError(f"{path}:{number}: expected a key 'step', got {sorted(row)}. Write the line again.")
        steps.setdefault(row["step"], {}).update(row)
    return [steps[step] for step in sorted(steps)]


def _series(metrics: Sequence[Mapping[str, float]], key: str) -> tuple[np.ndarray, np.ndarray]:
    rows = [row for row in metrics if key in row]
    return np.array([row["step"] for row in rows]), np.array([row[key] for row in rows], float)


# --------------------------------------------------------------------------------------------------- terminal


def _names(results: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(evaluation["name"] for evaluation in results.get("evaluations", [])))


def _cells(results: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """{row label: {test set: {metric: value}}}; BM25 first, then the trained functions, then the untrained ones."""
    known = ("bm25", *FUNCTIONS)
    cells: dict[tuple[bool, int, str], dict[str, dict[str, float]]] = {}
    for evaluation in results.get("evaluations", []):
        for function, scores in evaluation["scores"].items():
            untrained = evaluation["model"] == "untrained" and function != "bm25"
            place = known.index(function) if function in known else len(known)
            label = ("untrained " if untrained else "") + ("BM25" if function == "bm25" else function)
            cells.setdefault((untrained, place, label), {})[evaluation["name"]] = scores
    return {key[2]: cells[key] for key in sorted(cells)}


def _notes(results: Mapping[str, Any]) -> list[str]:
    """Sizes of the test sets and the warnings of their evaluations, each once."""
    notes = []
    for evaluation in results.get("evaluations", []):
        name = evaluation["name"]
        sizes = [f"{evaluation[key]:,} {key}" for key in ("queries", "passages") if key in evaluation]
        notes += [f"{name}: {', '.join(sizes)}"] * bool(sizes)
        notes += [f"{name}: warning: {warning}" for warning in evaluation.get("warnings", [])]
    return list(dict.fromkeys(notes))


def format_table(results: Mapping[str, Any]) -> str:
    """The evaluations as aligned text: nDCG@10 and Recall@100 of each test set; "" if there are none.

    >>> scores = {"bm25": {"ndcg_at_10": 0.25}, "all": {"ndcg_at_10": 0.875, "recall_at_100": 1.0}}
    >>> print(format_table({"evaluations": [{"name": "test", "model": "trained", "scores": scores}]}))
          test
          nDCG@10  Recall@100
    BM25    0.250           –
    all     0.875       1.000
    """
    cells, names = _cells(results), _names(results)
    if not cells:
        return ""
    first = max(len(label) for label in cells)
    inner = "  ".join(METRICS.values())
    width = max(len(inner), *(len(name) for name in names))
    lines = [
        (" " * first + "".join(f"  {name:<{width}}" for name in names)).rstrip(),
        (" " * first + f"  {inner:<{width}}" * len(names)).rstrip(),
    ]
    for label, sets in cells.items():
        line = f"{label:<{first}}"
        for name in names:
            values = [sets.get(name, {}).get(key) for key in METRICS]
            texts = ["–" if value is None else f"{value:.3f}" for value in values]
            line += "  " + "  ".join(f"{t:>{len(m)}}" for t, m in zip(texts, METRICS.values(), strict=True)).ljust(width)
        lines.append(line.rstrip())
    return "\n".join([*lines, *_notes(results)])


def _spans(text: str, matched: Sequence[str]) -> tuple[list[tuple[int, int]], list[str]]:
    """Where the matched terms lie in the text, touching ones joined, and the terms that are not in it as written.

    "▁x" lies only where a word begins; case is ignored, as tokenizers may fold it.
    """
    found, absent = [], []
    for term in dict.fromkeys(matched):
        begins, bare = term.startswith("▁"), term.replace("▁", " ").strip()
        if not bare:
            continue
        pattern = (r"(?<!\w)" if begins and re.match(r"\w", bare) else "") + re.escape(bare)
        hits = [hit.span() for hit in re.finditer(pattern, text, re.IGNORECASE)]
        found += hits
        absent += [bare] * (not hits)
    joined: list[tuple[int, int]] = []
    for begin, end in sorted(found):
        # A mark that parts a letter from its vowel sign or tone breaks Thai and Indic shaping.
        while end < len(text) and unicodedata.category(text[end]).startswith("M"):
            end += 1
        if joined and begin <= joined[-1][1]:
            begin, end = joined[-1][0], max(end, joined.pop()[1])
        joined.append((begin, end))
    return joined, absent


def _mark(text: str, matched: Sequence[str], mark: Callable[[str], str], plain: Callable[[str], str]) -> str:
    """The text with `mark` applied to the matched terms and `plain` to the rest; terms not in it are listed after it."""
    spans, absent = _spans(text, matched)
    parts, last = [], 0
    for begin, end in spans:
        parts += [plain(text[last:begin]), mark(text[begin:end])]
        last = end
    parts.append(plain(text[last:]))
    if absent:
        parts += [plain(" (also matched: "), plain(", ").join(map(mark, absent)), plain(")")]
    return "".join(parts)


def _one_line(text: str) -> str:
    # A control character of a data set must not reach the terminal as a command to it.
    return " ".join("".join(" " if unicodedata.category(sign) == "Cc" else sign for sign in text).split())


def format_example(example: Mapping[str, Any], *, bold: bool = False) -> str:
    """The worked example as text; matched terms in [brackets], or in ANSI bold when `bold`.

    >>> top = {"text": "Kenya: shilingi", "score": 0.5, "relevant": True, "matched": ["▁Ken", "ya"]}
    >>> print(format_example({"query": "Kenya", "language": "Swahili", "tops": {"sparse": [top]}}))
    Query (Swahili): Kenya
    sparse
      1  0.500  ✓  [Kenya]: shilingi
    """

    def mark(text: str) -> str:
        return f"\033[1m{text}\033[0m" if bold else f"[{text}]"

    language = f" ({example['language']})" if "language" in example else ""
    lines = [f"Query{language}: {_one_line(example['query'])}"]
    for function, tops in example["tops"].items():
        lines.append(function)
        for rank, top in enumerate(tops, start=1):
            text = _mark(_one_line(top["text"]), [_one_line(t) for t in top.get("matched", [])], mark, str)
            lines.append(f"  {rank}  {top['score']:.3f}  {'✓' if top.get('relevant') else ' '}  {text}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------- page

def _duration(seconds: float) -> str:
    if seconds < 59.5:
        return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _amount(count: int) -> str:
    for size, word in ((10**9, "billion"), (10**6, "million")):
        if count >= size:
            return f"{count / size:.1f} {word}"
    return f"{count:,}"


def _headline(results: Mapping[str, Any]) -> tuple[str, str, float, float | None, float | None] | None:
    """(test set, function, trained, BM25, untrained) nDCG@10: of "all", chosen beforehand; the best only without it."""
    cells = _cells(results)
    for name in _names(results):
        scores = {label: row[name]["ndcg_at_10"] for label, row in cells.items() if "ndcg_at_10" in row.get(name, {})}
        trained = {label: v for label, v in scores.items() if label != "BM25" and not label.startswith("untrained ")}
        if trained:
            function = "all" if "all" in trained else max(trained, key=lambda label: trained[label])
            return name, function, trained[function], scores.get("BM25"), scores.get(f"untrained {function}")
    return None


def _head(results: Results, metrics: Sequence[Mapping[str, float]]) -> str:
    facts = []
    if "parameters" in results:
        facts.append(f"A model of <b>{_amount(results['parameters'])} parameters</b>")
    steps = [row["step"] for row in metrics if "loss" in row]
    if steps:
        facts.append(f"trained for <b>{max(steps):,} steps</b>")
    if "total" in results.get("seconds", {}):
        facts.append(f"<b>{_duration(results['seconds']['total'])}</b> from start to end")
    if "hardware" in results:
        facts.append(f"on {escape(results['hardware'])}")
    kicker = " · ".join(["m3jax training run", *([results["date"].replace("T", " ")] if "date" in results else [])])
    parts = [f'<div class="kicker">{escape(kicker)}</div><h1>{escape(results["name"])}</h1>']
    if facts:
        sentence = ", ".join(facts)
        parts.append(f'<p class="lead">{sentence[0].upper()}{sentence[1:]}.</p>')
    broken = [row["step"] for row in metrics if not math.isfinite(row.get("loss", 0.0))]
    if broken:
        parts.append(
            f'<p class="notice"><b>The loss was not a finite number at {len(broken):,} of {len(steps):,} logged steps</b>,'
            f" first at step {min(broken):,}.</p>"
        )
    if headline := _headline(results):
        name, function, trained, bm25, untrained = headline
        tiles = [(f"trained, {function}", trained, " main"), ("BM25", bm25, ""), ("untrained", untrained, "")]
        shown = [
            f'<div class="card tile{kind}"><span>{escape(label)}</span><b>{value:.3f}</b></div>'
            for label, value, kind in tiles
            if value is not None
        ]
        verdict = ""
        if bm25:
            ratio = trained / bm25
            verdict = (
                f' <span class="good">{ratio:.2g} × BM25.</span>' if ratio >= 1
                else f' <span class="bad">Below BM25 ({ratio:.2f} ×).</span>'
            )  # fmt: skip
        parts.append(
            f"<h2>How good it is</h2><p>nDCG@10 on “{escape(name)}” (1 is perfect).{verdict}</p>"
            f'<div class="tiles">{"".join(shown)}</div>'
        )
    return "".join(parts)


def _dot(function: str) -> str:
    name = {"BM25": "bm25", "dense+sparse": "pair", "hybrid": "all"}.get(function, function)
    return f'<i class="dot" style="background:var(--{name if name in PALETTE else "none"})"></i>'


def _quality_table(results: Results) -> str:
    cells, names = _cells(results), _names(results)
    if not cells:
        return ""
    columns = [(name, key) for name in names for key in METRICS]
    head = "".join(f'<th colspan="{len(METRICS)}">{escape(name)}</th>' for name in names)
    body, ruled = [], False
    for label, row in cells.items():
        untrained = label.startswith("untrained ")
        kind = ("dim rule" if not ruled else "dim") if untrained else ""
        ruled = ruled or untrained
        line = f"<td>{_dot(label)}{escape(label)}</td>"
        for name, key in columns:
            value = row.get(name, {}).get(key)
            best = max((other[name][key] for other in cells.values() if key in other.get(name, {})), default=None)
            text = '<td class="soft">–</td>' if value is None else f"<td>{value:.3f}</td>"
            line += text.replace("<td>", '<td class="best">') if value is not None and value == best else text
        body.append(f'<tr class="{kind}">{line}</tr>')
    notes = "".join(f"<br>{escape(note)}" for note in _notes(results))
    return (
        f'<div class="scroll"><table><thead><tr><th></th>{head}</tr><tr><th></th>'
        f"{''.join(f'<th>{METRICS[key]}</th>' for _, key in columns)}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
        '<p class="soft"><small>dense: one vector a text. sparse: a learned weight for each term. colbert: one vector a'
        " token. all: their weighted sum. untrained: the same model at its first weights."
        f"{notes}</small></p>"
    )


def _example(example: Example) -> str:
    def mark(text: str) -> str:
        return f"<mark>{escape(text)}</mark>"

    cards = []
    for function, tops in example["tops"].items():
        items = []
        for rank, top in enumerate(tops, start=1):
            relevant = '<span class="good">✓ relevant</span>' if top.get("relevant") else ""
            text = _mark(top["text"], top.get("matched", []), mark, escape)
            items.append(
                f'<li><div class="meta"><span>{rank} · {top["score"]:.3f}</span>{relevant}</div>'
                f'<div dir="auto">{text}</div></li>'
            )
        cards.append(
            f'<div class="card"><h3>{_dot(function)}{escape(function)}</h3><ol class="tops">{"".join(items)}</ol></div>'
        )
    language = f" in {escape(example['language'])}" if "language" in example else ""
    return (
        f'<h2>One query, worked through</h2><p class="soft">A query{language}, and what each function puts first;'
        " terms that matched are marked.</p>"
        f'<p class="query" dir="auto">{escape(example["query"])}</p><div class="cards">{"".join(cards)}</div>'
    )


def _next_steps(results: Results) -> str:
    parts = []
    if "model" in results:
        parts.append(f'<p>The model lies in <b>{escape(results["model"])}</b>, beside this page.</p>')
    parts += [f"<pre>{escape(command)}</pre>" for command in results.get("commands", [])]
    return f"<h2>What to do next</h2>{''.join(parts)}" if parts else ""


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for key, value in config.items():
        rows += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, json.dumps(value))]
    return rows


def _details(results: Results, metrics: Sequence[Mapping[str, float]]) -> str:
    parts = []
    seconds = {name: value for name, value in results.get("seconds", {}).items() if name != "total"}
    if seconds:
        shades = ["none", "pair", "dense", "colbert", "sparse", "all"]
        named = [(*item, shades[place % len(shades)]) for place, item in enumerate(seconds.items())]
        bar = "".join(f'<i style="flex:{value:.3f};--shade:var(--{shade})"></i>' for _, value, shade in named)
        keys = "".join(
            f'<span class="key"><i class="dot" style="background:var(--{shade})"></i>{escape(name)} {_duration(value)}</span>'
            for name, value, shade in named
        )
        parts.append(f'<h2>Where the time went</h2><div class="bar">{bar}</div><div class="soft">{keys}</div>')
    parts.append("<h2>Details</h2>" if metrics or results.get("config") or results.get("versions") else "")
    if metrics:
        rows = []
        for key in dict.fromkeys(key for row in metrics for key in row if key not in ("step", "seconds")):
            values = _series(metrics, key)[1].tolist()
            numbers = (values[0], statistics.median(values), values[-1])
            rows.append(f"<tr><td>{escape(key)}</td>{''.join(f'<td>{number:.4g}</td>' for number in numbers)}</tr>")
        parts.append(
            '<details><summary>Logged values</summary><div class="scroll"><table><thead><tr><th></th><th>first</th>'
            f"<th>median</th><th>last</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div></details>"
        )
    for title, pairs in (
        ("Configuration", _flat(results.get("config", {}))),
        ("Versions", list(results.get("versions", {}).items())),
    ):
        if pairs:
            rows = "".join(f"<tr><td>{escape(key)}</td><td>{escape(value)}</td></tr>" for key, value in pairs)
            parts.append(f"<details><summary>{title}</summary><table><tbody>{rows}</tbody></table></details>")
    return "".join(parts)


def _page(results: Results, metrics: Sequence[Mapping[str, float]], pictures: Mapping[str, str]) -> str:
    window = _window(len(_series(metrics, "loss/dense")[0]))
    captions = {
        "quality": "Upper bar: trained. Thin grey bar: untrained. Dashed line: BM25.",
        "loss": "Lower is better." + (f" Thin: each logged step; bold: mean of the last {window}." if window > 1 else ""),
        "dev": "Higher is better, 1 is perfect.",
    }
    figures = {}
    for name, svg in pictures.items():
        # Identifiers must be unique in a page that holds several pictures.
        svg = re.sub(r'(id="|url[(]#|href="#)', rf"\g<1>{name}-", svg)
        figures[name] = f"<figure>{svg}<figcaption>{captions[name]}</figcaption></figure>"
    charts = "".join(figures[name] for name in ("loss", "dev") if name in figures)
    example = results.get("example")
    body = [
        _head(results, metrics),
        f'<div class="charts">{figures["quality"]}{_quality_table(results)}</div>' if "quality" in figures else
        _quality_table(results),
        f'<h2>How training went</h2><div class="charts">{charts}</div>' if charts else "",
        _example(example) if example else "",
        _next_steps(results),
        _details(results, metrics),
    ]  # fmt: skip
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(results['name'])} · m3jax</title><style>{THEME}{PAGE_STYLE}</style></head>\n"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _write(path: Path, text: str) -> None:
    """Writes beside the path and moves into place, so that an interrupted report never leaves half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_report(run_directory: Path) -> Path:
    """Writes report.html and pictures/{loss,dev,quality}.svg of a run from its results.json and metrics.jsonl.

    The page and the pictures need nothing but themselves and follow the reader's light or dark theme. A picture without
    data is left out, and one of an earlier report is removed. Returns the page's path. Raises ValueError that names the
    file, and the line of metrics.jsonl, when one is missing or not as described in `Results`.
    """
    run_directory = Path(run_directory)
    results = _read_results(run_directory / "results.json")
    metrics = _read_metrics(run_directory / "metrics.jsonl")
    with matplotlib.rc_context(STYLE):
        figures = {"loss": _draw_loss(metrics), "dev": _draw_dev(metrics), "quality": _draw_quality(results)}
        pictures = {name: _svg(figure) for name, figure in figures.items() if figure is not None}
    folder = run_directory / "pictures"
    folder.mkdir(exist_ok=True)
    for name in figures:
        if name in pictures:
            style = f"<style>{THEME}svg{{background:var(--paper)}}</style>"
            _write(folder / f"{name}.svg", re.sub(r"(<svg[^>]*>)", rf"\g<1>{style}", pictures[name], count=1) + "\n")
        else:
            (folder / f"{name}.svg").unlink(missing_ok=True)
    page = run_directory / "report.html"
    _write(page, _page(results, metrics, pictures))
    return page
