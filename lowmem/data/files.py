"""The rows of a data set, one after the other, each with a label for messages: a file passes through, and is not held.

A data set is a hub id, a folder written by `save_to_disk`, a folder with a file or its parts for each split, or one
file, whose rows are all `train`.
"""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from lowmem.training import source
from lowmem.training.errors import UserError

HELD_OUT = ("validation", "val", "valid", "dev", "test", "eval")  # the first of these splits that there is
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")
BLOCK = 1000  # rows of an Arrow file at a time


def splits(dataset: str) -> list[str]:
    """The names of a data set's splits, of a folder those known here. Raises UserError."""
    import datasets

    path = _path(dataset)
    if path.is_file():
        return ["train"]
    with source.explain_loading("dataset", dataset):
        if not path.is_dir():
            return datasets.get_dataset_split_names(dataset)
        if saved := _saved(path):
            return list(saved)
        return [name for name in ("train", *HELD_OUT) if _candidates(path, name)]


def not_read(dataset: str, names: tuple[str, ...]) -> list[str]:
    """The names of a folder's files that begin as a split's do, and none of `names`: Validation.jsonl, test.zip."""
    path = _path(dataset)
    if not path.is_dir() or _saved(path):
        return []
    fitting = {file for name in names for file in _candidates(path, name)}
    like_a_split = re.compile(rf"(?:train|{'|'.join(HELD_OUT)})[._-].*", re.IGNORECASE)
    return [file.name for file in _files(path) if like_a_split.fullmatch(file.name) and file not in fitting]


def rows(dataset: str, split: str) -> Iterator[tuple[str, dict]]:
    """Yield (where it is, row) of each row of a split. Raises UserError, which names file and line of any damage."""
    path = _path(dataset)
    with source.explain_loading("dataset", dataset):
        if path.is_file() or path.is_dir() and not _saved(path):
            for file in [path] if path.is_file() and split == "train" else split_files(path, split):
                yield from read(file)
        else:
            table = _table(dataset, split)
            blocks = table.with_format("arrow").iter(BLOCK)
            yield from _arrow_rows(blocks, table.features, f"dataset {dataset}, split {split}")


def _path(dataset):
    if not dataset:
        raise UserError("--dataset '' is no folder: give a hub id, a folder or a file")
    path = Path(dataset)
    if path.name.endswith(SUFFIXES) and not path.exists():
        raise UserError(f"--dataset {dataset}: there is no such file")
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"--dataset {dataset} is neither a file nor a folder: write its rows into a .jsonl file")
    return path


def _table(dataset, split):
    """The Dataset that is a split of a hub data set or of a folder that save_to_disk wrote."""
    import datasets

    if not Path(dataset).is_dir():
        return datasets.load_dataset(dataset, split=split)
    saved = _saved(Path(dataset))
    if split not in saved:
        raise UserError(f"dataset {dataset} has no split {split}, only {', '.join(saved)}")
    return saved[split]


def _saved(folder):
    """{split: its Dataset} of a folder that save_to_disk wrote; of another folder nothing."""
    import datasets

    if (folder / "dataset_dict.json").is_file():
        return datasets.load_from_disk(str(folder))
    return {"train": datasets.load_from_disk(str(folder))} if (folder / "state.json").is_file() else {}


def _candidates(folder, split):
    """{file: match} of the files that can be the split or parts of it, by their names."""
    pattern = re.compile(
        rf"({split}(?:-\d{{5}}-of-(\d{{5}}))?)(?:-[0-9a-f]{{16}})?(?:\..*)?\.(?:jsonl|jsonl\.gz|json|csv|parquet)"
    )
    return {file: match for file in _files(folder) if (match := pattern.fullmatch(file.name))}


def _files(folder):
    return sorted([*folder.iterdir(), *(folder / "data").glob("*")], key=lambda file: file.name)


def split_files(folder: Path, split: str) -> list[Path]:
    """The files of a split: <split>.jsonl, .jsonl.gz, .json, .csv or .parquet, or as the hub has them, in parts and in
    data/, as train-00000-of-00002.parquet, with a hash behind in older ones. Raises UserError.
    """
    if folder.is_file():
        raise UserError(f"dataset {folder} has no split {split}, only train: give a folder with a file for each")
    found = _candidates(folder, split)
    for count in {match[2] for match in found.values()}:
        parts = [split] if count is None else [f"{split}-{k:05}-of-{count}" for k in range(int(count))]
        if [match[1] for match in found.values()] == parts:
            return list(found)
    names = ", ".join(str(file.relative_to(folder)) for file in found) or "none"
    raise UserError(
        f"dataset {folder} needs one file {split}.jsonl, .jsonl.gz, .json, .csv or .parquet, or all parts "
        f"{split}-00000-of-0000N of one, and has {names[:200]}"
    )


def read(file: Path) -> Iterator[tuple[str, dict]]:
    """Yield (where it is, row) of each row of a file. Raises UserError or what pyarrow and gzip raise.

    Python reads JSON itself: datasets' reader ends the process on some damaged lines, and names none.
    """
    if file.name.endswith((".jsonl", ".jsonl.gz")):
        return _json_lines(file)
    readers = {".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    if file.suffix not in readers:
        raise UserError(f"--dataset {file} is no file that is read: give .jsonl, .jsonl.gz, .json, .csv or .parquet")
    return readers[file.suffix](file)


def _lines(file):
    """Yield (number, text) of each line, its end included."""
    number = 0
    with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as lines:
        try:
            for number, line in enumerate(lines, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{file}, line {number}, is not UTF-8 text: save it in that encoding, or get it again"
            ) from error
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{file}, behind line {number}, is cut or damaged ({error}): get it again") from error


def _json_lines(file):
    for number, line in _lines(file):
        if line.strip():
            where = f"{file}, line {number}"
            yield where, _checked(_parsed(line, where), where)


def _parsed(text, where):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        said = (
            str(error) if "\n" in text.strip() else getattr(error, "msg", str(error))
        )  # `where` says which line it is
        raise UserError(f"{where}, is not JSON ({said[:100]}): mend it, or get it again") from error


def _checked(row, where):
    if not isinstance(row, dict):
        raise UserError(f"{where}, is not a row, which is a JSON object: mend it, or get it again")
    return row


def _json_rows(file):
    """Of an array of objects, or an object with such an array as `data`; or of lines, as many .json files have them."""
    lines = (line for _, line in _lines(file) if line.strip())
    first, is_one_line = next(lines, ""), next(lines, None) is None
    try:
        alone = json.loads(first)
    except (ValueError, RecursionError):
        alone = None
    if isinstance(alone, dict) and not (is_one_line and isinstance(alone.get("data"), list)):
        yield from _json_lines(file)
        return
    content = _parsed("".join(line for _, line in _lines(file)), str(file))
    content = content.get("data") if isinstance(content, dict) else content
    if not isinstance(content, list):
        raise UserError(
            f"{file} holds neither an array of rows nor an object with such an array as `data`: make it one of these, "
            "or a .jsonl file with a row a line"
        )
    for number, row in enumerate(content):
        yield f"{file}, row {number}", _checked(row, f"{file}, row {number}")


def _csv_rows(file):
    """Of a file whose first line names the columns."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader((line for _, line in _lines(file)), strict=True)
    header, number = None, 1
    try:
        for fields in reader:
            where, number = f"{file}, line {number}", reader.line_num + 1
            if header is None:
                header = fields
                _require_one_of_each(header, where)
            elif fields and len(fields) != len(header):
                raise UserError(
                    f"{where}, has {len(fields)} fields, and the first line {len(header)}: write a field with a comma, "
                    "a quote or a line break in it between quotes"
                )
            elif fields:
                yield where, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise UserError(f"{file}, line {number}, is not CSV ({error}): mend it, or get it again") from error


def _require_one_of_each(columns, where):
    if twice := [name for name in columns if columns.count(name) > 1]:
        raise UserError(f"{where}, names the column {twice[0]!r} twice: take one of them out")


def _parquet_rows(file):
    import datasets
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as content:
        schema = content.schema_arrow
        _require_one_of_each(schema.names, str(file))
        has_json = b"Json" in (schema.metadata or {}).get(b"huggingface", b"")
        features = datasets.Features.from_arrow_schema(schema) if has_json else {}
        yield from _arrow_rows(content.iter_batches(BLOCK), features, str(file))


def _arrow_rows(blocks, features, where):
    """blocks: Arrow tables or batches. features: {column: its type}, which datasets knows of columns with JSON."""
    number = 0
    for block in blocks:
        for row in block.to_pylist():
            yield f"{where}, row {number}", {name: _value(value, features.get(name)) for name, value in row.items()}
            number += 1


def _value(value, feature):
    """The value without those keys with None that Arrow adds, since in a column all dicts have the same.

    What datasets keeps as JSON text, where objects of a column differ, is read, its nulls included.
    """
    if isinstance(value, dict):
        types = feature if isinstance(feature, dict) else {}
        return {key: _value(inner, types.get(key)) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_value(inner, getattr(feature, "feature", None)) for inner in value]
    return json.loads(value) if type(feature).__name__ == "Json" and isinstance(value, str) else value
