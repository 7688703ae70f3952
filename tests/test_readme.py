"""The README's own blocks: its Python runs on a model where the quickstart leaves one, its commands name what there is.

Not here: the outputs that it shows, which are the real quickstart's.
"""

import ast
import importlib
import importlib.util
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

import m3jax

ROOT = Path(__file__).parents[1]
NOT_RUN = "<!-- not run: needs the released weights -->"


class Block(NamedTuple):
    language: str
    line: int  # of the first line inside
    text: str
    mark: str  # the last line with text before it


def blocks(text):
    """The fenced blocks of a Markdown text."""
    found, before, inside = [], "", None
    for number, line in enumerate(text.splitlines(), 1):
        if inside is not None:
            if line.strip() == "```":
                language, start, lines = inside
                found.append(Block(language, start, "\n".join(lines) + "\n", before))
                inside, before = None, ""
            else:
                inside[2].append(line)
        elif line.startswith("```"):
            inside = (line.removeprefix("```").strip(), number + 1, [])
        elif line.strip():
            before = line.strip()
    assert inside is None, f"the block that opens before line {inside[1]} is never closed"
    return found


README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = blocks(README)
PYTHON = [block for block in BLOCKS if block.language == "python"]
RUN = [block for block in PYTHON if block.mark != NOT_RUN]


def commands(text):
    """The simple commands of shell lines, each as its words; comments and joined lines as a shell reads them."""
    joined = text.replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in joined.splitlines()]
    for words in lines:
        while "&&" in words:
            yield words[: words.index("&&")]
            words = words[words.index("&&") + 1 :]
        if words:
            yield words


SHELL = [words for block in BLOCKS if block.language == "sh" for words in commands(block.text)]


def test_the_blocks_are_found():
    text = "a\n<!-- b -->\n\n```python\nx = 1\n\n```\n```sh\na b \\\n  c && d # e\n```\n"
    assert blocks(text) == [
        Block("python", 5, "x = 1\n\n", "<!-- b -->"),
        Block("sh", 9, "a b \\\n  c && d # e\n", ""),
    ]
    assert list(commands("a b \\\n  c && d # e\n# f\n")) == [["a", "b", "c"], ["d"]]
    # If these were renamed there would be nothing below to fail.
    assert {block.language for block in BLOCKS} == {"python", "sh"}
    assert len(RUN) >= 2 and len(PYTHON) - len(RUN) == README.count(NOT_RUN) == 1
    assert any(words[:3] == ["python", "-m", "train.main"] for words in SHELL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    """A folder with a tiny model of random weights where the quickstart leaves one."""
    folder = tmp_path_factory.mktemp("readme")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = m3jax.M3Config.tiny(vocab_size=tiny_tokenizer.vocab_size, **sizes)
    (folder / "runs" / "quickstart").mkdir(parents=True)
    m3 = m3jax.M3(config, m3jax.init(config, jax.random.key(0)), tiny_tokenizer)
    m3jax.save(m3, folder / "runs" / "quickstart" / "model")
    return folder


@pytest.mark.parametrize("block", RUN, ids=lambda block: f"line {block.line}")
def test_python_runs(block, folder, monkeypatch):
    monkeypatch.chdir(folder)
    # Blank lines before it, so that a traceback names the README's own lines.
    exec(compile("\n" * (block.line - 1) + block.text, "README.md", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: f"line {block.line}")
def test_python_names_what_there_is(block):
    """Every m3jax.NAME exists, in blocks that need the released weights too."""
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "m3jax":
            assert node.attr in m3jax.__all__, f"README.md:{block.line + node.lineno - 1}: m3jax.{node.attr}"


@pytest.mark.parametrize("words", [words for words in SHELL if words[0] == "python"], ids=" ".join)
def test_programs_exist(words):
    assert words[1] == "-m" and importlib.util.find_spec(words[2]) is not None


@pytest.mark.parametrize("words", [words for words in SHELL if "train.main" in words], ids=" ".join)
def test_configs_and_keys_exist(words):
    name = words[words.index("--config") + 1]
    path = ROOT / name
    assert path.is_file() and path.parent.name == "configs"
    pytest.importorskip("ml_collections", reason="configurations need the train extra")
    config = importlib.import_module(f"configs.{path.stem}").get_config()
    keys = [word.removeprefix("--config.").split("=")[0] for word in words if word.startswith("--config.")]
    assert [key for key in keys if not _holds(config, key)] == []


def _holds(config, key):
    first, _, rest = key.partition(".")
    return first in config and (not rest or _holds(config[first], rest))


def test_the_tests_are_run_as_ci_runs_them():
    """The command that installs and tests is what .ci/run does, but for its own way of printing."""
    (line,) = [
        line for block in BLOCKS if block.language == "sh" for line in block.text.splitlines() if "pytest" in line
    ]
    assert line == 'pip install -e ".[test]" && pytest -n auto'
    printing = re.compile(r" (--quiet|--durations=\d+)")
    in_ci = [printing.sub("", command) for command in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()]
    places = [in_ci.index(command) for command in line.split(" && ")]
    assert places == sorted(places)


def test_links_lead_somewhere():
    """Every relative link and picture is a file of the repository."""
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)|<img[^>]* src=\"([^\"]+)\"", README)
    relative = [link for pair in links for link in pair if link and "://" not in link]
    assert relative
    assert [link for link in relative if not (ROOT / link).exists()] == []
