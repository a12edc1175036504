"""Rows of data sets of all forms, and what is wrong with them. python -m pytest tests/test_files.py"""

import csv
import gzip
import json
import os
import tracemalloc
from itertools import islice

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from lowmem.data import files
from lowmem.training.errors import UserError

ROWS = [{"text": f'row {k}, "a"\nnext line, café', "note": str(k)} for k in range(7)]


def as_jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_csv(file, rows):
    with open(file, "w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write(file, rows):
    """Write the rows in the form that the file's name says."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.name.endswith(".jsonl"):
        file.write_bytes(b"\xef\xbb\xbf" + as_jsonl(rows).replace(b"\n", b"\r\n\n"))
    if file.name.endswith(".jsonl.gz"):
        file.write_bytes(gzip.compress(as_jsonl(rows)))
    if file.name.endswith(".lines.json"):
        file.write_bytes(as_jsonl(rows))
    elif file.name.endswith(".data.json"):
        file.write_text(json.dumps({"version": "1", "data": rows}, indent=1))
    elif file.name.endswith(".json"):
        file.write_text(json.dumps(rows, indent=1))
    if file.name.endswith(".csv"):
        as_csv(file, rows)
    if file.name.endswith(".parquet"):
        datasets.Dataset.from_list(rows).to_parquet(str(file))


def found(dataset, split="train"):
    return [row for _, row in files.rows(str(dataset), split)]


NAMES = ["t.jsonl", "t.jsonl.gz", "t.json", "t.data.json", "t.lines.json", "t.csv", "t.parquet"]


@pytest.mark.parametrize("name", NAMES)
def test_one_file_is_the_split_train(name, tmp_path):
    write(tmp_path / name, ROWS)
    assert files.splits(str(tmp_path / name)) == ["train"]
    assert found(tmp_path / name) == ROWS


def test_lines_of_json_may_have_a_column_named_data(tmp_path):
    rows = [{"text": "a", "data": [1]}, {"text": "b", "data": []}]
    (tmp_path / "t.json").write_bytes(as_jsonl(rows))
    assert found(tmp_path / "t.json") == rows


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize("where", ["", "data"])
def test_a_folder_has_a_file_or_parts_for_each_split(ending, where, tmp_path):
    write(tmp_path / where / f"train-00000-of-00002{ending}", ROWS[:3])
    write(tmp_path / where / f"train-00001-of-00002{ending}", ROWS[3:])
    write(tmp_path / where / f"test{ending}", ROWS[:2])
    (tmp_path / "README.md").write_text("about")
    assert files.splits(str(tmp_path)) == ["train", "test"]
    assert (found(tmp_path), found(tmp_path, "test")) == (ROWS, ROWS[:2])


def test_folders_of_save_to_disk(tmp_path):
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": whole, "eval": whole.select([5, 2])}).save_to_disk(str(tmp_path / "two"))
    assert files.splits(str(tmp_path / "one")) == ["train"]
    assert files.splits(str(tmp_path / "two")) == ["train", "eval"]
    assert found(tmp_path / "one") == found(tmp_path / "two") == ROWS
    assert found(tmp_path / "two", "eval") == [ROWS[5], ROWS[2]]
    with pytest.raises(UserError, match="has no split test, only train, eval"):
        found(tmp_path / "two", "test")


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = pyarrow.table([["one"], ["two"]], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(UserError, match="t.parquet, names the column 'text' twice"):
        found(tmp_path / "t.parquet")


def test_what_is_no_file_is_not_asked_of_the_hub(tmp_path):
    for name in ("t.jsonl", "t.csv", "t.parquet"):
        with pytest.raises(UserError, match=rf"{name}: there is no such file"):
            files.splits(str(tmp_path / name))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is neither a file nor a folder"):
        files.splits(str(tmp_path / "pipe"))


def test_a_hub_data_set(monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: asked.append(name) or ["train", "test"])
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, split: asked.append((name, split)) or datasets.Dataset.from_list(ROWS)
    )
    assert files.splits("someone/some_set") == ["train", "test"]
    labels, rows = zip(*files.rows("someone/some_set", "test"), strict=True)
    assert list(rows) == ROWS
    assert labels[6] == "dataset someone/some_set, split test, row 6"
    assert asked == ["someone/some_set", ("someone/some_set", "test")]


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("t.jsonl", ", line 3"),
        ("t.lines.json", ", line 2"),
        ("t.json", ", row 1"),
        ("t.csv", ", line 4"),
        ("t.parquet", ", row 1"),
    ],
)
def test_a_row_says_where_it_is(name, label, tmp_path):
    """Lines as an editor counts them: of csv that on which the row begins."""
    write(tmp_path / name, ROWS)
    where, row = list(files.rows(str(tmp_path / name), "train"))[1]
    assert (where, row) == (f"{tmp_path / name}{label}", ROWS[1])


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz", "t.csv", "t.parquet"])
def test_a_large_file_is_not_held(name, tmp_path):
    """20,000 rows pass in no more memory than a block of them; and the first needs not all."""
    rows = [{"text": "word " * 40 + str(k)} for k in range(20_000)]
    write(tmp_path / name, rows)
    passing = files.rows(str(tmp_path / name), "train")
    next(passing)  # what is imported
    tracemalloc.start()
    assert sum(1 for _ in passing) == len(rows) - 1
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.5e6  # seen: 0.6 MB of a parquet block; all rows as dicts are 10 MB


def test_objects_that_differ_are_those_of_the_file_in_every_form(tmp_path):
    """datasets 5 keeps them as JSON text; a null in them is the file's own, and not Arrow's."""
    rows = [
        {"tools": [{"n": "f", "of": of}], "calls": {"a": k}}
        for k, of in enumerate(({"x": 1}, {"y": None}, {"z": {"u": [2]}}))
    ]
    (tmp_path / "t.jsonl").write_bytes(as_jsonl(rows))
    whole = datasets.load_dataset(
        "json", data_files=str(tmp_path / "t.jsonl"), split="train", cache_dir=str(tmp_path / "cache")
    )
    whole.to_parquet(str(tmp_path / "t.parquet"))
    whole.with_format("numpy").save_to_disk(str(tmp_path / "saved"))
    assert "Json" in str(whole.features)
    for form in ("t.jsonl", "t.parquet", "saved"):
        assert found(tmp_path / form) == rows


def test_keys_that_arrow_adds_are_dropped(tmp_path):
    """In a column all dicts have the same keys; a value that is None, and a None in a list, say something."""
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "tool", "call": {"x": 1, "y": 2}}], "note": None},
        {"messages": [{"role": "user", "content": "b"}, {"role": "tool", "call": {"x": 3}}], "note": [None, "c"]},
    ]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "t.parquet"))
    assert found(tmp_path / "t.parquet") == rows
    write(tmp_path / "t.json", [{"a": {"b": None}}])
    assert found(tmp_path / "t.json") == [{"a": {"b": None}}]


def text(content, encoding="utf-8"):
    return lambda file: file.write_bytes(content.encode(encoding))


GOOD = '{"text": "a"}\n'
DAMAGE = {
    "broken JSON": ("t.jsonl", text(GOOD + '\n{"text": "a\n'), "t.jsonl, line 3, is not JSON"),
    "an array in a line": ("t.jsonl", text(GOOD + "[1]\n"), "t.jsonl, line 2, is not a row"),
    "another encoding": ("t.jsonl", text(GOOD + '{"text": "é"}\n', "latin-1"), "t.jsonl, line 2, is not UTF-8 text"),
    "UTF-16": ("t.jsonl", text(GOOD, "utf-16"), "t.jsonl, line 1, is not UTF-8 text"),
    "another encoding in csv": ("t.csv", text("text\na\né\n", "latin-1"), "t.csv, line 3, is not UTF-8 text"),
    "NUL bytes": ("t.jsonl", text(GOOD + "\0\0\0\0"), "t.jsonl, line 2, is not JSON"),
    "broken array": ("t.json", text('[{"text": "a"},\n{"text"]'), "t.json, is not JSON (Expecting ':' delimiter: line 2"),
    "an array of texts": ("t.json", text('["a"]'), "t.json, row 0, is not a row"),
    "an object of columns": ("t.json", text('{"text":\n["a", "b"]}'), "t.json holds neither an array of rows"),
    "too many fields": ("t.csv", text("prompt,completion\na,b\nc,d,e\n"), "t.csv, line 3, has 3 fields, and the first line 2"),
    "too few fields": ("t.csv", text("prompt,completion\na\n"), "t.csv, line 2, has 1 fields, and the first line 2"),
    "an open quote": ("t.csv", text('text\na\n"b\nc\nd\n'), "t.csv, line 3, is not CSV (unexpected end of data)"),
    "gzip cut": ("t.jsonl.gz", lambda f: f.write_bytes(gzip.compress(as_jsonl(ROWS))[:-12]), "get it again"),
    "text named parquet": ("t.parquet", text(GOOD), "get it again"),
    "another kind of file": ("t.txt", text(GOOD), "t.txt is no file that is read: give .jsonl, .jsonl.gz, .json, .csv or"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_in_one_line(name, tmp_path):
    file, damage, message = DAMAGE[name]
    damage(tmp_path / file)
    with pytest.raises(UserError) as refused:
        found(tmp_path / file)
    assert message in str(refused.value)
    assert str(tmp_path / file) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_rows_before_the_damage_are_read(tmp_path):
    text(GOOD * 3 + "{")(tmp_path / "t.jsonl")
    assert len(list(islice(files.rows(str(tmp_path / "t.jsonl"), "train"), 3))) == 3


def test_a_folder_without_the_split_says_what_it_has(tmp_path):
    write(tmp_path / "train.csv", ROWS)
    write(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(UserError, match=r"needs one file train.jsonl.* and has train.csv, train.jsonl"):
        found(tmp_path)
    with pytest.raises(UserError, match="needs one file validation.jsonl.* and has none"):
        found(tmp_path, "validation")
    with pytest.raises(UserError, match="train.csv has no split validation, only train"):
        found(tmp_path / "train.csv", "validation")
    for names in (files.splits, found):
        with pytest.raises(UserError, match="--dataset '' is no folder"):
            names("")
