"""Rows on disk as they come, for work that goes on after a kill: JSON lines, under a first one that says what they depend on.

Invariants (tests/unit/test_resumable.py): a row is in the file when `add` returns; a torn last line is one row to make again; what
was there is never rewritten; rows that depend on something else, or are not rows, are refused by file and line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_rl.config.errors import UserError


class ResumableRows:
    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path = path
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # the last is torn, or empty
        values = [_value(path, number, line) for number, line in enumerate(lines, 1)]
        if values and values[0] != json.loads(json.dumps(about)):
            raise UserError(f"{path}: made from other input or settings; finish that or remove the file", exit_code=1)
        self.rows: list[Any] = values[1:]
        self._file = path.open("r+b" if lines else "wb")
        self._file.truncate(sum(len(line) + 1 for line in lines))
        self._file.seek(0, 2)
        if not lines:
            self._write(about)

    def add(self, row: Any) -> None:
        self.rows.append(row)
        self._write(row)

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        self.close()
        self.path.unlink()

    def _write(self, row: Any) -> None:
        self._file.write(as_line(row))
        self._file.flush()


def as_line(row: Any) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def _value(path: Path, number: int, line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8", "surrogatepass"))
    except ValueError:
        raise UserError(f"{path}:{number}: not a line of this file; remove it to begin again", exit_code=1) from None
