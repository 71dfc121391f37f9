"""Line charts and histograms as inline SVG: no library, no script needed to read them (one in the page adds the values of a line
under the pointer).

Invariants (tests/unit/test_observability_report.py): a number that is missing or not finite is a gap in its line, never a zero; a
curve of any length becomes at most `MAX_POINTS` points, each the mean of a run of steps; a histogram's area is its share of all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from megatron_rl.algorithms.histogram import Histogram

WIDTH, HEIGHT = 420, 190
LEFT, RIGHT, TOP, BOTTOM = 52, 18, 10, 24  # margins of the plot inside the SVG
MAX_POINTS = 300
SMOOTHED_FROM = 20  # points; below, a smoothed line would hide more than it shows
Scale = Literal["zero", "fit", "log"]  # the axis starts at zero, or fits the data, or is logarithmic
Points = list[tuple[float, float | None]]  # (step, value)


@dataclass(frozen=True)
class Series:
    name: str
    points: Points


def line_chart(title: str, series: Sequence[Series], unit: str = "", scale: Scale = "zero", note: str = "") -> str:
    """A figure; an empty string when no series has a number."""
    shown = [Series(s.name, thinned(cleaned(s.points, positive=scale == "log"))) for s in series]
    shown = [s for s in shown if any(value is not None for _, value in s.points)]
    if not shown:
        return ""
    steps = [step for s in shown for step, _ in s.points]
    values = [value for s in shown for _, value in s.points if value is not None]
    x = _Axis(min(steps), max(steps), LEFT, WIDTH - RIGHT)
    low = min(0.0, *values) if scale == "zero" else min(values)
    ticks = log_ticks(low, max(values)) if scale == "log" else linear_ticks(low, max(values))
    y = _Axis(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP, log=scale == "log")
    body = [_grid(x, y, ticks, unit)]
    for number, s in enumerate(shown, start=1):
        places = [(x(step), None if value is None else y(value)) for step, value in s.points]
        if len(places) >= SMOOTHED_FROM:
            smooth = [(x(step), None if value is None else y(value)) for step, value in smoothed(s.points)]
            body += [_path(places, f"line s{number} raw"), _path(smooth, f"line s{number}")]
        else:
            body += [_path(places, f"line s{number}"), *_dots(places, number)]
    legend = "".join(
        f'<span class="key"><i class="s{n}"></i>{escape(s.name)} <b>{escape(number_text(last(s.points), unit))}</b></span>'
        for n, s in enumerate(shown, start=1)
    )
    data = json.dumps({"unit": unit, "series": [[s.name, s.points] for s in shown], "x": [x.low, x.high]})
    return (
        f'<figure class="chart" data-chart="{escape(data, quote=True)}"><figcaption><h3>{escape(title)}</h3>'
        f'<div class="legend">{legend}</div></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}">{"".join(body)}</svg>'
        + (f'<p class="note">{escape(note)}</p>' if note else "")
        + "</figure>"
    )


@dataclass(frozen=True)
class Sides:
    """Sizes of a signed number, by its sign."""

    name: str
    below: Histogram
    above: Histogram


def two_sided_histogram(title: str, shown: Sequence[Sides], note: str = "") -> str:
    """A figure: sizes grow by decades to both sides of the middle; heights are shares of all that one of `shown` counts."""
    shown = [s for s in shown if s.below.total + s.above.total > 0]
    if not shown:
        return ""
    filled = [kept for s in shown for h in (s.below, s.above) if (kept := h.trimmed()).counts]
    low, high = min(h.start for h in filled), max(h.edge(len(h)) for h in filled)
    x = _Axis(low - high, high - low, LEFT, WIDTH - RIGHT)
    outlines = [[_outline(h, low, sign, s.below.total + s.above.total) for sign, h in ((-1, s.below), (1, s.above))] for s in shown]
    ticks = linear_ticks(0.0, max(height for sides in outlines for side in sides for _, height in side))
    y = _Axis(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP)
    body = [*_levels(y, ticks, "%"), *_decades(x, low, high)]
    for number, sides in enumerate(outlines, start=1):
        for side in sides:
            places: list[tuple[float, float | None]] = [(x(place), y(height)) for place, height in side]
            if places:
                body += [_path(places, f"fill s{number}"), _path(places, f"line s{number}")]
    legend = "".join(f'<span class="key"><i class="s{n}"></i>{escape(s.name)}</span>' for n, s in enumerate(shown, start=1))
    return (
        f'<figure class="chart"><figcaption><h3>{escape(title)}</h3><div class="legend">{legend}</div></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}">{"".join(body)}</svg>'
        + (f'<p class="note">{escape(note)}</p>' if note else "")
        + "</figure>"
    )


def _outline(histogram: Histogram, low: float, sign: int, total: float) -> list[tuple[float, float]]:
    """Steps from the axis and back to it: (decades from the middle, share of all)."""
    kept = histogram.trimmed()
    corners = []
    for number, count in enumerate(kept.counts):
        corners += [(kept.edge(number + end), count / total) for end in (0, 1)]
    if corners:
        corners = [(corners[0][0], 0.0), *corners, (corners[-1][0], 0.0)]
    return [(sign * (edge - low), height) for edge, height in corners]


def _decades(x: _Axis, low: float, high: float) -> list[str]:
    first, last = math.floor(low) + 1, math.floor(high)
    step = max(-(-(last - first) // 3), 1)
    marks = [(sign * (decade - low), sign, decade) for sign in (-1, 1) for decade in range(last, first - 1, -step)]
    texts = [(0.0, "0"), *((place, f"{'−' if sign < 0 else ''}{_tick_text(10.0**decade, '')}") for place, sign, decade in marks)]
    return [
        f'<text class="tick" x="{x(place):.1f}" y="{HEIGHT - 7}" text-anchor="middle">{escape(text)}</text>'
        for place, text in texts
    ]


def cleaned(points: Points, positive: bool = False) -> Points:
    def usable(value: float | None) -> bool:
        return value is not None and math.isfinite(value) and (value > 0 or not positive)

    return [(step, value if usable(value) else None) for step, value in points]


def thinned(points: Points) -> Points:
    """At most MAX_POINTS points: means over equal runs of steps, at the last step of each."""
    size = -(-len(points) // MAX_POINTS)
    if size <= 1:
        return points
    runs = [points[i : i + size] for i in range(0, len(points), size)]
    return [(run[-1][0], _mean([value for _, value in run if value is not None])) for run in runs]


def smoothed(points: Points) -> Points:
    """The mean of an exponential mean from either side, each over about a twentieth of the curve: no lag. Gaps stay gaps."""
    keep = 1 - 1 / max(2.0, len(points) / 20)

    def one_way(values: Iterable[float | None]) -> list[float]:
        total, weight, out = 0.0, 0.0, []
        for value in values:
            if value is not None:
                total, weight = keep * total + value, keep * weight + 1
            out.append(total / weight if weight else 0.0)
        return out

    values = [value for _, value in points]
    forth, back = one_way(values), one_way(reversed(values))[::-1]
    return [(step, None if value is None else (a + b) / 2) for (step, value), a, b in zip(points, forth, back, strict=True)]


def last(points: Points) -> float | None:
    return next((value for _, value in reversed(points) if value is not None), None)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def linear_ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers that enclose the data."""
    if low == high:
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)
    rough = (high - low) / 4
    unit: float = 10.0 ** math.floor(math.log10(rough))
    step = next(multiple * unit for multiple in (1, 2, 2.5, 5, 10) if multiple * unit >= rough * 0.999)
    first, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, max(end, first + 1) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten that enclose the data, at most six of them."""
    first, end = math.floor(math.log10(low)), math.ceil(math.log10(high))
    end = max(end, first + 1)
    step = -(-(end - first) // 5)
    return [10.0**i for i in range(first, end + step, step)]


def number_text(value: float | None, unit: str = "") -> str:
    if value is None:
        return "–"
    if unit == "%":
        return f"{value * 100:.1f}\u00a0%" if abs(value) >= 0.001 or value == 0 else f"{value * 100:.1e}\u00a0%"
    if value and not 1e-3 <= abs(value) < 1e6:
        text = f"{value:.1e}"
    elif abs(value) >= 100:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.3g}"
    return f"{text} {unit}".rstrip()


class _Axis:
    def __init__(self, low: float, high: float, start: float, end: float, log: bool = False) -> None:
        self.low, self.high, self._log = low, high, log
        a, b = (math.log10(low), math.log10(high)) if log else (low, high)
        self._offset, self._start = a, start
        self._slope = (end - start) / (b - a) if b > a else 0.0

    def __call__(self, value: float) -> float:
        return self._start + ((math.log10(value) if self._log else value) - self._offset) * self._slope


def _grid(x: _Axis, y: _Axis, ticks: Sequence[float], unit: str) -> str:
    lines = _levels(y, ticks, unit)
    marks = [step for step in linear_ticks(x.low, x.high) if x.low <= step <= x.high and step == int(step)]
    lines += [f'<text class="tick" x="{x(step):.1f}" y="{HEIGHT - 7}" text-anchor="middle">{step:,.0f}</text>' for step in marks]
    return "".join(lines)


def _levels(y: _Axis, ticks: Sequence[float], unit: str) -> list[str]:
    lines = []
    for tick in ticks:
        height = y(tick)
        label = escape(_tick_text(tick, unit))
        lines.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>')
        lines.append(f'<text class="tick" x="{LEFT - 6}" y="{height + 3.5:.1f}" text-anchor="end">{label}</text>')
    return lines


def _tick_text(value: float, unit: str) -> str:
    if unit == "%":
        return f"{value * 100:g} %"
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,g}"


def _path(places: Sequence[tuple[float, float | None]], css: str) -> str:
    commands, pen = [], "M"
    for x, y in places:
        if y is None:
            pen = "M"
        else:
            commands.append(f"{pen}{x:.1f} {y:.1f}")
            pen = "L"
    return f'<path class="{css}" d="{"".join(commands)}"/>'


def _dots(places: Sequence[tuple[float, float | None]], number: int) -> list[str]:
    return [f'<circle class="dot s{number}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places if y is not None]
