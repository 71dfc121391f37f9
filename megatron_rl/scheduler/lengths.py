"""How long rollouts are, from those that ended and those that did not, and what a schedule does to the lengths that are trained.

Rollouts that are still growing, or were given up, are longer than what is known of them: lengths are a survival problem, and the
product-limit estimate (Kaplan and Meier, 1958) is what counts them rightly. The plain mean of what has ended would not: a token
budget ends the short ones first.

Invariants: without anything unended the estimate is the plain distribution; rollouts that are cut, at whatever lengths, do not make
it shorter.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


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
        share = 1.0
        for known, there in zip(self.lengths, self.shares, strict=True):
            if known > length:
                break
            share = there
        return share

    @property
    def mean(self) -> float:
        """Of lengths up to the longest that ended (those beyond count as it); 0 where nothing has ended."""
        total, before, share = 0.0, 0, 1.0
        for length, there in zip(self.lengths, self.shares, strict=True):
            total += (length - before) * share
            before, share = length, there
        return total
