"""Which prompts a model solves sometimes: those are the ones a group's rewards can teach it.

Invariants: a pass rate is correct over judged samples, so that a timeout is no wrong answer; a prompt is kept exactly if its gold
answer can be right, it was sampled, at least half of its samples were judged, and low <= pass rate <= high; each other one is
dropped for the first of these that it misses.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_rl.data.gold import USABLE, Gold
from megatron_rl.types import ScoreStatus

LOW, HIGH = 0.25, 0.625  # Light-R1's (arXiv 2503.10460)


@dataclass
class Tally:
    """Of the samples of one prompt."""

    statuses: Counter[ScoreStatus] = field(default_factory=Counter)
    truncated: int = 0

    @property
    def samples(self) -> int:
        return self.statuses.total()

    @property
    def judged(self) -> int:
        return self.samples - self.statuses["timeout"] - self.statuses["error"]

    @property
    def pass_rate(self) -> float | None:
        return self.statuses["correct"] / self.judged if self.judged else None

    def as_dict(self) -> dict[str, Any]:
        rate = self.pass_rate
        numbers = {"pass_rate": None if rate is None else round(rate, 4), "samples": self.samples, "truncated": self.truncated}
        return numbers | {"statuses": dict(self.statuses)}


def tallies(responses: Iterable[Mapping[str, Any]]) -> dict[str, Tally]:
    """By prompt id, from the rows of an evaluation's responses.jsonl; its sampled pass counts."""
    found: defaultdict[str, Tally] = defaultdict(Tally)
    for row in responses:
        if row["pass"] == "sampled":
            tally = found[row["prompt_id"]]
            tally.statuses[row["status"]] += 1
            tally.truncated += row["finish_reason"] == "length"
    return dict(found)


def why_dropped(gold: Gold, tally: Tally | None, low: float = LOW, high: float = HIGH) -> dict[str, Any] | None:
    """None: kept. `tally`: None where a prompt was too long to be sampled."""
    if gold.status not in USABLE:
        return {"reason": f"gold_{gold.status}", "detail": gold.reason}
    if tally is None:
        return {"reason": "over_limit"}
    rate = tally.pass_rate
    if rate is None or 2 * tally.judged < tally.samples:
        return {"reason": "unjudged", **tally.as_dict()}
    if low <= rate <= high:
        return None
    return {"reason": "too_hard" if rate < low else "too_easy", **tally.as_dict()}
