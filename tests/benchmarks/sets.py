"""Files of training rows and evaluation folders out of DATA, which has load.py and its sets/: for qa.py and xquad.py."""

import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def load_py(data: Path) -> Any:
    """DATA/load.py as a module."""
    spec = importlib.util.spec_from_file_location("load", data / "load.py")
    assert spec and spec.loader
    load = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(load)
    return load


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_task(load: Any, task: str, folder: Path) -> None:
    """A task as the folder that `train.evaluate --task custom` and data.dev take."""
    corpus, queries, qrels = load.load_task(task)
    write(folder / "corpus.jsonl", ({"id": id, "title": "", "text": text} for id, text in corpus.items()))
    write(folder / "test_queries.jsonl", ({"id": id, "text": text} for id, text in queries.items()))
    judged = ({"qid": q, "docid": d, "relevance": r} for q, of in qrels.items() for d, r in of.items())
    write(folder / "test_qrels.jsonl", judged)
