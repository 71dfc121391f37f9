"""Rows from where they lie: a JSONL file, a Parquet file, or a data set of the `datasets` library.

    train.jsonl  train.parquet  datasets:NAME[:CONFIGURATION][@SPLIT]

NAME is one of the Hugging Face hub or a local folder, SPLIT is `train` unless named. Rows stream: memory holds a batch of them.

Invariants: rows come in the order of the file and count from 1; a fault is one line that names file and row; what is null in a row
of typed columns is not in it, at any depth (they have no absent keys).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_rl.config.errors import UserError
from megatron_rl.data.jsonl import read_jsonl

Row = dict[str, Any]
DATASETS = "datasets:"
BATCH = 1024  # rows of a Parquet file in memory


def read_rows(source: str | Path) -> Iterator[tuple[str, Row]]:
    """("<source>:<row>", row) of every row; none at all is a UserError."""
    if str(source).startswith(DATASETS):
        return _datasets(str(source))
    return _parquet(Path(source)) if is_parquet(source) else read_jsonl(source)


def is_parquet(source: str | Path) -> bool:
    return not str(source).startswith(DATASETS) and Path(source).suffix == ".parquet"


def is_foreign(source: str | Path) -> bool:
    """Typed columns, which nobody can put in quotes by hand."""
    return is_parquet(source) or str(source).startswith(DATASETS)


def open_parquet(path: Path) -> Any:
    """pyarrow.parquet.ParquetFile."""
    import pyarrow
    import pyarrow.parquet

    if not path.is_file():
        what = "is a directory, not a Parquet file" if path.is_dir() else f"no such file (relative paths start from {Path.cwd()})"
        raise UserError(f"{path}: {what}", exit_code=1)
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})", exit_code=1) from None


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow

    file = open_parquet(path)
    if not file.metadata.num_rows:
        raise UserError(f"{path}: the file is empty", exit_code=1)
    number = 0
    try:
        for batch in file.iter_batches(BATCH):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", _without_nulls(row)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: damaged after row {number} ({str(error).splitlines()[0]})", exit_code=1) from None


def _datasets(source: str) -> Iterator[tuple[str, Row]]:
    import datasets  # a second

    name, _, split = source.removeprefix(DATASETS).partition("@")
    name, _, configuration = name.partition(":")
    if not name:
        raise UserError(f"{source}: expected {DATASETS}NAME[:CONFIGURATION][@SPLIT]", exit_code=1)
    datasets.disable_progress_bars()
    number = 0
    try:
        for number, row in enumerate(datasets.load_dataset(name, configuration or None, split=split or "train", streaming=True), 1):
            yield f"{source}:{number}", _without_nulls(row)
    except UserError:
        raise
    except Exception as error:  # of the hub, its client, a file format: no common class
        words = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{source}: cannot be read after row {number} ({words[0]})", exit_code=1) from None
    if not number:
        raise UserError(f"{source}: the data set is empty", exit_code=1)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
