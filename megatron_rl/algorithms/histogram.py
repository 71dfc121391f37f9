"""Counts of positive numbers in bins of equal width of their decimal logarithm. No tensors: what is written down and drawn.

Invariants (tests/unit/test_algorithms_mismatch.py):
- trimming keeps every count and the place of every bin;
- a quantile is the upper end of the bin that holds it: never below the exact one, and above it by a bin's width at most.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Histogram:
    """Bin i counts numbers whose log10 lies in [start + i width, start + (i + 1) width); as it is made, the first bin has smaller
    ones, too, zeros among them, and the last has larger ones."""

    start: float
    width: float
    counts: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def total(self) -> float:
        return sum(self.counts)

    def edge(self, number: int) -> float:
        """log10 of where bin `number` begins, and bin `number` - 1 ends."""
        return self.start + number * self.width

    def trimmed(self) -> Self:
        """Without empty bins at either end."""
        filled = [number for number, count in enumerate(self.counts) if count]
        first, end = (filled[0], filled[-1] + 1) if filled else (0, 0)
        return type(self)(self.edge(first), self.width, self.counts[first:end])

    def to_json(self) -> dict[str, Any]:
        kept = self.trimmed()
        return {"log10_from": kept.start, "log10_width": kept.width, "counts": [round(count) for count in kept.counts]}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Self:
        return cls(float(row["log10_from"]), float(row["log10_width"]), tuple(row["counts"]))


def quantile(counts: Sequence[float], start: float, width: float, share: float, largest: float) -> float:
    """The smallest upper end of a bin below which at least `share` of all lies; 0 in the first bin, whose numbers are too small to
    tell apart, and in the last one, which has no end, `largest`: the largest number, above which nothing is told. 0 of nothing."""
    wanted = share * sum(counts)
    if wanted <= 0:
        return 0.0
    number = next(i for i, below in enumerate(accumulate(counts)) if below >= wanted * (1 - 1e-12))
    if number == 0:
        return 0.0
    return largest if number == len(counts) - 1 else min(math.pow(10, start + (number + 1) * width), largest)
