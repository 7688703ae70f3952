"""The report of invented runs: complete, without an example or an evaluation, broken, hostile, resumed.

How the page looks is not tested here: a person has to look at it.
"""

import copy
import json
import math
import os
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from train.report import FUNCTIONS, write_report

THAI = "คีเนีย: สวาฮิลี และ อังกฤษ; ชิลลิงเคนยา"
TRAINED = {
    "bm25": {"ndcg_at_10": 0.147, "recall_at_100": 0.402},
    **{name: {"ndcg_at_10": 0.7 + 0.03 * place, "recall_at_100": 0.9} for place, name in enumerate(FUNCTIONS)},
}
UNTRAINED = {name: {"ndcg_at_10": 0.011, "recall_at_100": 0.05} for name in FUNCTIONS}
RESULTS = {
    "name": "quickstart",
    "date": "2026-02-11T14:03:22",
    "config": {"model": {"width": 192, "layers": 4}, "train": {"steps": 120, "temperature": 0.02}},
    "parameters": 3_214_592,
    "seconds": {"prepare": 21.4, "compile": 33, "train": 151.2, "evaluate": 8.1, "total": 213.7},
    "hardware": "2 CPU cores",
    "versions": {"jax": "0.10.2"},
    "commands": ["python -m m3jax encode --model runs/quickstart/model"],
    "model": "runs/quickstart/model",
    "evaluations": [
        {"name": "test", "model": "trained", "queries": 1500, "passages": 5400, "warnings": [], "scores": TRAINED},
        {"name": "test", "model": "untrained", "queries": 1500, "passages": 5400, "scores": UNTRAINED},
    ],
    "example": {
        "query": "shilingi ya Kenya",
        "language": "Swahili",
        "tops": {
            "dense": [{"text": THAI, "score": 0.913, "relevant": True, "matched": []}],
            "sparse": [{"text": "Kenya: shilingi", "score": 0.4, "relevant": True, "matched": ["▁Ken", "ya"]}],
            "colbert": [{"text": "Uganda", "score": 0.6, "relevant": False, "matched": []}],
        },
    },
}


def _metrics(steps: int = 120) -> list[dict[str, float]]:
    rows = []
    for step in range(1, steps + 1):
        loss = 0.3 + 5 * math.exp(-step / 30)
        row = {"step": step, "seconds": step / 4, "loss": loss, "gradient_norm": 2.0}
        row |= {"tokens_per_second": 41_000.0, "padding": 0.25, "mfu": 0.5}
        row |= {f"gradient_norm/{part}": loss for part in ("encoder", "sparse", "colbert")}
        row |= {"active_terms/query": 3.0, "active_terms/passage": 11.0}
        row |= {f"loss/{name}": loss for name in ("dense", "sparse", "colbert", "hybrid")}
        if step > 40:
            row |= {f"distill/{name}": loss for name in ("dense", "sparse", "colbert")}
        rows.append(row)
        if step % 40 == 0:
            rows.append({"step": step, "seconds": step / 4} | {f"dev/{name}/ndcg_at_10": 0.5 for name in FUNCTIONS})
    return rows


def _run(directory: Path, results: object = RESULTS, metrics: list[dict[str, float]] | None = None) -> Path:
    rows = _metrics() if metrics is None else metrics
    (directory / "results.json").write_text(json.dumps(results, ensure_ascii=False), encoding="utf-8")
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return directory


class _Page(HTMLParser):
    """Text, tags, attributes and identifiers of a page; unbalanced tags raise."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + " "


def _read(directory: Path) -> tuple[str, _Page]:
    html = (directory / "report.html").read_text(encoding="utf-8")
    return html, _Page(html)


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a complete run, report written."""
    directory = _run(tmp_path_factory.mktemp("run"))
    assert write_report(directory) == directory / "report.html"
    return directory


def test_page_holds_what_a_person_must_see(complete: Path):
    _, page = _read(complete)
    for text in (
        "quickstart",
        "3.2 million parameters",
        "120 steps",
        "3 min 34 s",
        "2 CPU cores",
        "2026-02-11 14:03:22",
    ):
        assert text in page.text
    for text in ("0.820", "0.147", "0.011", "5.58 × BM25", "1,500 queries, 5,400 passages", "Self-distillation loss"):
        assert text in page.text
    for text in (
        "Swahili",
        THAI,
        "0.913",
        RESULTS["commands"][0],
        "runs/quickstart/model",
        "train.temperature",
        "0.10.2",
    ):
        assert text in page.text
    for text in (
        "Gradient norm",
        "encoder",
        "Terms with a weight above 0",
        "Tokens a second",
        "Padding, %",
        "utilisation, %",
    ):
        assert text in page.text
    assert page.tags.count("svg") == 5
    assert page.text.count("all: the weighted sum, which teaches the others.") == 1


def test_the_teacher_is_the_sum_of_what_is_trained_and_nothing_where_none_teaches(tmp_path: Path):
    def caption(*kept: str) -> str:
        rows = [{key: row[key] for key in row if key == "step" or key.startswith(kept)} for row in _metrics()]
        write_report(_run(tmp_path, metrics=[row for row in rows if len(row) > 1]))
        return _read(tmp_path)[1].text

    assert "dense+sparse: the weighted sum, which teaches the others." in caption("distill/", "dev/dense")
    assert "which teaches" not in caption("distill/", "dev/dense/") + caption("loss", "dev/")


def test_shorter_vectors_and_the_teacher_s_scores_have_curves(tmp_path: Path):
    rows: list[dict[str, float]] = [
        {"step": step, "loss": 1.0, "loss/dense": 1.0, "loss/dense@64": 1.2, "loss/dense@32": 1.4, "teacher/dense": 0.7}
        for step in range(1, 9)
    ]
    write_report(_run(tmp_path, metrics=rows))
    page = _read(tmp_path)[1]
    for text in ("Contrastive loss", "dense@64", "dense@32", "Loss against the teacher's scores"):
        assert text in page.text
    dashed = [value for name, value in page.attributes if name == "style" and value and "stroke-dasharray" in value]
    assert len(dashed) >= 1  # the second of one colour
    assert "Self-distillation" not in page.text


def test_page_needs_nothing_but_itself(complete: Path):
    html, page = _read(complete)
    assert not {"script", "link", "img", "iframe", "image", "base"} & set(page.tags)
    assert "url(" not in re.sub(r"url\(#[\w-]+\)", "", html) and "@import" not in html
    for name, value in page.attributes:
        assert not name.startswith("on") and name != "src"
        assert not name.endswith("href") or (value or "").startswith("#")
    identifiers = [value for name, value in page.attributes if name == "id"]
    # matplotlib names the parts of every picture alike; in one page each reference must still find its own.
    assert len(identifiers) == len(set(identifiers))
    assert set(re.findall(r"url\(#([\w-]+)\)", html)) <= set(identifiers)
    assert {value[1:] for name, value in page.attributes if name == "xlink:href" and value} <= set(identifiers)


def test_pictures_are_files_of_their_own(complete: Path):
    texts = {}
    for path in sorted((complete / "pictures").iterdir()):
        root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
        texts[path.name] = " ".join(element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text"))
        used = set(re.findall(r"var\(--([\w-]+)\)", path.read_text()))
        assert "ink" in used and all(f"--{name}:" in path.read_text() for name in used)
    assert sorted(texts) == ["dev.svg", "gradients.svg", "loss.svg", "quality.svg", "speed.svg"]
    assert "Contrastive loss" in texts["loss.svg"] and "hybrid" in texts["loss.svg"]
    assert all(name in texts["dev.svg"].split() for name in FUNCTIONS)
    assert "0.147" in texts["quality.svg"] and "0.820" in texts["quality.svg"]


def test_same_run_gives_the_same_bytes_and_leaves_nothing_else(tmp_path: Path):
    first = write_report(_run(tmp_path)).read_bytes()
    assert write_report(tmp_path).read_bytes() == first
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "pictures", "report.html", "results.json"]
    assert len(os.listdir(tmp_path / "pictures")) == 5


def test_absent_parts_are_left_out(tmp_path: Path):
    write_report(_run(tmp_path))
    write_report(_run(tmp_path, {"name": "bare", "evaluations": [], "example": None}, []))
    _, page = _read(tmp_path)
    assert "bare" in page.text and "0.000" not in page.text
    assert not {"svg", "table", "h2"} & set(page.tags)
    assert os.listdir(tmp_path / "pictures") == []


def test_absent_scores_have_no_bar(tmp_path: Path):
    results = copy.deepcopy(RESULTS)
    hard = {"dense": {"ndcg_at_10": 0.5}, "all": {"ndcg_at_10": 0.4321}}
    results["evaluations"].append({"name": "unseen", "model": "trained", "scores": hard})
    write_report(_run(tmp_path, results))
    picture = (tmp_path / "pictures" / "quality.svg").read_text()
    assert picture.count(">0.147<") == 1 and picture.count(">0.432<") == 1 and "0.000" not in picture


def test_below_bm25_and_a_broken_loss_are_said(tmp_path: Path):
    results = copy.deepcopy(RESULTS)
    results["evaluations"][0]["scores"]["bm25"]["ndcg_at_10"] = 0.95
    results["evaluations"][0]["warnings"] = ["3 queries without a relevant passage"]
    metrics = _metrics(10)
    metrics[6]["loss"] = metrics[6]["loss/dense"] = math.nan
    write_report(_run(tmp_path, results, metrics))
    _, page = _read(tmp_path)
    assert "Below BM25: 0.86 × it" in page.text
    assert "not a finite number at 1 of 10 logged steps" in page.text and "first at step 7" in page.text
    assert "test: warning: 3 queries without a relevant passage" in page.text


def test_everything_is_escaped(tmp_path: Path):
    evil = '<script>alert("x")</script>&$_$'
    results = json.loads(json.dumps(RESULTS).replace("test", "NAME"))
    for key in ("name", "date", "hardware", "model"):
        results[key] = evil
    results |= {"config": {evil: evil}, "versions": {evil: evil}, "commands": [evil]}
    for evaluation in results["evaluations"]:
        evaluation |= {"name": evil, "warnings": [evil]}
        evaluation["scores"][evil] = {"ndcg_at_10": 0.2, "recall_at_100": 0.2}
    top = {"text": f"a {evil}", "score": 1.0, "matched": ["<script>", evil, "absent<b>"]}
    results["example"] = {"query": evil, "language": evil, "tops": {evil: [top]}}
    write_report(_run(tmp_path, results, [{"step": 1, evil: 1.0, "loss": 1.0}]))
    html, page = _read(tmp_path)
    assert "<script" not in html and "script" not in page.tags and "absent<b>" in page.text
    assert page.text.count("alert(") >= 14
    ElementTree.fromstring((tmp_path / "pictures" / "quality.svg").read_text())


@pytest.mark.filterwarnings("error")
def test_names_in_any_script_reach_the_picture(tmp_path: Path):
    write_report(_run(tmp_path, json.loads(json.dumps(RESULTS).replace('"test"', '"ชุดทดสอบ"'))))
    assert "ชุดทดสอบ" in (tmp_path / "pictures" / "quality.svg").read_text(encoding="utf-8")


def test_a_resumed_run_counts_the_later_line(tmp_path: Path):
    old = [{"step": step, "loss": 9.0, "loss/dense": 9.0} for step in (1, 2, 3)]
    new = [{"step": step, "loss": 7.0, "loss/dense": 7.0} for step in (2, 3, 4)]
    write_report(_run(tmp_path, RESULTS, old + new))
    _, page = _read(tmp_path)
    row = re.search(r"loss/dense\s+(\S+)\s+(\S+)\s+(\S+)", page.text)
    assert row and row.groups() == ("9", "7", "7") and "4 steps" in page.text


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("results.json", None, r"results\.json: expected a file"),
        ("metrics.jsonl", None, r"metrics\.jsonl: expected a file"),
        ("results.json", b"\xff\xfe", r"results\.json: must be UTF-8; byte 0 is not"),
        ("results.json", b'{"name": ', r"results\.json: must be one JSON object; Expecting value"),
        ("results.json", b"[]", r"results\.json: must be one JSON object; \[\] came"),
        ("results.json", b'{"date": "2026"}', r"results\.json: expected the keys \['name'\]"),
        ("results.json", b'{"name": 3}', r"results\.json: name: expected a value of type str, got 3"),
        ("results.json", b'{"name": "a", "parameters": true}', r"parameters: expected a value of type int, got True"),
        ("results.json", b'{"name": "a", "seconds": {"total": NaN}}', r"seconds\['total'\]: expected a finite number"),
        (
            "results.json",
            b'{"name": "a", "evaluations": [{"name": "t", "model": "best", "scores": {}}]}',
            r"evaluations\[0\]: model: expected one of \('trained', 'untrained'\), got 'best'",
        ),
        (
            "results.json",
            b'{"name": "a", "example": {"query": "q", "tops": {"dense": [{"text": "t"}]}}}',
            r"example: tops\['dense'\]\[0\]: expected the keys \['score'\]",
        ),
        ("metrics.jsonl", b'{"step": 1}\n{"step": 2, "lo', r"metrics\.jsonl:2: must be one JSON object; Unterminated"),
        ("metrics.jsonl", b'{"step": 1}\n\n{"loss": 2}\n', r"metrics\.jsonl:3: expected an integer 'step', got None"),
        ("metrics.jsonl", b'{"step": 1, "loss": "2"}\n', r"metrics\.jsonl:1: expected a number in 'loss', got '2'"),
    ],
)
def test_a_broken_or_missing_file_is_named(tmp_path: Path, file: str, content: bytes | None, says: str):
    _run(tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=says):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_one_evaluation_twice_is_refused(tmp_path: Path):
    results = {"name": "a", "evaluations": [RESULTS["evaluations"][0]] * 2}
    with pytest.raises(ValueError, match=r"results\.json: .*'test', 'trained'.* twice"):
        write_report(_run(tmp_path, results))


def test_an_interrupted_report_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    page = write_report(_run(tmp_path))
    before = page.read_bytes()

    def interrupted(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    _run(tmp_path, {"name": "second"}, [])
    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_report(tmp_path)
    assert page.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "pictures", "report.html", "results.json"]
