"""Warnings about numbers that foretell the end of a run.

Invariant (tests/unit/test_observability_alarms.py): one warning when a metric rises above its threshold, and another only after it
was below it in between; a metric that is missing or not finite changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Alarm:
    metric: str
    threshold: float
    advice: str


class Alarms:
    def __init__(self, alarms: Sequence[Alarm]) -> None:
        self._alarms = alarms
        self._raised: set[str] = set()

    def raised_by(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """One line for each threshold that was crossed upwards with this step."""
        lines = []
        for alarm in self._alarms:
            value = metrics.get(alarm.metric, math.nan)
            if value <= alarm.threshold:
                self._raised.discard(alarm.metric)
            elif value > alarm.threshold and alarm.metric not in self._raised:
                self._raised.add(alarm.metric)
                lines.append(f"step {step}: {alarm.metric} is {value:.3g}, above {alarm.threshold:g}: {alarm.advice}")
        return lines


def mismatch_alarms(prob_gap_mean: float | None, masked_fraction: float | None) -> list[Alarm]:
    """Those whose threshold is not None."""
    alarms = [
        (
            "mismatch/prob_gap_mean",
            prob_gap_mean,
            "trainer and engine are drifting apart, which has ended runs. The same precision on both sides (model.dtype and "
            "engine.dtype), routing replay (algorithm.routing.kind=r3), a lower optimizer.lr and younger tokens "
            "(rollout.retention_bound) bring them together; report.html shows which tokens differ",
        ),
        (
            "mismatch/masked_fraction",
            masked_fraction,
            "the correction masks more tokens than usual, which is one or two in a thousand. Compare mismatch/by_age: if old "
            "tokens stand out, lower rollout.retention_bound or rollout.pool_capacity; if new ones do, trainer and engine compute "
            "different things (tools/compare_logprobs.py measures it on a rollout dump)",
        ),
    ]
    return [Alarm(metric, threshold, advice) for metric, threshold, advice in alarms if threshold is not None]
