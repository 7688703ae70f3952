"""What a person sees of a run: results.json and metrics.jsonl as one HTML page, and the tables for a terminal.

Nothing is measured here: the numbers come from the loop and the evaluation, and the curves from train/pictures.py; what
a run lacks is left out, never shown as zero.
"""

import json
import math
import os
import re
import statistics
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NotRequired, TypedDict, cast, get_args, get_origin, get_type_hints, is_typeddict

from m3jax.retrieval import FUNCTIONS
from train.pictures import (
    THEME,
    colour_name,
    draw_dev,
    draw_loss,
    draw_quality,
    series,
    smoothing_window,
    standalone,
)

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


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: expected a file of UTF-8 text, as every run directory has it, got: {error}. Give a run directory."
        ) from error


def _parse(text: str, place: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{place}: expected a JSON object, got {text[:60]!r}: {error}. Correct or remove it."
        ) from error
    _check(value, dict[str, Any], place)
    return value


def _read_results(path: Path) -> Results:
    results = _parse(_read(path), str(path))
    _check(results, Results, str(path))
    seen = set()
    for evaluation in results.get("evaluations", []):
        which = (evaluation["name"], evaluation["model"])
        if which in seen:
            raise ValueError(f"{path}: expected one evaluation per test set and model, got {which} twice. Rename one.")
        seen.add(which)
    return cast(Results, results)


def _read_metrics(path: Path) -> list[dict[str, float]]:
    """The logged lines, one a step; a resumed run logs some steps again, and then the later value counts."""
    steps: dict[int, dict[str, float]] = {}
    # Only "\n" ends a line of JSONL: str.splitlines would also cut at U+2028 inside a string.
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        row = _parse(line, f"{path}:{number}")
        if type(row.get("step")) is not int:
            raise ValueError(f"{path}:{number}: expected an integer 'step', got {row.get('step')!r}. Correct the line.")
        for key, value in row.items():
            # A loss that became NaN is a fact to show, so finiteness is not asked for here.
            if type(value) not in (int, float):
                raise ValueError(f"{path}:{number}: expected a number in {key!r}, got {value!r}. Correct the line.")
        steps.setdefault(row["step"], {}).update(row)
    return [steps[step] for step in sorted(steps)]


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
            pair = "  ".join(f"{text:>{len(metric)}}" for text, metric in zip(texts, METRICS.values(), strict=True))
            line += f"  {pair:<{width}}"
        lines.append(line.rstrip())
    return "\n".join([*lines, *_notes(results)])


def _spans(text: str, matched: Sequence[str]) -> tuple[list[tuple[int, int]], list[str]]:
    """Where the matched terms lie in the text, touching ones joined, and the terms that are not in it as written.

    Terms lie anywhere; if one of them begins with "▁" all are SentencePiece pieces, and those with "▁" lie only after a
    space and those without it only inside a word. Case is ignored, as tokenizers may fold it.
    """
    pieces = any(term.startswith("▁") for term in matched)
    found: list[tuple[int, int]] = []
    absent: list[str] = []
    for term in dict.fromkeys(matched):
        bare = term.replace("▁", " ").strip()
        if not bare:
            continue
        before = (r"(?<!\S)" if term.startswith("▁") else r"(?<=\S)") if pieces else ""
        hits = [hit.span() for hit in re.finditer(before + re.escape(bare), text, re.IGNORECASE)]
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
    """`mark` applied to the matched terms and `plain` to the rest; terms that are not in the text follow it."""
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


def _ndcg(results: Results) -> dict[str, dict[str, float]]:
    """{test set: {row label: nDCG@10}}."""
    cells = _cells(results)
    return {
        name: {label: row[name]["ndcg_at_10"] for label, row in cells.items() if "ndcg_at_10" in row.get(name, {})}
        for name in _names(results)
    }


def _html_head(results: Results, metrics: Sequence[Mapping[str, float]]) -> str:
    seconds, losses = results.get("seconds", {}), [row for row in metrics if "loss" in row]
    facts = [f"<b>{_amount(results['parameters'])} parameters</b>"] if "parameters" in results else []
    facts += [f"<b>{losses[-1]['step']:,} steps</b>"] if losses else []
    facts += [f"<b>{_duration(seconds['total'])}</b> from start to end"] if "total" in seconds else []
    facts += [escape(results["hardware"])] if "hardware" in results else []
    when = f" · {results['date'].replace('T', ' ')}" if "date" in results else ""
    html = f'<div class="kicker">m3jax training run{escape(when)}</div><h1>{escape(results["name"])}</h1>'
    html += f'<p class="lead">{" · ".join(facts)}</p>' if facts else ""
    phases = [f"{escape(name)} {_duration(value)}" for name, value in seconds.items() if name != "total"]
    html += f'<p class="soft">{" · ".join(phases)}</p>' if phases else ""
    if broken := [row["step"] for row in losses if not math.isfinite(row["loss"])]:
        html += (
            f'<p class="notice"><b>The loss was not a finite number at {len(broken):,} of {len(losses):,} logged steps'
            f"</b>, first at step {broken[0]:,}.</p>"
        )
    return html


def _html_verdict(results: Results) -> str:
    """The first test set in three numbers: of "all", chosen beforehand, and of the best function only without it."""
    for name, values in _ndcg(results).items():
        trained = [label for label in values if label != "BM25" and not label.startswith("untrained ")]
        if trained:
            function = "all" if "all" in trained else max(trained, key=lambda label: values[label])
            tiles = "".join(
                f'<div class="card tile {kind}"><span>{escape(text)}</span><b>{values[label]:.3f}</b></div>'
                for label, text, kind in (
                    (function, f"trained, {function}", "main"),
                    ("BM25", "BM25", ""),
                    (f"untrained {function}", "untrained", ""),
                )
                if label in values
            )
            verdict = ""
            if values.get("BM25"):
                ratio = values[function] / values["BM25"]
                kind, words = (
                    ("good", f"{ratio:.2f} × BM25") if ratio >= 1 else ("bad", f"Below BM25: {ratio:.2f} × it")
                )
                verdict = f' <span class="{kind}">{words}.</span>'
            return f'<p>nDCG@10 on “{escape(name)}”; 1 is perfect.{verdict}</p><div class="tiles">{tiles}</div>'
    return ""


def _dot(function: str) -> str:
    return f'<i class="dot" style="background:var(--{colour_name(function)})"></i>'


def _html_table(results: Results) -> str:
    cells, names = _cells(results), _names(results)
    columns = [(name, metric) for name in names for metric in METRICS]
    best = {
        (name, metric): max((row[name][metric] for row in cells.values() if metric in row.get(name, {})), default=None)
        for name, metric in columns
    }
    sets = "".join(f'<th colspan="{len(METRICS)}">{escape(name)}</th>' for name in names)
    body = ""
    for label, row in cells.items():
        body += f'<tr class="{"dim" if label.startswith("untrained ") else ""}"><td>{_dot(label)}{escape(label)}</td>'
        for name, metric in columns:
            value = row.get(name, {}).get(metric)
            kind = ' class="best"' if value is not None and value == best[name, metric] else ""
            body += f"<td{kind}>{'–' if value is None else f'{value:.3f}'}</td>"
        body += "</tr>"
    metrics = "".join(f"<th>{METRICS[metric]}</th>" for _, metric in columns)
    head = f"<thead><tr><th></th>{sets}</tr><tr><th></th>{metrics}</tr></thead>"
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def _html_quality(results: Results, picture: str) -> str:
    if not _cells(results):
        return ""
    rows = {label.removeprefix("untrained ") for label in _cells(results)}
    words = {
        "BM25": "counts shared terms; nothing is trained",
        "dense": "one vector for a text",
        "sparse": "a learned weight for each term of a text",
        "colbert": "one vector for each token",
        "dense+sparse": "the weighted sum of these two",
        "all": "the weighted sum of all three",
    }
    legend = "".join(f"<p>{_dot(row)}<b>{row}</b>: {text}</p>" for row, text in words.items() if row in rows)
    notes = "".join(f'<p class="soft">{escape(note)}</p>' for note in _notes(results))
    return (
        f'<h2>How good it is</h2>{_html_verdict(results)}<div class="charts">{picture}<div>{legend}{notes}</div></div>'
        f"{_html_table(results)}"
    )


def _html_example(example: Example) -> str:
    def mark(text: str) -> str:
        return f"<mark>{escape(text)}</mark>"

    cards = ""
    for function, tops in example["tops"].items():
        items = ""
        for rank, top in enumerate(tops, start=1):
            relevant = '<span class="good">✓ relevant</span>' if top.get("relevant") else ""
            text = _mark(top["text"], top.get("matched", []), mark, escape)
            meta = f'<div class="meta"><span>{rank} · {top["score"]:.3f}</span>{relevant}</div>'
            items += f'<li>{meta}<div dir="auto">{text}</div></li>'
        cards += f'<div class="card"><h3>{_dot(function)}{escape(function)}</h3><ol class="tops">{items}</ol></div>'
    language = f" in {escape(example['language'])}" if "language" in example else ""
    return (
        f'<h2>One query, worked through</h2><p class="soft">A query{language}, and what each function puts first. Terms'
        f' that matched are <mark>marked</mark>.</p><p class="query" dir="auto">{escape(example["query"])}</p>'
        f'<div class="cards">{cards}</div>'
    )


def _html_next(results: Results) -> str:
    model = f"<p>The model: <b>{escape(results['model'])}</b></p>" if "model" in results else ""
    commands = "".join(f"<pre>{escape(command)}</pre>" for command in results.get("commands", []))
    return f"<h2>What to do next</h2>{model}{commands}" if model or commands else ""


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[list[str]]:
    rows = []
    for key, value in config.items():
        nested = isinstance(value, dict) and value
        rows += _flat(value, f"{prefix}{key}.") if nested else [[prefix + key, json.dumps(value, ensure_ascii=False)]]
    return rows


def _html_details(results: Results, metrics: Sequence[Mapping[str, float]]) -> str:
    logged = []
    for key in dict.fromkeys(key for row in metrics for key in row if key not in ("step", "seconds")):
        values = series(metrics, key)[1].tolist()
        logged.append([key, *(f"{number:.4g}" for number in (values[0], statistics.median(values), values[-1]))])
    html = ""
    for title, head, rows in (
        ("Logged values", ["", "first", "median", "last"], logged),
        ("Configuration", [], _flat(results.get("config", {}))),
        ("Versions", [], [list(pair) for pair in results.get("versions", {}).items()]),
    ):
        if rows:
            columns = "".join(f"<th>{text}</th>" for text in head)
            body = "".join(f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in row)}</tr>" for row in rows)
            table = f"<table><thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table>"
            html += f'<details><summary>{title}</summary><div class="scroll">{table}</div></details>'
    return f"<h2>Details</h2>{html}" if html else ""


def _page(results: Results, metrics: Sequence[Mapping[str, float]], pictures: Mapping[str, str]) -> str:
    window = smoothing_window(metrics)
    captions = {
        "quality": "Wide bar: trained. Thin grey bar: untrained. Dashed line: BM25.",
        "loss": "Lower is better." + f" Thin: each logged step. Bold: mean of {window} of them." * (window > 1),
        "dev": "Higher is better, 1 is perfect.",
    }
    figures = dict.fromkeys(captions, "")
    for name, svg in pictures.items():
        # Identifiers must be unique in a page that holds several pictures.
        svg = re.sub(r'id="|url[(]#|href="#', lambda found, name=name: f"{found.group()}{name}-", svg)
        figures[name] = f"<figure>{svg}<figcaption>{captions[name]}</figcaption></figure>"
    curves = figures["loss"] + figures["dev"]
    example = results.get("example")
    body = (
        _html_head(results, metrics)
        + _html_quality(results, figures["quality"])
        + (f'<h2>How training went</h2><div class="charts">{curves}</div>' if curves else "")
        + (_html_example(example) if example else "")
        + _html_next(results)
        + _html_details(results, metrics)
    )
    style = THEME + Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(results['name'])} · m3jax</title><style>{style}</style></head>\n"
        f"<body><main>{body}</main></body></html>\n"
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
    file, and the line of metrics.jsonl, when one is missing or not as `Results` describes it.
    """
    run_directory = Path(run_directory)
    results = _read_results(run_directory / "results.json")
    metrics = _read_metrics(run_directory / "metrics.jsonl")
    drawn = {"loss": draw_loss(metrics), "dev": draw_dev(metrics, FUNCTIONS), "quality": draw_quality(_ndcg(results))}
    pictures = {name: svg for name, svg in drawn.items() if svg is not None}
    folder = run_directory / "pictures"
    folder.mkdir(exist_ok=True)
    for name in drawn:
        path = folder / f"{name}.svg"
        if name in pictures:
            _write(path, standalone(pictures[name]))
        else:
            path.unlink(missing_ok=True)
    page = run_directory / "report.html"
    _write(page, _page(results, metrics, pictures))
    return page
