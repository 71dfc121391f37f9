"""The report's section about the gap between trainer and engine: its curves, which tokens have it, and how it is distributed.

Invariant (tests/unit/test_observability_report.py): a run that measured nothing of it has no such section; a group without tokens
has no row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from statistics import fmean
from typing import Any

from megatron_rl.algorithms.histogram import Histogram
from megatron_rl.observability.charts import Scale, Series, Sides, line_chart, number_text, two_sided_histogram

Row = Mapping[str, Any]
LAST = 10  # steps that the tables average over
LAYER_AGREEMENT, LOWEST_AGREEMENT = "routing/agreement_layer_", "lowest agreement"
# title, unit, axis, (metric, name) of each line, note
CURVES: tuple[tuple[str, str, Scale, tuple[tuple[str, str], ...], str], ...] = (
    (
        "Train/infer gap |old − engine|",
        "nats",
        "log",
        (
            ("mismatch/logprob_gap_max", "largest"),
            ("mismatch/logprob_gap_mean", "mean"),
            ("mismatch/stale_gap_mean", "mean of carried tokens"),
        ),
        "Tokens carried over from older weights differ by staleness, the others by the two engines' arithmetic.",
    ),
    (
        "Percentiles of the gap",
        "nats",
        "log",
        (("mismatch/gap_p99.9", "99.9 %"), ("mismatch/gap_p99", "99 %"), ("mismatch/gap_p50", "median")),
        "Of all tokens, to an eighth of a decade.",
    ),
    (
        "Gap in probability |p old − p engine|",
        "",
        "log",
        (("mismatch/prob_gap_max", "largest"), ("mismatch/prob_gap_p99", "99 %"), ("mismatch/prob_gap_mean", "mean")),
        "Training has been seen to fail once it passes 0.05 (IcePop).",
    ),
    (
        "Tokens masked by the correction",
        "%",
        "zero",
        (
            ("mismatch/masked_fraction", "of trained tokens"),
            ("mismatch/masked_low_fraction", "policy finds them less likely"),
            ("mismatch/masked_high_fraction", "likelier"),
        ),
        "One or two in a thousand are usual.",
    ),
    (
        "KL(engine || policy)",
        "nats",
        "log",
        (("mismatch/kl_engine_train", "per token (k3)"),),
        "Over the engine's own samples, staleness included.",
    ),
    ("Effective sample size", "%", "fit", (("mismatch/ess", "of all tokens"),), "100 % where trainer and engine agree."),
    (
        "Routers that choose the engine's experts",
        "%",
        "fit",
        (("routing/agreement", "mean of the layers"), (LOWEST_AGREEMENT, "the layer that agrees least")),
        "Of all choices that the engine recorded.",
    ),
)
GROUPS = (  # metric prefix, heading, (group, its name), the columns: (metric, heading, unit)
    (
        "mismatch/by_age",
        "Weight versions since sampling",
        (("0", "0"), ("1", "1"), ("2-3", "2 to 3"), ("4-7", "4 to 7"), ("8_up", "8 and more")),
        ("share", "of tokens", "%"),
    ),
    (
        "mismatch/by_entropy",
        "Tokens by entropy",
        (("lowest_50", "lowest 50 %"), ("50-80", "50 to 80 %"), ("80-95", "80 to 95 %"), ("top_5", "top 5 %")),
        ("entropy_from", "entropy from", "nats"),
    ),
)
COLUMNS = (
    ("gap_mean", "gap, mean", ""),
    ("gap_p99", "99 %", ""),
    ("prob_gap_mean", "in probability", ""),
    ("masked_fraction", "masked", "%"),
)


def mismatch_body(steps: Sequence[Row], histograms: Sequence[Row]) -> str:
    """`steps` of metrics.jsonl, `histograms` of mismatch.jsonl; an empty string where nothing was measured."""
    steps = [{**row, LOWEST_AGREEMENT: lowest_agreement(row)} for row in steps]
    figures = [
        line_chart(title, [Series(name, [(row["step"], row.get(key)) for row in steps]) for key, name in lines], unit, scale, note)
        for title, unit, scale, lines, note in CURVES
    ]
    figures.append(distribution(histograms))
    tables = "".join(filter(None, (group_table(steps[-LAST:], *group) for group in GROUPS)))
    curves = "".join(figures)
    if not curves:
        return ""
    return f'<div class="grid3">{curves}</div>' + (f'<div class="two tables">{tables}</div>' if tables else "")


def lowest_agreement(row: Row) -> float | None:
    return min((value for name, value in row.items() if name.startswith(LAYER_AGREEMENT) and value is not None), default=None)


def group_table(
    steps: Sequence[Row], prefix: str, heading: str, groups: Sequence[tuple[str, str]], first: tuple[str, str, str]
) -> str:
    """Means over the given steps; of a group, over those that had tokens of it."""
    columns, rows = (first, *COLUMNS), []
    for group, name in groups:
        values = [
            [row[key] for row in steps if row.get(key := f"{prefix}/{group}/{metric}") is not None] for metric, _, _ in columns
        ]
        if values[0]:
            cells = [number_text(fmean(v) if v else None, unit) for v, (_, _, unit) in zip(values, columns, strict=True)]
            rows.append(f"<tr><td>{escape(name)}</td>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    if not rows:
        return ""
    head = "".join(f"<th>{escape(text)}</th>" for text in (heading, *(title for _, title, _ in columns)))
    when = f"step {steps[-1]['step']}" if len(steps) == 1 else f"steps {steps[0]['step']} to {steps[-1]['step']}"
    return (
        f'<div><div class="framed scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        f'<p class="note">Means over {when}; gaps in nats.</p></div>'
    )


def distribution(histograms: Sequence[Row]) -> str:
    """The gap's histogram at the last step against the first."""
    rows = [row for row in histograms if "mismatch/gap_above" in row or "mismatch/gap_below" in row]
    by_step = {row["step"]: row for row in rows}
    if not by_step:
        return ""
    ends = dict.fromkeys((min(by_step), max(by_step)))
    sides = [Sides(f"step {step}", *(_side(by_step[step], which) for which in ("below", "above"))) for step in ends]
    return two_sided_histogram(
        "The gap's distribution, old − engine",
        sides,
        "Nats, by decades to both sides; share of the step's tokens per eighth of a decade. On the left the policy finds a token "
        "less likely than the engine did.",
    )


def _side(row: Row, which: str) -> Histogram:
    name = f"mismatch/gap_{which}"
    return Histogram.from_json(row[name]) if name in row else Histogram(0.0, 1.0, ())
