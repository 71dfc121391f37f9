"""A run's record: metrics.jsonl, TensorBoard, readable rollouts, and which groups were trained when.

    metrics.jsonl          one object a step
    evaluations.jsonl      one object an evaluation
    trained.jsonl          one object a step: the ids of the groups that left the scheduler in it
    rollouts/step_N.jsonl  samples, evenly through the step's groups: prompt, response, reward, status, weight versions

Invariants:
- a line is in the file, whole, when the call returns; a number that is not finite is null in it;
- `rewind(step)` leaves exactly what the run had recorded up to `step`, whether or not a crash tore the last line.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_rl.config.errors import UserError
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
        self._purge_step: int | None = None
        self._writer: Any = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._record(METRICS, step, metrics)

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        self._record(EVALUATIONS, step, metrics)

    def evaluated(self) -> set[int]:
        return {row["step"] for row in read_rows(self._dir / EVALUATIONS)}

    def _record(self, name: str, step: int, metrics: Mapping[str, float]) -> None:
        append(self._dir / name, {"step": step} | {k: v if math.isfinite(v) else None for k, v in metrics.items()})
        if self._tensorboard:
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter  # half a second, for the one process that writes

                self._writer = SummaryWriter(str(self._dir / TENSORBOARD), purge_step=self._purge_step)
            for metric, value in metrics.items():
                self._writer.add_scalar(metric, value, step)
            self._writer.flush()
        self._lines.show(step, metrics, time.monotonic())

    def rollouts(self, step: int, groups: Sequence[Group]) -> None:
        append(self._dir / TRAINED, {"step": step, "groups": [group.id for group in groups]})
        if self._every and step % self._every == 0:
            scored = [(group, r, s) for group in groups for r, s in zip(group.rollouts, group.scores, strict=True)]
            count = min(self._kept, len(scored))
            rows = [self._row(*scored[i * len(scored) // count]) for i in range(count)]
            file = self._dir / ROLLOUTS / f"step_{step}.jsonl"
            with written(file):
                file.parent.mkdir(exist_ok=True)
                text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                file.write_text(text, encoding="utf-8", errors="replace")  # a half-sampled surrogate is no reason to stop

    def rewind(self, step: int) -> None:
        self._purge_step = step + 1
        for name in (METRICS, EVALUATIONS, TRAINED):
            file = self._dir / name
            if file.exists():
                kept = [row for row in read_rows(file) if row["step"] <= step]
                partial = file.with_suffix(".tmp")
                with written(file):
                    partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
                    partial.replace(file)
        for file in (self._dir / ROLLOUTS).glob("step_*.jsonl"):
            if int(re.sub(r"\D", "", file.stem)) > step:
                file.unlink()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _row(self, group: Group, rollout: Rollout, score: Score) -> dict[str, Any]:
        spans = version_spans(rollout.versions)
        ends = list(accumulate(length for _, length in spans))
        pieces = [self._decode(rollout.tokens[start:end]) for start, end in pairwise([0, *ends])]
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
            "versions": spans,
            "pieces": pieces if len(pieces) > 1 else [],  # the response again, cut where the version changes
            "finish_reason": rollout.finish_reason,
            "engine_logprob_mean": fmean(rollout.engine_logprobs) if rollout.engine_logprobs else None,
        }


def version_spans(versions: Sequence[int]) -> list[tuple[int, int]]:
    """(weight version, number of tokens), in order."""
    return [(version, len(list(run))) for version, run in groupby(versions)]


def append(file: Path, row: Mapping[str, Any]) -> None:
    with written(file), file.open("a") as out:
        out.write(json.dumps(row) + "\n")
        out.flush()
        os.fsync(out.fileno())


@contextmanager
def written(file: Path) -> Iterator[None]:
    """A full disk is something to tell the user."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{file}: cannot write: {error.strerror}", exit_code=1) from None
