"""Where rows come from: a JSONL or Parquet file, a folder of them, or a hub data set id.

Owns files and their faults (missing, empty, a broken line and its number). Must not know what a row means.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from .errors import InputNotFound, InvalidData
from .samples import Row

_SUFFIXES = (".jsonl", ".json", ".parquet")


def read_rows(data: str) -> Iterator[tuple[str, Row]]:
    """Pairs (origin, row) of a data set, lazily, in a fixed order; the origin is 'file:line' or 'file, row n'.

    Raises `InputNotFound` at once, `InvalidData` at the line that is broken, or where a file holds no row.
    """
    path = Path(data)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in _SUFFIXES)
        if not files:
            raise InputNotFound(f"reading data {data!r}: expected *.jsonl or *.parquet in this folder, found none.")
        return (pair for file in files for pair in _file_rows(file))
    if path.is_file():
        return _file_rows(path)
    if path.suffix in _SUFFIXES:
        raise InputNotFound(f"reading data {data!r}: no such file. Check the path.")
    return _hub_rows(data)


def _file_rows(path: Path) -> Iterator[tuple[str, Row]]:
    if path.suffix == ".parquet":
        rows = _parquet_rows(path)
    elif path.suffix in (".jsonl", ".json"):
        rows = _jsonl_rows(path)
    else:
        raise InputNotFound(f"reading data {str(path)!r}: expected a .jsonl or .parquet file, found {path.suffix!r}.")
    number = 0
    for pair in rows:
        number += 1
        yield pair
    if not number:
        raise InvalidData(f"reading {path}: the file holds no rows.")


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open("rb") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InvalidData(f"reading {path}: line {number} is not JSON ({error}). Repair the line.") from error
            if not isinstance(row, dict):
                raise InvalidData(f"reading {path}: line {number} is not a JSON object. One object a line is expected.")
            yield f"{path}:{number}", row


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        file = pq.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except (pa.ArrowInvalid, OSError) as error:
        raise InvalidData(f"reading {path}: it is not a readable Parquet file ({error}).") from error


def _hub_rows(name: str) -> Iterator[tuple[str, Row]]:
    from datasets import load_dataset  # a slow import that local files do not need

    try:
        dataset = load_dataset(name, split="train")
    except Exception as error:  # the hub client raises many kinds
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputNotFound(
            f"reading data {name!r}: no such file or folder, and the hub did not give it ({line}). "
            "Check the path, or the network."
        ) from error
    return ((f"{name}, row {i}", dict(row)) for i, row in enumerate(dataset, 1))
