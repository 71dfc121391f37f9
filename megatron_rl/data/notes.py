"""What a pass over a file found, a JSON value a row, on disk as it goes: one that was killed goes on with the row it had come to.

Invariants: no row is looked at twice; a torn last line is one row to look at again; notes on other files or under other settings
are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_rl.config.errors import UserError


class Notes:
    """In `path`: what the notes depend on (one line), then a line a row."""

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path = path
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        if whole and json.loads(whole[0]) != json.loads(json.dumps(about)):
            raise UserError(f"{path}: of other files or settings; finish that one or remove the file", exit_code=1)
        self.made: list[Any] = [json.loads(line) for line in whole[1:]]
        path.write_text("".join(whole) or json.dumps(about) + "\n")
        self._file = path.open("a")

    def add(self, note: Any) -> None:
        self.made.append(note)
        self._file.write(json.dumps(note, ensure_ascii=False) + "\n")

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        self.close()
        self.path.unlink()
