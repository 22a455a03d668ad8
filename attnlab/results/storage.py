"""Results on disk: parquet for tables, safetensors for arrays, nothing that can run code, the same bytes each time.

`arrays/<analysis>.safetensors` carries one metadata entry, `attnlab`: a JSON object with the findings, the metrics of
the analysis (its rows in `tables/heads.parquet`), how those that it declares are shown, the names of its further tables
and each array's axes, coordinates, unit and description. One entry because safetensors writes several in no fixed
order.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from attnlab.errors import RunFolderError
from attnlab.results.metric import Metric
from attnlab.results.result import HEADS_COLUMNS, NamedArray, Result, combine_heads, heads_frame, sort_heads

HEADS_FILE = "tables/heads.parquet"
FORMAT = 1


def result_files(results: Iterable[Result]) -> dict[str, bytes]:
    """Every file of a run's `tables/` and `arrays/` by its path in the run folder, the combined heads table included.

    >>> empty = Result("entropy", (), heads_frame([]), pd.DataFrame(), {})
    >>> list(result_files([empty]))
    ['tables/entropy.parquet', 'arrays/entropy.safetensors', 'tables/heads.parquet']
    """
    results = list(results)
    files: dict[str, bytes] = {}
    for result in results:
        files[_table_file(result.analysis)] = encode_table(result.table)
        for name, table in result.more_tables.items():
            files[_table_file(result.analysis, name)] = encode_table(table)
        files[_arrays_file(result.analysis)] = encode_arrays(result)
    files[HEADS_FILE] = encode_table(combine_heads(results))
    return files


def encode_table(frame: pd.DataFrame) -> bytes:
    """A frame as the bytes of a parquet file; the index is not kept.

    >>> pd.read_parquet(io.BytesIO(encode_table(pd.DataFrame({"token": ["a", "b"]}))))["token"].tolist()
    ['a', 'b']
    """
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), sink, compression="zstd")
    return sink.getvalue()


def encode_arrays(result: Result) -> bytes:
    """Arrays, findings and what the metrics are called as the bytes of a safetensors file."""
    description = {
        "format": FORMAT,
        "analysis": result.analysis,
        "findings": list(result.findings),
        "metrics": sorted(set(result.heads["metric"])),
        # A list: keys are sorted, and the order of the metrics is that in which they are offered.
        "declared": [{"metric": name, **about._asdict()} for name, about in result.metrics.items()],
        "tables": list(result.more_tables),
        "arrays": {
            name: {
                "axes": list(array.axes),
                "coordinates": {axis: list(labels) for axis, labels in array.coordinates.items()},
                "unit": array.unit,
                "description": array.description,
            }
            for name, array in result.arrays.items()
        },
    }
    text = json.dumps(description, ensure_ascii=False, allow_nan=False, sort_keys=True, default=_plain)
    arrays = {name: np.ascontiguousarray(array.values) for name, array in result.arrays.items()}
    return safetensors.save(arrays, metadata={"attnlab": text})


def save_result(result: Result, directory: Path) -> None:
    """Writes one result into a run folder, and puts its rows in the place of its earlier ones in the heads table."""
    from attnlab.runs.store import one_sentence_for_disk_errors, write_atomically

    files = result_files([result])
    heads = directory / HEADS_FILE
    if heads.exists():
        others = _read_parquet(heads)
        others = others[~others["metric"].isin(set(result.heads["metric"]))]
        files[HEADS_FILE] = encode_table(sort_heads([others, result.heads]))
    with one_sentence_for_disk_errors(directory):
        for folder in ("tables", "arrays"):
            (directory / folder).mkdir(parents=True, exist_ok=True)
    for path, content in files.items():
        write_atomically(directory / path, content)


def read_result(directory: Path, analysis: str) -> dict[str, Any]:
    """The fields of the `Result` of one analysis in a run folder.

    Raises:
        RunFolderError: a file is missing or damaged.
    """
    arrays_path = directory / _arrays_file(analysis)
    values, description = _read_arrays(arrays_path)
    heads = _read_parquet(directory / HEADS_FILE)
    if not set(HEADS_COLUMNS) <= set(heads.columns):
        raise RunFolderError(f"{directory / HEADS_FILE} lacks columns; {', '.join(HEADS_COLUMNS)} were expected.")
    own = heads[heads["metric"].isin(set(description["metrics"]))].reset_index(drop=True)
    return {
        "analysis": analysis,
        "findings": tuple(description["findings"]),
        "heads": heads_frame(own[list(HEADS_COLUMNS)].itertuples(index=False, name=None)),
        "table": _read_parquet(directory / _table_file(analysis)),
        "more_tables": {
            name: _read_parquet(directory / _table_file(analysis, name)) for name in description.get("tables", ())
        },
        "arrays": {
            name: NamedArray(
                values[name], tuple(about["axes"]), about["coordinates"], about["unit"], about["description"]
            )
            for name, about in description["arrays"].items()
        },
        # Runs of earlier versions declare none; their metrics go by their names.
        "metrics": {
            about["metric"]: Metric(**{name: about[name] for name in Metric._fields})
            for about in description.get("declared", ())
        },
    }


def _read_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    content = _read_bytes(path)
    try:
        values = safetensors.load(content)
        size = int.from_bytes(content[:8], "little")
        description = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["attnlab"])
    except (SafetensorError, ValueError, KeyError) as error:
        raise RunFolderError(f"{path} is damaged or was not written by attnlab ({error!r}).") from error
    if description["format"] != FORMAT:
        raise RunFolderError(f"{path} is of format {description['format']}; this version of attnlab reads {FORMAT}.")
    return values, description


def _read_parquet(path: Path) -> pd.DataFrame:
    content = _read_bytes(path)
    try:
        return pq.read_table(io.BytesIO(content)).to_pandas()
    except pa.ArrowException as error:
        raise RunFolderError(f"{path} is damaged: it cannot be read as parquet ({error}).") from error


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RunFolderError(f"{path} cannot be read: {error.strerror or error}.") from error


def _plain(value: object) -> object:
    """Numpy's numbers as Python's, for coordinates."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be a coordinate; numbers and strings can.")


def _table_file(analysis: str, name: str = "") -> str:
    return f"tables/{analysis}.{name}.parquet" if name else f"tables/{analysis}.parquet"


def _arrays_file(analysis: str) -> str:
    return f"arrays/{analysis}.safetensors"
