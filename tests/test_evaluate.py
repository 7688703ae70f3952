"""The program that measures a model on folders: what it prints, writes, chooses and refuses."""

import json
import re
import shutil

import pytest

import m3jax
import train.evaluate
from train.evaluate import main


def test_the_program_prints_the_table_and_writes_the_files(tiny_model, task_folder, tmp_path, monkeypatch, capsys):
    loaded = []
    monkeypatch.setattr(m3jax, "load", lambda directory: loaded.append(directory) or tiny_model)
    arguments = ["--model", "somewhere", "--task", "custom", "--data", str(task_folder)]
    main([*arguments, "--output", str(tmp_path / "out"), "--max_length", "100"])
    assert loaded == ["somewhere"]
    printed = capsys.readouterr().out
    assert [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")] == [
        *("", "BM25", "dense", "sparse", "colbert", "dense+sparse", "all")
    ]
    assert (tmp_path / "out" / "results.md").read_text(encoding="utf-8") == printed
    assert len((tmp_path / "out" / "all.run").read_text(encoding="utf-8").splitlines()) == 2 * 3

    # Two folders of one name: told apart by their paths, each with its own files, and the mean of both.
    other = tmp_path / "other" / task_folder.name
    shutil.copytree(task_folder, other)
    main([*arguments, str(other), "--output", str(tmp_path / "both")])
    assert "mean of 2 tasks: 4 queries" in capsys.readouterr().out
    written = sorted(path.parent.name for path in (tmp_path / "both").glob("*/all.run"))
    assert len(written) == 2 and all(name.endswith(f"-{task_folder.name}") for name in written)
    single = json.loads((tmp_path / "out" / "results.json").read_text())["scores"]
    assert json.loads((tmp_path / "both" / "results.json").read_text())["scores"] == single

    with pytest.raises(SystemExit, match=r"error: each folder is measured once"):
        main([*arguments, str(task_folder)])
    with pytest.raises(SystemExit, match=r"error: .* fit the position table"):
        main([*arguments, "--max_length", "100000"])
    (task_folder / "test_qrels.jsonl").write_text("{}\n")
    loaded.clear()
    with pytest.raises(SystemExit, match=r"error: .*test_qrels.jsonl:1: expected"):
        main(arguments)
    assert loaded == []  # bad data is said before a model is read


def test_the_program_takes_weights_or_chooses_them_elsewhere(tiny_model, task_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(m3jax, "load", lambda directory: tiny_model)
    arguments = ["--model", "somewhere", "--task", "custom", "--data", str(task_folder)]
    main([*arguments, "--weights", "0.2,0.8", "0.15,0.5,0.35"])
    assert "0.2, 0.8, 0 in dense+sparse; 0.15, 0.5, 0.35 in all." in capsys.readouterr().out
    main([*arguments, "--weights", "0,1,0"])
    assert "1, 0.3, 0 in dense+sparse; 0, 1, 0 in all." in capsys.readouterr().out

    dev = shutil.copytree(task_folder, tmp_path / "dev")
    chosen = {"dense+sparse": ((0.1, 1.0, 0.0), 0.25), "all": ((0.0, 0.03, 1.0), 0.5)}
    asked = []

    def choose(by, encoded, *, rerank):
        asked.append((by, [(task.name, len(queries), len(passages)) for task, queries, passages in encoded], rerank))
        return chosen[by]

    monkeypatch.setattr(train.evaluate, "choose_weights", choose)
    main([*arguments, "--choose_weights", str(dev), "--rerank", "300", "--output", str(tmp_path / "out")])
    assert asked == [(by, [("dev", 2, 3)], 300) for by in ("dense+sparse", "all")]
    printed = capsys.readouterr().out
    assert "chosen on dev:\n  0.1, 1, 0 in dense+sparse: nDCG@10 0.250 there\n" in printed
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["weights"] == {by: list(weights) for by, (weights, _) in chosen.items()}

    with pytest.raises(SystemExit, match=r"chosen on other queries than they are measured on, got .*demo"):
        main([*arguments, "--choose_weights", str(dev), str(dev / ".." / "demo")])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--weights", "1"], "expected two numbers .* got '1'"),
        (["--weights", "1,x,1"], "got '1,x,1'"),
        (["--weights", "1,nan,1"], "finite and not all 0, got '1,nan,1'"),
        (["--weights", "0,0,0"], "not all 0"),
        (["--weights", "1,1,1", "1,2,1"], "three once"),
        (["--weights", "1,1,1", "--choose_weights", "dev"], "not allowed with"),
        (["--weights", "1,1,1", "--functions", "dense"], "all is not among --functions"),
        (["--choose_weights", "dev", "--functions", "dense", "all"], "dense\\+sparse is not among --functions"),
    ],
)
def test_weights_that_mean_nothing_are_refused(given, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--model", "nowhere", "--task", "custom", "--data", "nowhere", *given])
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
