"""Response lengths: a trace, a distribution per client, or the built-in long-tailed one.

A trace is a CSV with one response a row. A distribution is a CSV with the columns client, output_tokens and prob, and maybe
window_s: every client weighs the same, and of a client every window, whatever the number of its requests. Either may be gzipped.

Invariants (tests/unit/test_simulation_lengths.py):
- a Pmf's mean, quantiles and draws are those of its scaled and clipped values;
- the same seed gives the same lengths, whichever order their groups end in.
"""

from __future__ import annotations

import csv
import gzip
import math
import random
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

from megatron_rl.config import UserError

# Competition mathematics with 64k tokens of reasoning: most answers about 6,500 tokens long, a heavy tail up to the limit. Two
# lognormals (weight, median, sigma), laid over a production reasoning model's lengths (alibaba/ServeGen) times 14. With a limit of
# 65,536 tokens: mean 12,079 against 12,273, p50 7,312 against 7,294, p95 50,053 against 62,342, at the limit 3.7 % against 4.9 %.
RING_1T_LIKE = ((0.84, 6_500.0, 0.62), (0.16, 29_000.0, 1.1))
LENGTH_COLUMNS = ("output_tokens", "output_length", "GeneratedTokens", "length", "tokens")


@dataclass(frozen=True)
class Pmf:
    """`lengths` ascending, each with its share."""

    lengths: tuple[int, ...]
    shares: tuple[float, ...]

    @classmethod
    def of(cls, weights: Mapping[int, float]) -> Pmf:
        total = math.fsum(weights.values())
        lengths = tuple(sorted(weights))
        return cls(lengths, tuple(weights[length] / total for length in lengths))

    @cached_property
    def cumulative(self) -> list[float]:
        return [*accumulate(self.shares[:-1]), 1.0]

    @cached_property
    def mean(self) -> float:
        return self.moment(1)

    def moment(self, power: int) -> float:
        return math.fsum(share * length**power for length, share in zip(self.lengths, self.shares, strict=True))

    def quantile(self, share: float) -> int:
        return self.lengths[bisect_left(self.cumulative, share)]

    def at_least(self, length: int) -> float:
        """The share of responses of `length` tokens or more."""
        return math.fsum(self.shares[bisect_left(self.lengths, length) :])

    def draw(self, stream: random.Random) -> int:
        return self.lengths[bisect_left(self.cumulative, stream.random())]


@dataclass(frozen=True)
class Lengths:
    """`all` responses; `clients` is what makes it up, in equal shares."""

    all: Pmf
    clients: tuple[Pmf, ...]


def built_in() -> Lengths:
    """Up to 2**17 tokens, so that clipping is the caller's."""

    def below(length: int) -> float:
        return sum(w * 0.5 * math.erfc(math.log(median / length) / sigma / math.sqrt(2)) for w, median, sigma in RING_1T_LIKE)

    bounds = [0.0, *(below(length) for length in range(1, 2**17)), 1.0]
    pmf = Pmf.of({length: bounds[length] - bounds[length - 1] for length in range(1, 2**17 + 1)})
    return Lengths(pmf, (pmf,))


def scaled(lengths: Lengths, scale: float, max_tokens: int) -> Lengths:
    """Every length times `scale`, at least 1 and at most `max_tokens`."""

    def scale_one(pmf: Pmf) -> Pmf:
        weights: dict[int, float] = defaultdict(float)
        for length, share in zip(pmf.lengths, pmf.shares, strict=True):
            weights[min(max_tokens, max(1, round(length * scale)))] += share
        return Pmf.of(weights)

    return Lengths(scale_one(lengths.all), tuple(scale_one(client) for client in lengths.clients))


def read(path: Path, column: str | None = None) -> Lengths:
    """`column`: the one with the lengths. Raises UserError naming the file, and the line where there is one."""
    try:
        with gzip.open(path, "rt", newline="") if path.suffix == ".gz" else path.open(newline="") as file:
            table = _Table(path, csv.DictReader(file), column)
            clients = table.clients() if "prob" in table.names else [Pmf.of(Counter(table.lengths()))]
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise _bad(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    return Lengths(_blend(clients), tuple(clients))


class _Table:
    def __init__(self, path: Path, rows: csv.DictReader[str], column: str | None) -> None:
        self.path, self.rows, self.names = path, rows, rows.fieldnames or []
        found = next((name for name in ([column] if column else LENGTH_COLUMNS) if name in self.names), None)
        if found is None:
            wanted = column or " or ".join(LENGTH_COLUMNS)
            raise _bad(f"{path}: no column {wanted}; it has {', '.join(self.names) or 'none'}")
        self.column = found

    def lengths(self) -> list[int]:
        lengths = [self._length(row) for row in self.rows]
        if not lengths:
            raise _bad(f"{self.path}: no row")
        return lengths

    def clients(self) -> list[Pmf]:
        windows: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(float)))
        for row in self.rows:
            windows[row.get("client", "")][row.get("window_s", "")][self._length(row)] += self._number(row, "prob")
        pmfs = [list(each.values()) for each in windows.values()]
        if not pmfs or not all(sum(pmf.values()) for each in pmfs for pmf in each):
            raise _bad(f"{self.path}: no row, or a client without probability")
        return [_blend([Pmf.of(pmf) for pmf in each]) for each in pmfs]

    def _length(self, row: Mapping[str, str]) -> int:
        return max(1, round(self._number(row, self.column)))

    def _number(self, row: Mapping[str, str], column: str) -> float:
        try:
            number = float(row[column])
        except (ValueError, TypeError):
            number = -1.0
        if not 0 <= number < math.inf:
            raise _bad(f"{self.path}:{self.rows.line_num}: {column}={row[column]!r} is no number of 0 or more")
        return number


def _blend(parts: Iterable[Pmf]) -> Pmf:
    weights: dict[int, float] = defaultdict(float)
    for part in parts:
        for length, share in zip(part.lengths, part.shares, strict=True):
            weights[length] += share
    return Pmf.of(weights)


def _bad(message: str) -> UserError:
    return UserError(message, exit_code=1)
