"""A run's record: metrics.jsonl, TensorBoard, readable rollouts, and which groups were trained when.

    metrics.jsonl          one object a step
    evaluations.jsonl      one object an evaluation
    trained.jsonl          one object a step: the ids of the groups that left the scheduler in it
    rollouts/step_N.jsonl  samples: prompt, response, reward, status, weight versions

Invariants:
- a line is in the file, whole, when the call returns;
- `rewind(step)` leaves exactly what the run had recorded up to `step`, whether or not a crash tore the last line.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from megatron_rl.observability.console import StepLines
from megatron_rl.observability.summary import read_rows
from megatron_rl.types import Group, Rollout, Score

METRICS, EVALUATIONS, TRAINED = "metrics.jsonl", "evaluations.jsonl", "trained.jsonl"
ROLLOUTS, TENSORBOARD = "rollouts", "tensorboard"


class NullTracker:
    """Of the ranks that do not write."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def rollouts(self, step: int, groups: Sequence[Group]) -> None: ...

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def evaluated(self) -> set[int]:
        return set()

    def rewind(self, step: int) -> None: ...

    def close(self) -> None: ...


class RunTracker:
    """`ports.Tracker`; also shows each step on the console."""

    def __init__(
        self,
        run_dir: Path,
        *,
        steps: int,
        decode: Callable[[Sequence[int]], str],
        tensorboard: bool,
        rollouts_every: int,
        rollouts_kept: int,
    ) -> None:
        self._dir, self._decode, self._every, self._kept = run_dir, decode, rollouts_every, rollouts_kept
        self._lines = StepLines(steps)
        self._tensorboard = tensorboard
        self._writer: SummaryWriter | None = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._record(METRICS, step, metrics)

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        self._record(EVALUATIONS, step, metrics)

    def evaluated(self) -> set[int]:
        return {row["step"] for row in read_rows(self._dir / EVALUATIONS)}

    def _record(self, name: str, step: int, metrics: Mapping[str, float]) -> None:
        append(self._dir / name, {"step": step} | dict(metrics))
        if self._tensorboard:
            self._writer = self._writer or SummaryWriter(str(self._dir / TENSORBOARD), purge_step=step)
            for metric, value in metrics.items():
                self._writer.add_scalar(metric, value, step)
            self._writer.flush()
        self._lines.show(step, metrics, time.monotonic())

    def rollouts(self, step: int, groups: Sequence[Group]) -> None:
        append(self._dir / TRAINED, {"step": step, "groups": [group.id for group in groups]})
        if self._every and step % self._every == 0:
            rows = [self._row(group, r, s) for group in groups for r, s in zip(group.rollouts, group.scores, strict=True)]
            folder = self._dir / ROLLOUTS
            folder.mkdir(exist_ok=True)
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows[: self._kept]]
            (folder / f"step_{step}.jsonl").write_text("".join(lines))

    def rewind(self, step: int) -> None:
        for name in (METRICS, EVALUATIONS, TRAINED):
            file = self._dir / name
            if file.exists():
                kept = [row for row in read_rows(file) if row["step"] <= step]
                partial = file.with_suffix(".tmp")
                partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
                partial.replace(file)
        for file in (self._dir / ROLLOUTS).glob("step_*.jsonl"):
            if int(re.sub(r"\D", "", file.stem)) > step:
                file.unlink()

    def close(self) -> None:
        if self._writer:
            self._writer.close()

    def _row(self, group: Group, rollout: Rollout, score: Score) -> dict[str, Any]:
        return {
            "group": group.id,
            "sample": rollout.sample,
            "prompt": group.prompt.text,
            "response": self._decode(rollout.tokens),
            "answer": group.prompt.answer,
            "reward": score.value,
            "status": score.status,
            "reason": score.reason,
            "tokens": len(rollout.tokens),
            "versions": version_spans(rollout.versions),
            "finish_reason": rollout.finish_reason,
            "engine_logprob_mean": fmean(rollout.engine_logprobs) if rollout.engine_logprobs else None,
        }


def version_spans(versions: Sequence[int]) -> list[tuple[int, int]]:
    """(weight version, number of tokens), in order."""
    return [(version, len(list(run))) for version, run in groupby(versions)]


def append(file: Path, row: Mapping[str, Any]) -> None:
    with file.open("a") as out:
        out.write(json.dumps(row) + "\n")
        out.flush()
        os.fsync(out.fileno())
