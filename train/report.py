"""What a person sees of a run: results.json and metrics.jsonl as one HTML page with its pictures.

Nothing is measured here: the numbers come from the loop and the evaluation, and the curves from train/pictures.py; what
a run lacks is left out, never shown as zero.
"""

import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from m3jax.retrieval import FUNCTIONS
from train.files import write_whole
from train.pictures import (
    THEME,
    colour_name,
    draw_dev,
    draw_gradients,
    draw_loss,
    draw_quality,
    draw_speed,
    series,
    smoothing_window,
    standalone,
)
from train.results import (
    BEFORE,
    METRICS,
    Example,
    Results,
    cells_of,
    names_of,
    ndcg_of,
    notes_of,
    read_metrics,
    read_results,
)
from train.tables import format_duration, mark_terms


def _amount(count: int) -> str:
    for size, word in ((10**9, "billion"), (10**6, "million")):
        if count >= size:
            return f"{count / size:.1f} {word}"
    return f"{count:,}"


def _html_head(results: Results, metrics: Sequence[Mapping[str, float]]) -> str:
    seconds, losses = results.get("seconds", {}), [row for row in metrics if "loss" in row]
    facts = [f"<b>{_amount(results['parameters'])} parameters</b>"] if "parameters" in results else []
    facts += [f"<b>{losses[-1]['step']:,} steps</b>"] if losses else []
    facts += [f"<b>{format_duration(seconds['total'])}</b> from start to end"] if "total" in seconds else []
    facts += [escape(results["hardware"])] if "hardware" in results else []
    when = f" · {results['date'].replace('T', ' ')}" if "date" in results else ""
    html = f'<div class="kicker">m3jax training run{escape(when)}</div><h1>{escape(results["name"])}</h1>'
    html += f'<p class="lead">{" · ".join(facts)}</p>' if facts else ""
    phases = [f"{escape(name)} {format_duration(value)}" for name, value in seconds.items() if name != "total"]
    html += f'<p class="soft">{" · ".join(phases)}</p>' if phases else ""
    if broken := [row["step"] for row in losses if not math.isfinite(row["loss"])]:
        html += (
            f'<p class="notice"><b>The loss was not a finite number at {len(broken):,} of {len(losses):,} logged steps'
            f"</b>, first at step {broken[0]:,}.</p>"
        )
    return html


def _html_verdict(results: Results) -> str:
    """The first test set in three numbers: of "all", chosen beforehand, and of the best function only without it."""
    for name, values in ndcg_of(results).items():
        trained = [label for label in values if label != "BM25" and not label.startswith(BEFORE)]
        if trained:
            function = "all" if "all" in trained else max(trained, key=lambda label: values[label])
            tiles = "".join(
                f'<div class="card tile {kind}"><span>{escape(text)}</span><b>{values[label]:.3f}</b></div>'
                for label, text, kind in (
                    (function, f"trained, {function}", "main"),
                    ("BM25", "BM25", ""),
                    (BEFORE + function, "before training", ""),
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
    cells, names = cells_of(results), names_of(results)
    columns = [(name, metric) for name in names for metric in METRICS]
    best = {
        (name, metric): max((row[name][metric] for row in cells.values() if metric in row.get(name, {})), default=None)
        for name, metric in columns
    }
    sets = "".join(f'<th colspan="{len(METRICS)}">{escape(name)}</th>' for name in names)
    body = ""
    for label, row in cells.items():
        body += f'<tr class="{"dim" if label.startswith(BEFORE) else ""}"><td>{_dot(label)}{escape(label)}</td>'
        for name, metric in columns:
            value = row.get(name, {}).get(metric)
            kind = ' class="best"' if value is not None and value == best[name, metric] else ""
            body += f"<td{kind}>{'–' if value is None else f'{value:.3f}'}</td>"
        body += "</tr>"
    metrics = "".join(f"<th>{METRICS[metric]}</th>" for _, metric in columns)
    head = f"<thead><tr><th></th>{sets}</tr><tr><th></th>{metrics}</tr></thead>"
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def _html_quality(results: Results, picture: str) -> str:
    if not cells_of(results):
        return ""
    rows = {label.removeprefix(BEFORE) for label in cells_of(results)}
    words = {
        "BM25": "counts shared terms; nothing is trained",
        "dense": "one vector for a text",
        "sparse": "a learned weight for each term of a text",
        "colbert": "one vector for each token",
        "dense+sparse": "the weighted sum of these two",
        "all": "the weighted sum of all three",
    }
    legend = "".join(f"<p>{_dot(row)}<b>{row}</b>: {text}</p>" for row, text in words.items() if row in rows)
    notes = "".join(f'<p class="soft">{escape(note)}</p>' for note in notes_of(results))
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
            text = mark_terms(top["text"], top.get("matched", []), mark, escape)
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


def _teacher(metrics: Sequence[Mapping[str, float]]) -> str:
    """Which curve on the development set is the teacher of self-distillation, where one is: that of all that is trained."""
    keys = {key for row in metrics for key in row}
    measured = [name for name in ("all", "dense+sparse") if f"dev/{name}/ndcg_at_10" in keys]
    if not measured or not any(key.startswith("distill/") for key in keys):
        return ""
    return f" {measured[0]}: the weighted sum, which teaches the others."


def _page(results: Results, metrics: Sequence[Mapping[str, float]], pictures: Mapping[str, str]) -> str:
    window = smoothing_window(metrics)
    captions = {
        "quality": "Wide bar: trained. Thin grey bar: before training. Dashed line: BM25.",
        "loss": "Lower is better." + f" Thin: each logged step. Bold: mean of {window} of them." * (window > 1),
        "dev": "Higher is better, 1 is perfect." + _teacher(metrics),
        "gradients": "Before clipping. A sparse head whose terms go to 0 has collapsed.",
        "speed": "Means between logged steps, without compiling and measuring. Utilisation: the encoder's products on real "
        "tokens, over what products of large matrices reach here.",
    }
    figures = dict.fromkeys(captions, "")
    for name, svg in pictures.items():
        # Identifiers must be unique in a page that holds several pictures.
        svg = re.sub(r'id="|url[(]#|href="#', lambda found, name=name: f"{found.group()}{name}-", svg)
        figures[name] = f"<figure>{svg}<figcaption>{captions[name]}</figcaption></figure>"
    curves = figures["loss"] + figures["dev"] + figures["gradients"] + figures["speed"]
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


def write_report(run_directory: Path) -> Path:
    """Writes report.html and pictures/{quality,loss,dev,gradients,speed}.svg of a run from results.json and metrics.jsonl.

    The page and the pictures need nothing but themselves and follow the reader's light or dark theme. A picture without
    data is left out, and one of an earlier report is removed. Returns the page's path. Raises ValueError that names the
    file, and the line of metrics.jsonl, when one is missing or not as `Results` describes it.
    """
    run_directory = Path(run_directory)
    results = read_results(run_directory / "results.json")
    metrics = read_metrics(run_directory / "metrics.jsonl")
    drawn = {
        "quality": draw_quality(ndcg_of(results)),
        "loss": draw_loss(metrics),
        "dev": draw_dev(metrics, FUNCTIONS),
        "gradients": draw_gradients(metrics),
        "speed": draw_speed(metrics),
    }
    pictures = {name: svg for name, svg in drawn.items() if svg is not None}
    folder = run_directory / "pictures"
    folder.mkdir(exist_ok=True)
    for name in drawn:
        path = folder / f"{name}.svg"
        if name in pictures:
            write_whole(path, standalone(pictures[name]))
        else:
            path.unlink(missing_ok=True)
    page = run_directory / "report.html"
    write_whole(page, _page(results, metrics, pictures))
    return page
