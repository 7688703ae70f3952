"""The pictures of a run as SVG text: losses, gradients, speed and development scores by step, and quality by test set.

Files, HTML and the shape of results.json are not known here: plain numbers come in, one <svg> element goes out.
"""

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from train.results import BEFORE

# Light and dark. Pictures are drawn in the light colours, which then become the names of these CSS variables.
PALETTE = {
    "paper": ("#ffffff", "#12151c"),
    "card": ("#f6f7f9", "#1b1f29"),
    "ink": ("#171a21", "#e9ebf0"),
    "soft": ("#5c6475", "#9fa8ba"),
    "line": ("#dfe2e8", "#323846"),
    "good": ("#0b7a4b", "#4ad295"),
    "bad": ("#b3261e", "#ff8a80"),
    "mark": ("#ffe69a", "#6b5310"),
    "untrained": ("#b9bfcb", "#565e70"),
    "bm25": ("#475067", "#b4bccd"),
    "dense": ("#2f6fed", "#6fa1ff"),
    "sparse": ("#d9790b", "#f7ac4b"),
    "colbert": ("#0e9384", "#3fd0bd"),
    "dense-sparse": ("#8b46e0", "#b98cff"),
    "all": ("#d92d63", "#ff7ba3"),
}
_THEMES = [";".join(f"--{name}:{pair[theme]}" for name, pair in PALETTE.items()) for theme in (0, 1)]
THEME = (
    f":root{{{_THEMES[0]};color-scheme:light dark}}@media(prefers-color-scheme:dark){{:root{{{_THEMES[1]}}}}}"
    "svg text{font-family:system-ui,-apple-system,'Segoe UI',Roboto,sans-serif!important}"
)
_LIGHT = {name: pair[0] for name, pair in PALETTE.items()}
_STYLE: dict[Any, Any] = {
    # Text stays text: it can be read aloud and searched, in the fonts of the reader.
    "svg.fonttype": "none",
    "svg.hashsalt": "m3jax",
    "figure.constrained_layout.h_pad": 0.08,
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": _LIGHT["ink"],
    "text.parse_math": False,
    "axes.facecolor": "none",
    "axes.edgecolor": _LIGHT["line"],
    "axes.labelcolor": _LIGHT["soft"],
    "axes.axisbelow": True,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "xtick.color": _LIGHT["line"],
    "xtick.labelcolor": _LIGHT["soft"],
    "ytick.labelcolor": _LIGHT["soft"],
    "ytick.left": False,
    "grid.color": _LIGHT["line"],
    "legend.frameon": False,
    "legend.borderaxespad": 0,
    "legend.handlelength": 1.3,
    "legend.columnspacing": 1.1,
    "lines.linewidth": 1.9,
    "lines.solid_capstyle": "round",
}
_DASHES = ("-", "--", ":", "-.")  # of curves of one colour
_ABREAST = 4  # names in a line of a legend
_WIDTH = 5.4  # inches: readable at the width of a phone, and two abreast on a desk


def colour_name(function: str) -> str:
    """The name in PALETTE of a row's or a curve's colour: a function's own, one for BM25, one for everything untrained.

    >>> colour_name("dense+sparse"), colour_name("before all"), colour_name("hybrid")
    ('dense-sparse', 'untrained', 'all')
    """
    known = {
        "BM25": "bm25",
        "dense+sparse": "dense-sparse",
        "hybrid": "all",
        "passages": "sparse",
        "encoder": "ink",
        "": "ink",
    }
    known = known.get(function, function).split("@")[0]
    if known.startswith(BEFORE):
        return "untrained"
    return known if known in PALETTE else "soft"


def _colour(function: str) -> str:
    return _LIGHT[colour_name(function)]


def series(metrics: Sequence[Mapping[str, float]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values, each [n], of the logged lines that have the key."""
    rows = [row for row in metrics if key in row]
    return np.array([row["step"] for row in rows]), np.array([row[key] for row in rows], float)


def smoothing_window(metrics: Sequence[Mapping[str, float]]) -> int:
    """How many logged values one point of a bold loss curve is the mean of: a fortieth of them."""
    return max(1, sum("loss" in row for row in metrics) // 40)


def _svg(figure: Figure) -> str:
    """The figure as one <svg> element whose colours are the variables of THEME."""
    buffer = StringIO()
    with warnings.catch_warnings():
        # The letters of a test set's name are drawn by the reader's own fonts, not by the one that matplotlib measures.
        warnings.filterwarnings("ignore", message="Glyph")
        no_metadata: dict[Any, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for name, light in _LIGHT.items():
        svg = svg.replace(light, f"var(--{name})")
    return svg


def standalone(svg: str) -> str:
    """The same picture as a file of its own, with its colours and the paper it is drawn on."""
    style = f"<style>{THEME}svg{{background:var(--paper)}}</style>"
    return re.sub(r"<svg[^>]*>", lambda tag: tag.group() + style, svg, count=1)


def _legend(axes: Axes, columns: int) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, fontsize=9)


def draw_loss(metrics: Sequence[Mapping[str, float]]) -> str | None:
    """The loss of each function and shorter vector by step, below it those against a teacher's scores and of self-distillation
    where there are some; or of stage 1's parts; None without.

    Here and in the next two, each logged value is thin, and the mean of the last `smoothing_window` of them bold; the axis is
    logarithmic where the values span more than a factor of ten.
    """
    shorter = dict.fromkeys(key.removeprefix("loss/") for row in metrics for key in row if re.match(r"loss/.+@\d", key))
    contrastive, masked = ("dense", "sparse", "colbert", "hybrid", *shorter), ("encoder", "decoder")
    panels = (
        ("loss", contrastive, "Contrastive loss"),
        ("teacher", contrastive, "Loss against the teacher's scores"),
        ("distill", contrastive, "Self-distillation loss"),
        ("loss", masked, "Masked-language loss"),
        ("dev", masked, "Masked-language loss on held-out texts"),
    )
    return _draw_panels(
        {title: {part: series(metrics, f"{prefix}/{part}") for part in parts} for prefix, parts, title in panels},
        smoothing_window(metrics),
    )


def draw_gradients(metrics: Sequence[Mapping[str, float]]) -> str | None:
    """The gradient's norm in the encoder and each head by step, and the terms with a weight a text; None without either."""
    return _draw_panels(
        {
            "Gradient norm": {
                part: series(metrics, f"gradient_norm/{part}") for part in ("encoder", "sparse", "colbert")
            },
            "Terms with a weight above 0, a text": {
                name: series(metrics, f"active_terms/{key}")
                for name, key in (("passages", "passage"), ("queries", "query"))
            },
        },
        smoothing_window(metrics),
    )


def draw_speed(metrics: Sequence[Mapping[str, float]]) -> str | None:
    """Tokens a second, model-FLOPs utilisation and padding by step; None where no step was timed."""
    tokens, utilisation, padding = (series(metrics, key) for key in ("tokens_per_second", "mfu", "padding"))
    return _draw_panels(
        {
            "Tokens a second, without padding": {"": tokens},
            "Model-FLOPs utilisation, %": {"": (utilisation[0], 100 * utilisation[1])},
            "Padding, % of the places in a batch": {"": (padding[0], 100 * padding[1])},
        },
        smoothing_window(metrics),
        from_zero=True,
    )


def _draw_panels(
    panels: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]], window: int, *, from_zero: bool = False
) -> str | None:
    """One picture of curves by step, {title: {name: (steps, values)}}, without what has no values; None if nothing has.

    A name "" is not shown.
    """
    panels = {title: {name: line for name, line in lines.items() if len(line[0])} for title, lines in panels.items()}
    panels = {title: lines for title, lines in panels.items() if lines}
    if not panels:
        return None
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 1.1 + 1.8 * len(panels)), layout="constrained")
        rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (title, lines) in zip(rows, panels.items(), strict=True):
            drawn: list[str] = []
            for name, (steps, values) in lines.items():
                dashes = _DASHES[drawn.count(_colour(name)) % len(_DASHES)]
                drawn.append(_colour(name))
                if window > 1:
                    axes.plot(steps, values, color=_colour(name), linewidth=0.8, alpha=0.28)
                size = min(window, len(values))
                mean = np.convolve(values, np.full(size, 1 / size), "valid")
                marker = "o" if len(mean) == 1 else ""
                axes.plot(steps[size - 1 :], mean, color=_colour(name), label=name, marker=marker, linestyle=dashes)
            finite = [value for _, values in lines.values() for value in values if math.isfinite(value)]
            if from_zero:
                axes.set_ylim(bottom=0)
            # At random weights the sparse loss starts far above the others and would press them flat.
            elif finite and max(finite) > 10 * min(finite) > 0:
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter("{x:g}")
                axes.minorticks_off()
            axes.grid(axis="y")
            named = any(lines)
            axes.set_title(title, pad=10 + 14 * math.ceil(len(lines) / _ABREAST) if named else None)
            if named:
                _legend(axes, min(len(lines), _ABREAST))
        rows[-1].set_xlabel("step")
        return _svg(figure)


def draw_dev(metrics: Sequence[Mapping[str, float]], functions: Sequence[str]) -> str | None:
    """nDCG@10 of each function on the development set by step; None if none was logged."""
    lines = {name: series(metrics, f"dev/{name}/ndcg_at_10") for name in functions}
    lines = {name: line for name, line in lines.items() if len(line[0])}
    if not lines:
        return None
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 2.9), layout="constrained")
        axes = figure.subplots()
        for name, (steps, values) in lines.items():
            axes.plot(steps, values, color=_colour(name), label=name, marker="o", markersize=3.5)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        axes.set_title("nDCG@10 on the development set", pad=24)
        axes.set_xlabel("step")
        _legend(axes, len(lines))
        return _svg(figure)


def draw_quality(sets: Mapping[str, Mapping[str, float]]) -> str | None:
    """nDCG@10 by test set, {set: {"BM25", a function or BEFORE + it: value}}; None if no set has a value.

    A row is a function: after training above before. BM25 is a row, and a dashed line through all of them.
    """
    sets = {name: values for name, values in sets.items() if values}
    if not sets:
        return None
    rows = {name: list(dict.fromkeys(label.removeprefix(BEFORE) for label in sets[name])) for name in sets}
    heights = [0.34 * len(rows[name]) + 0.35 for name in sets]
    highest = max(value for values in sets.values() for value in values.values())
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, sum(heights) + 0.5), layout="constrained")
        panels = figure.subplots(len(sets), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (name, values) in zip(panels, sets.items(), strict=True):
            for place, function in enumerate(rows[name]):
                if function in values:
                    value = values[function]
                    axes.barh(place - 0.12, value, 0.46, color=_colour(function))
                    end, style = (value, place - 0.1), {"fontsize": 9, "fontweight": "bold"}
                    axes.annotate(f"{value:.3f}", end, (4, 0), textcoords="offset points", va="center", **style)
                if (untrained := BEFORE + function) in values:
                    axes.barh(place + 0.27, values[untrained], 0.2, color=_colour(untrained))
            if "BM25" in values:
                axes.axvline(values["BM25"], color=_colour("BM25"), linewidth=1, linestyle=(0, (3, 3)))
            axes.set_yticks(range(len(rows[name])), rows[name])
            axes.tick_params(axis="y", labelcolor=_LIGHT["ink"])
            axes.set_ylim(len(rows[name]) - 0.5, -0.5)
            axes.set_xlim(0, 1.15 * highest if highest > 0 else 1)
            axes.grid(axis="x")
            axes.set_title(name)
        panels[-1].set_xlabel("nDCG@10")
        return _svg(figure)
