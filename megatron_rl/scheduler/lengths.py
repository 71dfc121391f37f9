"""How long rollouts are, from those that ended and those that did not, and what a schedule does to the lengths that are trained.

Rollouts that are still growing, or were given up, are longer than what is known of them: lengths are a survival problem, and the
product-limit estimate (Kaplan and Meier, 1958) is what counts them rightly. The plain mean of what has ended would not: a token
budget ends the short ones first.

Invariants (tests/unit/test_lengths.py): without anything unended the estimate is the plain distribution; rollouts that are cut, at
whatever lengths, do not make it shorter; the longest rest of many is no shorter than that of some of them.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

REST_POINTS = 64  # of the integral over the longest rest


@dataclass(frozen=True, slots=True)
class Survival:
    """`shares[i]` of all rollouts are longer than `lengths[i]` tokens, ascending; beyond the last nothing is known."""

    lengths: tuple[int, ...]
    shares: tuple[float, ...]

    @classmethod
    def of(cls, ended: Iterable[int], unended: Iterable[int]) -> Survival:
        events = sorted([(length, 0) for length in ended] + [(length, 1) for length in unended])  # at a tie, who ended first
        at_risk, share = len(events), 1.0
        lengths: list[int] = []
        shares: list[float] = []
        for length, is_unended in events:
            if not is_unended:
                share *= 1 - 1 / at_risk
                if lengths and lengths[-1] == length:
                    shares[-1] = share
                else:
                    lengths.append(length)
                    shares.append(share)
            at_risk -= 1
        return cls(tuple(lengths), tuple(shares))

    def beyond(self, length: float) -> float:
        """The share of rollouts longer than `length`."""
        at = bisect_right(self.lengths, length)
        return self.shares[at - 1] if at else 1.0

    def longest_rest(self, grown: Iterable[int]) -> float:
        """The expected number of tokens that the slowest of these rollouts still needs, each having grown so far: E[max] as the
        integral of 1 - prod P(rest <= r), up to the longest that ended."""
        many = {length: n for length, n in Counter(grown).items() if self.beyond(length) > 0}
        if not many or not self.lengths:
            return 0.0
        width = max(0, self.lengths[-1] - min(many)) / REST_POINTS
        total = 0.0
        for point in range(REST_POINTS):
            rest = (point + 0.5) * width
            ended = [(1 - self.beyond(length + rest) / self.beyond(length), n) for length, n in many.items()]
            total += width * (1 - math.exp(sum(n * math.log(p) for p, n in ended)) if all(p > 0 for p, _ in ended) else width)
        return total

    @property
    def mean(self) -> float:
        """Of lengths up to the longest that ended (those beyond count as it); 0 where nothing has ended."""
        total, before, share = 0.0, 0, 1.0
        for length, there in zip(self.lengths, self.shares, strict=True):
            total += (length - before) * share
            before, share = length, there
        return total
