"""Training rows, texts and evaluation folders of RESULTS.md's figures for questions → passages in 26 languages.

`python tests/benchmarks/qa.py DATA OUT [OTHER CODE …]`: DATA has load.py and its sets/. What is written: OUT/rows/*.jsonl
(questions with up to 7 negatives, XQuAD's, parallel sentences), OUT/texts.jsonl (their passages, each once, for stage 1),
OUT/tokenizer.json (16,384 pieces for them: over XLM-R's 250,002 the logits of stage 1 are 15 times as many),
OUT/dev/LANGUAGE and OUT/test/LANGUAGE. What is of the languages CODE goes to the folder OTHER in place of OUT.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # before this folder, whose train.py is another

from sets import load_py, write_one

from train.data.cldr import train_tokenizer
from train.files import write_lines

PIECES = 16384
PARALLEL = ("xquad-x2en", "tatoeba", "ntrex-x2en")


def main(data: Path, out: Path, other: Path | None, codes: list[str]) -> None:
    load = load_py(data)
    texts: dict[Path, dict[str, None]] = {}
    names = sorted(path.name.split(".ids.")[0] for path in (data / "sets" / "train").glob("qa.*.ids.jsonl.gz"))
    for name in (*names, *PARALLEL):
        folder = other if other and name.removeprefix("qa.") in codes else out
        rows = list(load.training_rows(name))
        write_lines(folder / "rows" / f"{name}.jsonl", rows)
        texts.setdefault(folder, {}).update(dict.fromkeys(text for row in rows for text in (*row["pos"], *row["neg"])))
        print(f"{len(rows):,} rows of {name}")
    for folder, found in texts.items():
        write_lines(folder / "texts.jsonl", ({"text": text} for text in found))
        train_tokenizer([*found], PIECES).save(str(folder / "tokenizer.json"))
    for task in load.tasks("qa"):
        _, code, split = task["task"].split("/")
        write_one(load, task["task"], (other if other and code in codes else out) / split / code)


if __name__ == "__main__":
    data, out, *rest = sys.argv[1:]
    main(Path(data), Path(out), Path(rest[0]) if rest else None, rest[1:])
