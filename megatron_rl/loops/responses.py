"""The responses of an evaluation on disk, as they come: one that was killed goes on with what is missing.

    responses.partial.jsonl   what it was asked (one line), then a line a sample, in the order of their ends
    responses.jsonl           all samples by pass, prompt and sample, once the last one is there

Invariants (tests/unit/test_evaluate.py): a killed and resumed evaluation asks for no sample twice and writes the file that an
uninterrupted one writes; a torn last line is one sample to repeat; samples of another evaluation are never mixed in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_rl.config import UserError

Key = tuple[str, str, int]  # pass, prompt id, sample


class Responses:
    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        """`about`: what the samples depend on. Raises UserError where the partial file is of something else."""
        self._path, self._partial = path, path.with_suffix(".partial.jsonl")
        self.rows: dict[Key, dict[str, Any]] = {}
        lines = self._partial.read_text().splitlines(keepends=True) if self._partial.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        if whole and json.loads(whole[0]) != json.loads(json.dumps(about)):
            raise UserError(f"{self._partial}: of another evaluation; finish that one or remove the file", exit_code=1)
        for line in whole[1:]:
            row = json.loads(line)
            self.rows[row["pass"], row["prompt_id"], row["sample"]] = row
        self._partial.write_text("".join(whole) or json.dumps(about) + "\n")
        self._file = self._partial.open("a")

    def add(self, row: dict[str, Any]) -> None:
        self.rows[row["pass"], row["prompt_id"], row["sample"]] = row
        self._file.write(_line(row))
        self._file.flush()

    def finish(self, order: list[Key]) -> None:
        self._file.close()
        whole = self._path.with_suffix(".tmp")
        whole.write_text("".join(_line(self.rows[key]) for key in order))
        whole.replace(self._path)
        self._partial.unlink()


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
