"""How often each prompt was solved: judged samples and the correct ones among them, in total and of its latest group.

Invariants:
- a timeout or an error is no judgement: it counts neither for a prompt nor against it;
- the latest group is that of the latest epoch, in whatever order groups end; parts of one group add up;
- a million prompts are 20 MB of memory and a few MB of a checkpoint.
"""

from __future__ import annotations

import base64
import json
import logging
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_rl.types import Prompt, Score

log = logging.getLogger(__name__)
COLUMNS = ("samples", "correct", "latest_epoch", "latest_samples", "latest_correct")


class PassHistory:
    """Of `count` prompts, which it knows by number."""

    def __init__(self, count: int) -> None:
        self._columns: dict[str, NDArray[np.int32]] = {name: np.zeros(count, np.int32) for name in COLUMNS}

    def record(self, number: int, epoch: int, scores: Iterable[Score]) -> None:
        """Of a group, or of a part of one."""
        judged = [score.status == "correct" for score in scores if score.is_judgement]
        if not judged:
            return
        columns = self._columns
        latest_epoch = columns["latest_epoch"][number]
        for name, value in (("samples", len(judged)), ("correct", sum(judged))):
            columns[name][number] += value
            if epoch > latest_epoch:
                columns[f"latest_{name}"][number] = value
            elif epoch == latest_epoch:
                columns[f"latest_{name}"][number] += value
        columns["latest_epoch"][number] = max(epoch, latest_epoch)

    def outside(self, low: float, high: float, since: int) -> NDArray[np.bool_]:
        """Which prompts have a latest group of epoch `since` or later whose pass rate is below `low` or above `high`."""
        samples, correct = self._columns["latest_samples"], self._columns["latest_correct"]
        rates = np.divide(correct, samples, out=np.full(len(samples), low), where=samples > 0)
        found: NDArray[np.bool_] = (samples > 0) & (self._columns["latest_epoch"] >= since) & ((rates < low) | (rates > high))
        return found

    @property
    def seen(self) -> int:
        """Prompts with a judged sample."""
        return int(np.count_nonzero(self._columns["samples"]))

    def write(self, file: Path, prompts: Sequence[Prompt]) -> None:
        """A line for each of `prompts` (all of them, by number) that was judged; no file if none was. The names are those of
        rates.jsonl (tools/filter_by_pass_rate.py), and `samples` are judged ones. A disk that takes no more is a warning:
        checkpoints hold these numbers, and how the run ended is for others to say."""
        if not self.seen:
            return
        partial = file.with_suffix(".tmp")
        try:
            with partial.open("w", encoding="utf-8") as lines:
                for number in np.flatnonzero(self._columns["samples"]).tolist():
                    row = {"id": prompts[number].id, "domain": prompts[number].domain, **self._row(number)}
                    lines.write(json.dumps(row, ensure_ascii=False) + "\n")
            partial.replace(file)
        except OSError as error:
            log.warning("%s: cannot write: %s", file, error.strerror)

    def _row(self, number: int) -> dict[str, Any]:
        values = {name: int(column[number]) for name, column in self._columns.items()}
        latest = _tally(values["latest_samples"], values["latest_correct"])
        return _tally(values["samples"], values["correct"]) | {"latest": {"epoch": values["latest_epoch"], **latest}}

    def state_dict(self) -> dict[str, str]:
        return {name: packed(column.astype("<i4").tobytes()) for name, column in self._columns.items()}

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        self._columns = {name: np.frombuffer(unpacked(state[name]), "<i4").astype(np.int32) for name in COLUMNS}


def _tally(samples: int, correct: int) -> dict[str, Any]:
    return {"pass_rate": round(correct / samples, 4), "samples": samples, "correct": correct}


def packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data)).decode()


def unpacked(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text))
