import gzip
import json

import pytest

import train.data.held_out
from train.data.builders import prepare
from train.data.held_out import MOST_PASSAGES, hold_out
from train.data.rows import own_group
from train.tasks import read_task


def rows_file(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def twenty(name="a", **more):
    return [{"query": f"{name} {n}", "pos": [f"{name} pos {n}"], "neg": [f"neg {n}"]} | more for n in range(20)]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_no_query_that_is_measured_is_trained_and_no_row_is_lost(tmp_path):
    # Two rows of one query stand in different datasets: they go together.
    again = [row | {"pos": [f"another of {row['query']}"]} for row in twenty()]
    paths = [rows_file(tmp_path / "one.jsonl", twenty()), rows_file(tmp_path / "two" / "x.jsonl", again)]
    train, folder = hold_out([paths[0], tmp_path / "two"], tmp_path / "data", share=0.25, seed=0)
    kept = [read(train[0]), read(train[1] / "rows.jsonl")]
    task = read_task(folder)
    assert len(task.queries) == 5 and [len(rows) for rows in kept] == [15, 15]
    trained = {row["query"] for rows in kept for row in rows}
    assert trained | {*task.queries.values()} == {row["query"] for row in twenty()} and not trained & {
        *task.queries.values()
    }
    assert kept[0] == [row for row in twenty() if row["query"] in trained]  # in their order, as they were
    for id, text in task.queries.items():
        number = text.split()[1]
        assert {task.corpus[p] for p in task.qrels[id]} == {f"a pos {number}", f"another of a {number}"}
    every = {text for row in (*twenty(), *again) for text in (*row["pos"], *row["neg"])}
    assert {*task.corpus.values()} == every and len(task.corpus) == len(every)


def test_files_of_a_folder_whose_names_differ_by_gz_alone_keep_their_rows(tmp_path):
    rows_file(tmp_path / "rows" / "a.jsonl", twenty())
    rows_file(tmp_path / "rows" / "a.jsonl.gz", twenty("b"))
    (train,), folder = hold_out([tmp_path / "rows"], tmp_path / "data", share=0.05, seed=0)
    held = {*read_task(folder).queries.values()}
    assert len(held) == 2
    assert read(train / "rows.jsonl") == [row for row in twenty() + twenty("b") if row["query"] not in held]


def test_a_pair_the_other_way_round_is_not_trained(tmp_path):
    """As parallel sentences come; of two rows for one query with other prompts, both are held out."""
    pairs = [{"query": f"cat {n}", "pos": [f"chat {n}"]} for n in range(20)]
    prompted = [row | {"prompt": "find: "} for row in pairs]
    back = [{"query": row["pos"][0], "pos": ["le chat", row["query"]]} for row in pairs]
    path = rows_file(tmp_path / "rows.jsonl", pairs + prompted + back)
    for _ in range(2):  # each time, as what is left out is not seen in what it finds again
        with pytest.warns(UserWarning) as caught:
            (train,), folder = hold_out([path], tmp_path / "data", share=0.1, seed=0)
        task = read_task(folder)
        held = {text.removeprefix("find: ") for text in task.queries.values()}
        assert len(held) == 4
        cats = {text for text in held if text.startswith("cat")}
        of = {text for row in pairs if {row["query"], row["pos"][0]} & held for text in (row["query"], row["pos"][0])}
        assert len(task.queries) == 4 + len(cats) and {row["query"] for row in read(train)}.isdisjoint(of)
        assert len(read(train)) == 60 - 3 * len(of) // 2
        left_out = 60 - len(read(train)) - 2 * len(cats) - (4 - len(cats))
        assert [str(w.message) for w in caught] == [
            f"{left_out} rows are left out of training: they are pairs that are held out, the other way round."
        ]


def test_the_draw_depends_on_the_seed_and_on_nothing_else(tmp_path):
    path = rows_file(tmp_path / "rows.jsonl", twenty())
    backwards = rows_file(tmp_path / "backwards.jsonl", twenty()[::-1])

    def held(path, seed, where="data"):
        return {*read_task(hold_out([path], tmp_path / where, share=0.25, seed=seed)[1]).queries.values()}

    assert held(path, 0) == held(path, 0) == held(path, 0, "elsewhere") == held(backwards, 0) != held(path, 1)


def test_it_is_written_once_and_whole(tmp_path, monkeypatch):
    path = rows_file(tmp_path / "rows.jsonl", twenty())
    (tmp_path / "data").mkdir()
    first = hold_out([path], tmp_path / "data", share=0.1, seed=0)
    monkeypatch.setattr("train.data.held_out._write", None)
    assert hold_out([path], tmp_path / "data", share=0.1, seed=0) == first
    monkeypatch.undo()
    rows_file(path, twenty("b"))
    (whole,) = (tmp_path / "data").iterdir()
    monkeypatch.setattr("train.data.held_out._write_task", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hold_out([path], tmp_path / "data", share=0.1, seed=0)
    monkeypatch.undo()
    train, folder = hold_out([path], tmp_path / "data", share=0.1, seed=0)  # over what the broken one left
    assert whole not in folder.parents and len(read(train[0])) == 18 and read_task(folder).queries
    assert not list((tmp_path / "data").glob("*.partial"))


def test_names_that_mean_something_and_gzip_are_kept(tmp_path, tiny_tokenizer):
    rows = [row | {"prompt": "find: "} for row in twenty()]
    path = rows_file(tmp_path / "x_no_in_batch_neg.jsonl.gz", rows)
    (train,), folder = hold_out([path], tmp_path / "data", share=0.1, seed=0)
    assert own_group(train) and all(text.startswith("find: a ") for text in read_task(folder).queries.values())
    source = prepare([train], tiny_tokenizer, data_dir=tmp_path / "rows", query_max_length=16, passage_max_length=16)
    assert len(source) == 18 and source.datasets[0].own_group


def test_a_renamed_file_is_another(tmp_path):
    """What is found again has the name that the path has, that of a link too."""
    path = rows_file(tmp_path / "rows.jsonl", twenty())
    hold_out([path], tmp_path / "data", share=0.1, seed=0)
    (tmp_path / "folder").mkdir()
    link = tmp_path / "x_no_in_batch_neg.jsonl"
    link.symlink_to(path)
    (train,), _ = hold_out([link], tmp_path / "data", share=0.1, seed=0)
    assert own_group(train) and len(read(train)) == 18
    for other in (path.rename(tmp_path / "folder" / "renamed.jsonl"), tmp_path / "folder"):
        (train,), _ = hold_out([other], tmp_path / "data", share=0.1, seed=0)
        assert train.name == other.name and train.exists()


def test_one_that_is_there_already_stays(tmp_path, monkeypatch):
    """Another run wrote it meanwhile."""
    path = rows_file(tmp_path / "rows.jsonl", twenty())
    write = train.data.held_out._write

    def slowly(*arguments):
        monkeypatch.undo()
        found.extend(hold_out([path], tmp_path / "data", share=0.1, seed=0))
        write(*arguments)

    found = []
    monkeypatch.setattr("train.data.held_out._write", slowly)
    assert [*hold_out([path], tmp_path / "data", share=0.1, seed=0)] == found and read(found[0][0])
    assert not list((tmp_path / "data").glob("*.partial"))


def test_passages_are_filled_up_to_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr("train.data.held_out.MOST_PASSAGES", 10)
    assert MOST_PASSAGES == 10_000
    path = rows_file(tmp_path / "rows.jsonl", twenty())
    task = read_task(hold_out([path], tmp_path / "data", share=0.1, seed=0)[1])
    assert len(task.corpus) == 10
    own = {f"{kind}{q.split()[1]}" for q in task.queries.values() for kind in ("a pos ", "neg ")}
    assert own <= {*task.corpus.values()}
    monkeypatch.setattr("train.data.held_out.MOST_QUERIES", 3)
    assert len(read_task(hold_out([path], tmp_path / "data", share=0.5, seed=0)[1]).queries) == 3


def test_rows_that_cannot_be_split_are_errors(tmp_path):
    path = rows_file(tmp_path / "rows.jsonl", [{"query": "a", "pos": ["b"]}] * 3)
    with pytest.raises(ValueError, match=r"rows\.jsonl: held_out = 0\.1 leaves none of its rows to train"):
        hold_out([path], tmp_path / "data", share=0.1, seed=0)
    path.write_text('{"query": "a"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: the field `pos` is required"):
        hold_out([path], tmp_path / "data", share=0.1, seed=0)
    assert not [p for p in (tmp_path / "data").glob("*") if not p.name.endswith(".partial")]
