"""Places in errors, and files that are there only when they are whole."""

import gzip
from pathlib import Path

import pytest

from train.files import parse_object, read_lines, write_json, write_whole


def test_lines_have_their_place_and_only_a_newline_ends_one(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"b": "\xe2\x80\xa8"}')
    expected = [(f"{path}:1", b'{"a": 1}\n'), (f"{path}:3", b'{"b": "\xe2\x80\xa8"}')]
    assert list(read_lines(path)) == expected
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert [line for _, line in read_lines(packed)] == [line for _, line in expected]


@pytest.mark.parametrize("cut", [slice(0, -4), slice(3, None), slice(0, 14)])
def test_a_gzip_file_that_is_not_whole(tmp_path: Path, cut: slice):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n' * 100)[cut])
    with pytest.raises(ValueError, match=r"rows\.jsonl\.gz: not a whole gzip file"):
        list(read_lines(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "must be one JSON object; Expecting property name .* at character 2"),
        (b"[1]", r"must be one JSON object; \[1\] came"),
        (b'{"a": "\xff"}', "must be UTF-8; byte 7 is not"),
        (b'{"a": [{"b\\ud800": 1}]}', r"valid Unicode; lone surrogate '\\ud800' came"),
    ],
)
def test_what_is_no_object(text: bytes, message: str):
    with pytest.raises(ValueError, match=message):
        parse_object(text)


def test_a_surrogate_pair_is_a_character():
    assert parse_object(b'{"a": "\\ud83d\\ude42"}') == {"a": "🙂"}


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "results.json"
    write_json(path, {"a": (1, "ü")})
    before = path.read_text(encoding="utf-8")
    assert before == '{\n "a": [\n  1,\n  "ü"\n ]\n}\n'

    def interrupted(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "new")
    assert path.read_text(encoding="utf-8") == before
    assert list(tmp_path.iterdir()) == [path]
