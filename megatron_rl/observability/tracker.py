"""A run's record: metrics.jsonl, TensorBoard, readable rollouts, and which groups were trained when.

    metrics.jsonl          one object a step
    mismatch.jsonl         one object a step: histograms of the gap between trainer and engine, name -> bins of log10 and counts
    evaluations.jsonl      one object an evaluation
    trained.jsonl          one object a step: the ids of the groups that left the scheduler in it
    rollouts/step_N.jsonl  samples, evenly through the step's groups: text and reward, token ids, log-probs and weight versions

Invariants:
- a line is in the file, whole, when the call returns; a number that is not finite is null in it;
- `rewind(step)` leaves exactly what the run had recorded up to `step`, whether or not a crash tore the last line.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_rl.algorithms.histogram import Histogram
from megatron_rl.config.errors import UserError
from megatron_rl.observability.alarms import Alarm, Alarms
from megatron_rl.observability.console import StepLines
from megatron_rl.observability.rollout_rows import rollout_row
from megatron_rl.observability.summary import read_rows
from megatron_rl.types import Group

log = logging.getLogger(__name__)
METRICS, MISMATCH, EVALUATIONS, TRAINED = "metrics.jsonl", "mismatch.jsonl", "evaluations.jsonl", "trained.jsonl"
ROLLOUTS, TENSORBOARD = "rollouts", "tensorboard"


class NullTracker:
    """Of the ranks that do not write."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None: ...

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
        alarms: Sequence[Alarm] = (),
    ) -> None:
        self._dir, self._decode, self._every, self._kept = run_dir, decode, rollouts_every, rollouts_kept
        self._lines, self._alarms = StepLines(steps), Alarms(alarms)
        self._tensorboard = tensorboard
        self._purge_step: int | None = None
        self._writer: Any = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._record(METRICS, step, metrics)
        for line in self._alarms.raised_by(step, metrics):
            log.warning(line)

    def histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        rows = {name: histogram.to_json() for name, histogram in histograms.items() if histogram.total}
        append(self._dir / MISMATCH, {"step": step} | rows)
        if writer := self._writer_or_none():
            for name, histogram in histograms.items():
                if histogram.total:
                    writer.add_histogram_raw(f"{name}_log10", **as_tensorboard_takes_it(histogram), global_step=step)
            writer.flush()

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        self._record(EVALUATIONS, step, metrics)

    def evaluated(self) -> set[int]:
        return {row["step"] for row in read_rows(self._dir / EVALUATIONS)}

    def _record(self, name: str, step: int, metrics: Mapping[str, float]) -> None:
        append(self._dir / name, {"step": step} | {k: v if math.isfinite(v) else None for k, v in metrics.items()})
        if writer := self._writer_or_none():
            for metric, value in metrics.items():
                writer.add_scalar(metric, value, step)
            writer.flush()
        self._lines.show(step, metrics, time.monotonic())

    def _writer_or_none(self) -> Any:
        if self._tensorboard and self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # half a second, for the one process that writes

            self._writer = SummaryWriter(str(self._dir / TENSORBOARD), purge_step=self._purge_step)
        return self._writer

    def rollouts(self, step: int, groups: Sequence[Group]) -> None:
        append(self._dir / TRAINED, {"step": step, "groups": [group.id for group in groups]})
        if self._every and step % self._every == 0:
            scored = [(group, r, s) for group in groups for r, s in zip(group.rollouts, group.scores, strict=True)]
            count = min(self._kept, len(scored))
            rows = [rollout_row(*scored[i * len(scored) // count], self._decode) for i in range(count)]
            file = self._dir / ROLLOUTS / f"step_{step}.jsonl"
            with written(file):
                file.parent.mkdir(exist_ok=True)
                text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                file.write_text(text, encoding="utf-8", errors="replace")  # a half-sampled surrogate is no reason to stop

    def rewind(self, step: int) -> None:
        self._purge_step = step + 1
        for name in (METRICS, MISMATCH, EVALUATIONS, TRAINED):
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


def as_tensorboard_takes_it(histogram: Histogram) -> dict[str, Any]:
    """Of log10 of the sizes; sum and square sum, which it does not draw, by the middles of the bins."""
    kept = histogram.trimmed()
    middles = [kept.edge(number) + kept.width / 2 for number in range(len(kept))]
    return {
        "min": kept.edge(0),
        "max": kept.edge(len(kept)),
        "num": kept.total,
        "sum": sum(middle * count for middle, count in zip(middles, kept.counts, strict=True)),
        "sum_squares": sum(middle**2 * count for middle, count in zip(middles, kept.counts, strict=True)),
        "bucket_limits": [kept.edge(number + 1) for number in range(len(kept))],
        "bucket_counts": list(kept.counts),
    }


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
