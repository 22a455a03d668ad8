"""Reading data files: plain text, JSON, JSON lines, parquet and saved Hugging Face data sets, as rows of text or ids.

Each way of being wrong has one sentence that says where: the byte offset, the line, the columns that exist.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from attnlab.errors import DataError

TARGET = "target"
"""The column with the decoder's text, for an encoder-decoder."""


class Rows(NamedTuple):
    """What a data file holds.

    Attributes:
        source: what to call the data in messages.
        values: texts (str) or lists of token ids.
        targets: the decoder's texts or ids, None where there is no such column.
        whole: True where `values` is one long text that is to be split at the model's length.
    """

    source: str
    values: list[object]
    targets: list[object] | None = None
    whole: bool = False


def read_rows(path: Path, *, column: str | None, reads_text: bool, limit: int | None) -> Rows:
    """The rows of a data file or a saved data set's folder.

    Args:
        path: `.json`, `.jsonl` or `.ndjson`, `.parquet`, a folder, or else a text file.
        column: the column to read; None for `text`, or `input_ids` where the model has no tokenizer.
        reads_text: whether the model has a tokenizer.
        limit: most rows to read.

    Raises:
        DataError: the file is missing, empty, or not what its name says.
    """
    try:
        there = path.exists()
    except (OSError, ValueError):  # a whole text is too long for a name, or holds a null character
        there = False
    if not there:
        raise DataError(
            f"There is no file {_short(str(path))}. (A text itself is given to the library in a list: ['the text'].)"
        )
    if path.is_dir():
        return _read_dataset(path, column, reads_text, limit)
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty.")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _read_parquet(path, column, reads_text, limit)
    text = _read_text(path)
    if suffix == ".json":
        return _read_json(path, text, column, reads_text, limit)
    if suffix in {".jsonl", ".ndjson"}:
        return _read_json_lines(path, text, column, reads_text, limit)
    if column is not None:
        raise DataError(f"{path} is read as one text, which has no column {column!r}.")
    return Rows(str(path), [text], whole=True)


def rows_of_records(
    source: str, records: Sequence[object], *, column: str | None, reads_text: bool, lines: Sequence[int] | None = None
) -> Rows:
    """Rows of a list whose items are all texts, all lists of ids, or all objects with columns.

    Args:
        source: what to call the data in messages.
        records: the items.
        column: the column to read of objects.
        reads_text: whether the model has a tokenizer.
        lines: the line of each item, for messages.
    """
    if not records:
        raise DataError(f"{source} holds no sequence.")

    def place(i: int) -> str:
        return f"line {lines[i]}" if lines else f"item {i + 1}"

    first = records[0]
    shape = str if isinstance(first, str) else dict if isinstance(first, dict) else list
    for i, record in enumerate(records):
        if not isinstance(record, shape) or (shape is list and not _are_ids(record)):
            expected = "a string, a list of token ids, or an object with columns"
            raise DataError(
                f"{source}, {place(i)}: {expected} was expected, the same throughout; got {_shown(record)}."
            )
    if shape is not dict:
        if column is not None:
            raise DataError(f"{source} has no columns, so no column {column!r}.")
        return Rows(source, list(records))
    objects: list[dict[str, object]] = [record for record in records if isinstance(record, dict)]
    chosen = choose_column(list(objects[0]), column, reads_text, source)
    for i, record in enumerate(objects):
        if chosen not in record:
            raise DataError(f"{source}, {place(i)}: there is no {chosen!r}; it has {_listed(list(record))}.")
        if not (isinstance(record[chosen], str) or _are_ids(record[chosen])):
            raise DataError(
                f"{source}, {place(i)}: {chosen!r} should be a string or a list of token ids; got "
                f"{_shown(record[chosen])}."
            )
    targets: list[object] | None = None
    if any(TARGET in record for record in objects):
        targets = [record.get(TARGET) for record in objects]
    return Rows(source, [record[chosen] for record in objects], targets)


def choose_column(names: Sequence[str], column: str | None, reads_text: bool, source: str) -> str:
    """The column to read, or a `DataError` that offers the names there are.

    >>> choose_column(["text", "label"], None, True, "x.parquet")
    'text'
    """
    wanted = [column] if column is not None else ["text", "input_ids"] if reads_text else ["input_ids", "text"]
    for name in wanted:
        if name in names:
            return name
    meant = f"no column {wanted[0]!r}" if column is not None else "neither a column 'text' nor 'input_ids'"
    raise DataError(f"{source} has {meant}; it has {_listed(names)}. Name one with --column (column=...).")


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = error.start + (3 if content.startswith(b"\xef\xbb\xbf") else 0)
        raise DataError(
            f"{path} is not UTF-8 text: byte 0x{content[at]:02x} at offset {at}. Convert it, or name its format by "
            "its ending (.json, .jsonl, .parquet)."
        ) from error
    if not text.strip():
        raise DataError(f"{path} holds no sequence: there is only white space.")
    return text


def _read_json(path: Path, text: str, column: str | None, reads_text: bool, limit: int | None) -> Rows:
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            return _read_json_lines(path, text, column, reads_text, limit)
        raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg}).") from error
    except (RecursionError, ValueError) as error:
        raise DataError(f"{path}: a list of strings was expected; {_beyond_python(error)}.") from error
    if not isinstance(records, list):
        raise DataError(
            f"{path}, line 1: a list of strings (or of token ids, or of objects) was expected; got {_shown(records)}."
        )
    if limit is not None:
        records = records[:limit]
    try:
        return rows_of_records(str(path), records, column=column, reads_text=reads_text)
    except DataError:
        # Only now, as it takes a second reading: with the lines the message can say where.
        lines = _lines_of_items(text, len(records))
        return rows_of_records(str(path), records, column=column, reads_text=reads_text, lines=lines)


def _lines_of_items(text: str, count: int) -> list[int]:
    """The line on which each item of a JSON list begins."""
    decoder = json.JSONDecoder()
    lines, line, seen = [], 1, 0
    at = text.index("[") + 1
    for _ in range(count):
        while text[at] in " \t\r\n,":
            at += 1
        line += text.count("\n", seen, at)
        seen = at
        lines.append(line)
        _, at = decoder.raw_decode(text, at)
    return lines


def _read_json_lines(path: Path, text: str, column: str | None, reads_text: bool, limit: int | None) -> Rows:
    records, lines = [], []
    filled = ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())
    for number, line in islice(filled, limit):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error.msg}).") from error
        except (RecursionError, ValueError) as error:
            raise DataError(f"{path}, line {number}: {_beyond_python(error)}.") from error
        lines.append(number)
    return rows_of_records(str(path), records, column=column, reads_text=reads_text, lines=lines)


def _read_parquet(path: Path, column: str | None, reads_text: bool, limit: int | None) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        chosen = choose_column(names, column, reads_text, str(path))
        columns = [chosen, TARGET] if TARGET in names and chosen != TARGET else [chosen]
        values: list[object] = []
        targets: list[object] = []
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            values.extend(batch.column(chosen).to_pylist())
            if len(columns) == 2:
                targets.extend(batch.column(TARGET).to_pylist())
            if limit is not None and len(values) >= limit:
                break
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as parquet: {_first_line(error)}.") from error
    return _rows_of_columns(str(path), chosen, values[:limit], targets[:limit] if len(columns) == 2 else None)


def _read_dataset(path: Path, column: str | None, reads_text: bool, limit: int | None) -> Rows:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{path} is a folder; to read a saved Hugging Face data set, install datasets: pip install datasets."
        ) from error
    try:
        dataset = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} is a folder, but not a data set saved with save_to_disk; give a file or such a folder."
        ) from error
    if isinstance(dataset, datasets.DatasetDict):
        raise DataError(f"{path} holds several splits; give one of them: {_listed([str(path / s) for s in dataset])}.")
    names = dataset.column_names
    chosen = choose_column(names, column, reads_text, str(path))
    some = dataset if limit is None else dataset.select(range(min(limit, len(dataset))))
    targets = list(some[TARGET]) if TARGET in names and chosen != TARGET else None
    return _rows_of_columns(str(path), chosen, list(some[chosen]), targets)


def _rows_of_columns(source: str, column: str, values: list[object], targets: list[object] | None) -> Rows:
    if not values:
        raise DataError(f"{source} holds no sequence.")
    for i, value in enumerate(values):
        if not (isinstance(value, str) or _are_ids(value)):
            raise DataError(
                f"{source}, row {i + 1}: {column!r} should be a string or a list of token ids; got {_shown(value)}."
            )
    return Rows(source, values, targets)


def _beyond_python(error: RecursionError | ValueError) -> str:
    return "this is nested too deeply" if isinstance(error, RecursionError) else "a number has thousands of digits"


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _shown(value: object) -> str:
    return f"{type(value).__name__} {_short(repr(value), 40)}"


def _short(text: str, most: int = 200) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "none"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
