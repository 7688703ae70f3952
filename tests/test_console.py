"""What a terminal shows and what goes to the log file, by the channels that libraries use."""

import logging
import warnings

import pytest

pytest.importorskip("ml_collections", reason="training needs the train extra")

from configs import base
from train.console import describe, libraries_to, say


def warn_from(path, text, category=UserWarning):
    """A warning that was raised in the file `path`."""
    warnings.warn_explicit(text, category, str(path), 7)


def test_say(capsys):
    say("eine Zeile, 日本")
    assert capsys.readouterr() == ("eine Zeile, 日本\n", "")


def test_libraries_go_to_the_log(tmp_path, capfd):
    log = tmp_path / "log.txt"
    with warnings.catch_warnings(), libraries_to(log):
        warnings.simplefilter("always")
        logging.getLogger("some.library").warning("restoring from %s", "somewhere")
        logging.getLogger("some.library").info("told in passing")
        logging.getLogger("some.library").debug("too much")
        warn_from("/site-packages/some/library.py", "this will go away")
        warn_from(tmp_path / "train" / "data" / "builders.py", "use another call", DeprecationWarning)
        warn_from(tmp_path / "train" / "data" / "builders.py", "3 of 9 queries were cut")
        warn_from(tmp_path / "m3jax" / "embedder.py", "2 of 5 texts were cut")
    shown, errors = capfd.readouterr()
    assert shown == "warning: 3 of 9 queries were cut\nwarning: 2 of 5 texts were cut\n" and errors == ""
    lines = log.read_text(encoding="utf-8").splitlines()
    for line, part in zip(
        lines,
        (
            "WARNING some.library: restoring from somewhere",
            "INFO some.library: told in passing",
            "/site-packages/some/library.py:7: UserWarning: this will go away",
            "DeprecationWarning: use another call",
            "3 of 9 queries were cut",
            "2 of 5 texts were cut",
        ),
        strict=True,
    ):
        assert part in line


def test_all_is_as_before_afterwards(tmp_path, capfd):
    root = logging.getLogger()
    before = root.handlers[:], root.level, warnings.showwarning
    with pytest.raises(ZeroDivisionError), libraries_to(tmp_path / "log.txt"):
        raise ZeroDivisionError
    assert (root.handlers[:], root.level, warnings.showwarning) == before
    logging.getLogger("some.library").warning("after")
    assert "after" not in (tmp_path / "log.txt").read_text()


def test_a_second_run_appends(tmp_path):
    for text in ("first", "second"):
        with libraries_to(tmp_path / "log.txt"):
            logging.getLogger("some.library").warning(text)
    assert [line.split()[-1] for line in (tmp_path / "log.txt").read_text().splitlines()] == ["first", "second"]


def test_describe():
    config = base.get_config()
    config.update(name="mine", output="runs/mine", steps=12345, length_groups=((64, 128), (512, 32)), group_size=8)
    config.data.train = "rows.jsonl"
    text = describe(config, "M3(1 layers × 16)", 54321, 1)
    for part in (
        "mine: M3(1 layers × 16), from random weights",
        "54,321 rows of rows.jsonl",
        "128 × 8 up to 64 tokens, 32 × 8 up to 512 tokens on 1 device\n",
        "12,345 steps, learning rate 1e-05, temperature 0.02, self-distillation from step 6000",
        "runs/mine",
    ):
        assert part in text
    config.update(init_from="bge-m3", distill_start=-1, teacher="group")
    text = describe(config, "M3()", 1, 8)
    for part in ("from bge-m3", "no self-distillation, teacher's scores by group", "8 devices"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 120 and len(text.splitlines()) <= 6
