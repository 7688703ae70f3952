"""The results of a run as text for a terminal: durations, the table, and the worked example with its matched terms marked.

Not here: the page with pictures (report.py).
"""

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from train.results import BEFORE, METRICS, cells_of, names_of, ndcg_of, notes_of


def format_duration(seconds: float) -> str:
    """
    >>> format_duration(3.14), format_duration(75), format_duration(7380)
    ('3.1 s', '1 min 15 s', '2 h 3 min')
    """
    if seconds < 59.5:
        return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def format_table(results: Mapping[str, Any]) -> str:
    """The evaluations as aligned text: nDCG@10 and Recall@100 of each test set; "" if there are none.

    >>> scores = {"bm25": {"ndcg_at_10": 0.25}, "all": {"ndcg_at_10": 0.875, "recall_at_100": 1.0}}
    >>> print(format_table({"evaluations": [{"name": "test", "model": "trained", "scores": scores}]}))
          test
          nDCG@10  Recall@100
    BM25    0.250           –
    all     0.875       1.000
    """
    cells, names = cells_of(results), names_of(results)
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
    return "\n".join([*lines, *notes_of(results)])


def format_changes(results: Mapping[str, Any]) -> str:
    """What training changed of nDCG@10, as aligned text: of each function and test set what was gained (or forgotten, below 0);
    "" where nothing was measured before it.

    >>> rows = [("trained", 0.5), ("untrained", 0.25)]
    >>> scores = [{"name": "test", "model": m, "scores": {"all": {"ndcg_at_10": x}}} for m, x in rows]
    >>> print(format_changes({"evaluations": scores}))
    nDCG@10, after − before
           test
    all  +0.250
    """
    tests = ndcg_of(results)
    changes = {
        function: [_change(of, function) for of in tests.values()]
        for function in dict.fromkeys(label for of in tests.values() for label in of if BEFORE + label in of)
    }
    if not changes:
        return ""
    first = max(map(len, changes))
    widths = [max(6, len(name)) for name in tests]
    lines = [" " * first + "".join(f"  {name:>{width}}" for name, width in zip(tests, widths, strict=True))]
    for function, of in changes.items():
        lines.append(f"{function:<{first}}" + "".join(f"  {x:>{width}}" for x, width in zip(of, widths, strict=True)))
    return "\n".join(["nDCG@10, after − before", *lines])


def _change(values: Mapping[str, float], function: str) -> str:
    before = values.get(BEFORE + function)
    return "–" if before is None or function not in values else f"{values[function] - before:+.3f}"


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


def mark_terms(text: str, matched: Sequence[str], mark: Callable[[str], str], plain: Callable[[str], str]) -> str:
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
            text = mark_terms(_one_line(top["text"]), [_one_line(t) for t in top.get("matched", [])], mark, str)
            lines.append(f"  {rank}  {top['score']:.3f}  {'✓' if top.get('relevant') else ' '}  {text}")
    return "\n".join(lines)
