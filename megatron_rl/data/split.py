"""A prompt file parted in two: what is kept, as it was, and what is dropped, with the reason.

    kept.jsonl or kept.parquet   in the source's format, order and columns
    dropped.jsonl                {"row": "<source>:<number>", .. the reason .., "content": the row}

Deciding is the slow part and can be taken up again (data/notes.py); writing is one more pass over the source.

Invariants: every row lands in exactly one of the two; a file appears when it is whole; a source that has other rows than were
decided on is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rl.config.errors import UserError
from megatron_rl.data.sources import BATCH, is_parquet, open_parquet, read_rows

Decision = Mapping[str, Any] | None  # None: kept


def write_split(source: str, out: Path, decisions: Sequence[Decision]) -> Path:
    """The two files; the path of what is kept. `decisions`: one a row of the source."""
    kept = out / ("kept.parquet" if is_parquet(source) else "kept.jsonl")
    partial = kept.with_suffix(".tmp")
    if is_parquet(source):
        _keep_parquet(Path(source), partial, decisions)
    else:
        _write_lines(partial, (row for _, row, why in _decided(source, decisions) if why is None))
    dropped = out / "dropped.jsonl"
    _write_lines(
        dropped.with_suffix(".tmp"),
        ({"row": where, **why, "content": row} for where, row, why in _decided(source, decisions) if why is not None),
    )
    dropped.with_suffix(".tmp").replace(dropped)
    return partial.replace(kept)


def _decided(source: str, decisions: Sequence[Decision]) -> Iterator[tuple[str, dict[str, Any], Decision]]:
    number = 0
    for number, (where, row) in enumerate(read_rows(source), start=1):
        if number > len(decisions):
            break
        yield where, row, decisions[number - 1]
    if number != len(decisions):
        raise UserError(f"{source}: it had {len(decisions)} rows when they were decided on, and has others now", exit_code=1)


def _keep_parquet(source: Path, path: Path, decisions: Sequence[Decision]) -> None:
    """Batches of columns as they are, so that types stay."""
    import pyarrow
    import pyarrow.parquet

    file = open_parquet(source)
    first = 0
    with pyarrow.parquet.ParquetWriter(path, file.schema_arrow) as writer:
        for batch in file.iter_batches(BATCH):
            mask = [why is None for why in decisions[first : first + len(batch)]]
            writer.write_batch(batch.filter(pyarrow.array(mask)))
            first += len(batch)


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w") as file:
        for row in rows:
            try:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            except TypeError as error:
                raise UserError(f"{path}: a row is no JSON ({error})", exit_code=1) from None
