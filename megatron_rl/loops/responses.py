"""The responses of an evaluation on disk, as they come: one that was killed goes on with what is missing.

    responses.partial.jsonl   what it was asked (one line), then a line a sample, in the order of their ends
    responses.jsonl           all samples by pass, prompt and sample, once the last one is there

Invariants (tests/unit/test_evaluate.py): a killed and resumed evaluation asks for no sample twice and writes the file that an
uninterrupted one writes; samples of another evaluation are never mixed in.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_rl.config import UserError
from megatron_rl.resumable import ResumableRows, as_line

Key = tuple[str, str, int]  # pass, prompt id, sample


class Responses:
    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        """`about`: what the samples depend on. Raises UserError where the partial file is of something else."""
        self._path, self._partial = path, ResumableRows(path.with_suffix(".partial.jsonl"), about)
        try:
            self.rows = {(row["pass"], row["prompt_id"], row["sample"]): row for row in self._partial.rows}
        except (KeyError, TypeError):
            raise UserError(f"{self._partial.path}: not all of its rows are samples; remove it to begin again", 1) from None

    def add(self, row: dict[str, Any]) -> None:
        self.rows[row["pass"], row["prompt_id"], row["sample"]] = row
        self._partial.add(row)

    def finish(self, order: list[Key]) -> None:
        whole = self._path.with_suffix(".tmp")
        whole.write_bytes(b"".join(as_line(self.rows[key]) for key in order))
        whole.replace(self._path)
        self._partial.remove()
