"""A run as one page: numbers before and after, what they mean, curves, samples.

    python -m megatron_rl.observability.report RUN_DIR

Reads what the run directory holds of metrics.jsonl, mismatch.jsonl, evaluations.jsonl, rollouts/, summary.json and config.yaml; the
page of a run that is still going or was killed is as good as its files. It is one file and asks for nothing else.

Invariants: whatever a model wrote is text, never markup; what has no numbers is left out, not drawn empty.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from megatron_rl.config.errors import UserError
from megatron_rl.observability import charts
from megatron_rl.observability.charts import Scale, Series, line_chart, number_text
from megatron_rl.observability.console import clock
from megatron_rl.observability.lessons import NOISE, lessons
from megatron_rl.observability.mismatch_section import mismatch_body
from megatron_rl.observability.report_style import CSS, SCRIPT
from megatron_rl.observability.summary import read_rows

Row = Mapping[str, Any]
SAMPLES = 8  # shown of the first dump and of the last
VERSION_COLOURS = 4
DOMAINS = 6  # lines of a chart, at most
DOMAIN_GROUPS = "reward/groups/"

# title, unit, axis, (metric, name) of each line, note
CHARTS: tuple[tuple[str, str, Scale, tuple[tuple[str, str], ...], str], ...] = (
    ("Reward", "", "zero", (("reward/mean", "mean over the step's samples"),), ""),
    ("Response length", "tokens", "zero", (("response/tokens_mean", "mean"),), ""),
    (
        "Groups by outcome",
        "%",
        "zero",
        (("reward/all_correct_fraction", "all right"), ("reward/all_wrong_fraction", "all wrong")),
        "Neither carries a gradient: the update learns from the rest.",
    ),
    ("Negative log-likelihood", "nats", "zero", (("sft/nll", "per response token"),), ""),
    ("Entropy", "nats", "zero", (("policy/entropy", "per token"),), ""),
    ("Gradient norm", "", "zero", (("policy/grad_norm", "before clipping"),), ""),
    (
        "Unfinished rollouts carried over",
        "",
        "zero",
        (("rollout/carried", "at the end of the step"),),
        "C3PO++ ends a step when its token budget is spent; what is unfinished goes on in the next.",
    ),
    ("Token age", "versions", "zero", (("rollout/token_age_mean", "mean"), ("rollout/token_age_max", "oldest")), ""),
    (
        "Seconds per step",
        "s",
        "zero",
        (("time/rollout_s", "rollouts"), ("time/train_s", "training"), ("time/sync_s", "weight push")),
        "",
    ),
    ("Throughput", "tokens/s", "zero", (("generated_per_s", "generated"), ("trained_per_s", "trained")), ""),
    ("Learning rate", "", "zero", (("policy/lr", "of the step"),), ""),
)
PASSES = (("", "sampled"), ("_greedy", "greedy"), ("_forced", "made to show its working"))


def write_report(run_dir: str | Path) -> Path:
    """Raises UserError if the directory holds no metrics."""
    run_dir = Path(run_dir)
    steps = with_rates(read_rows(run_dir / "metrics.jsonl"))
    evaluations = read_rows(run_dir / "evaluations.jsonl")
    if not steps and not evaluations:
        raise UserError(f"{run_dir}: no metrics.jsonl with a complete line; nothing to report", exit_code=1)
    summary_file = run_dir / "summary.json"
    summary = json.loads(summary_file.read_text()) if summary_file.exists() else {}
    mismatch = mismatch_body(steps, read_rows(run_dir / "mismatch.jsonl"))
    sections = [
        tiles(steps, evaluations, summary),
        section("What RL did and did not teach", lesson_box(evaluations)) if "reward/mean" in _keys(steps) or evaluations else "",
        section("Held-out prompts", evaluation_table(evaluations)) if evaluations else "",
        section("Curves", curves(steps, evaluations)),
        section("Mismatch between trainer and engine", mismatch) if mismatch else "",
        samples(run_dir / "rollouts"),
        configuration(run_dir / "config.yaml"),
    ]
    file = run_dir / "report.html"
    partial = file.with_suffix(".html.tmp")
    partial.write_text(page(run_dir.resolve().name, subtitle(steps), "".join(sections)), encoding="utf-8")
    partial.replace(file)
    return file


def with_rates(rows: Sequence[Row]) -> list[Row]:
    """One row a step (the last one written), with tokens per second added."""
    by_step = {row["step"]: row for row in rows}
    out: list[Row] = []
    for row in (by_step[step] for step in sorted(by_step)):
        rates = {}
        for name, tokens, seconds in (
            ("generated_per_s", "rollout/generated_tokens", "time/rollout_s"),
            ("trained_per_s", "train/tokens", "time/train_s"),
        ):
            if row.get(tokens) is not None and row.get(seconds):
                rates[name] = row[tokens] / row[seconds]
        out.append({**row, **rates})
    return out


def _keys(rows: Sequence[Row]) -> set[str]:
    return {key for row in rows for key in row}


def page(name: str, sub: str, body: str) -> str:
    script = SCRIPT
    places = {"LEFT": charts.LEFT, "RIGHT": charts.RIGHT, "WIDTH": charts.WIDTH, "BOTTOM": charts.HEIGHT - charts.BOTTOM}
    for mark, value in places.items():
        script = script.replace(f"__{mark}__", str(value))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(name)}: report</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{CSS}</style></head><body><main>'
        f'<h1>{escape(name)}</h1><p class="sub">{escape(sub)}</p>{body}'
        "<footer>Written by megatron_rl from the run directory's own files; every number is in metrics.jsonl, evaluations.jsonl or "
        f"summary.json.</footer></main><script>{script}</script></body></html>\n"
    )


def section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def subtitle(steps: Sequence[Row]) -> str:
    if not steps:
        return "No step is complete yet."
    kind = "Supervised warm-up" if "sft/nll" in _keys(steps) else "Reinforcement learning with verifiable rewards"
    return f"{kind}, {len(steps):,} steps"


def tiles(steps: Sequence[Row], evaluations: Sequence[Row], summary: Row) -> str:
    """The headline: what changed, what it cost."""
    parts = []

    def change(label: str, key: str, form: Callable[[float], str], hint: Callable[[float], str]) -> None:
        before, after = (evaluations[0].get(key), evaluations[-1].get(key)) if len(evaluations) > 1 else (None, None)
        if before is not None and after is not None:
            parts.append(_tile(label, f"<small>{escape(form(before))} → </small>{escape(form(after))}", hint(after - before)))

    def points(difference: float) -> str:
        return f"{difference * 100:+.1f} points, held out"

    change("Accuracy, sampled", "eval/accuracy", lambda v: number_text(v, "%"), points)
    change("Accuracy, greedy", "eval/accuracy_greedy", lambda v: number_text(v, "%"), points)
    change("Mean answer, held out", "eval/response_tokens", lambda v: f"{v:.1f}", lambda d: f"tokens, {d:+.1f}")
    rates = {
        what: f"{median(values):,.0f}"
        for what in ("generated", "trained")
        if (values := [row[f"{what}_per_s"] for row in steps if f"{what}_per_s" in row])
    }
    if rates:
        (first, value), *others = rates.items()
        hint = ", ".join([first, *(f"{other} {what}" for what, other in others)])
        parts.append(_tile("Median throughput", f"{value} <small>tokens/s</small>", hint))
    seconds = {name: summary[f"seconds_{name}"] for name in ("setup", "sft", "rl") if f"seconds_{name}" in summary}
    if seconds:
        names = {"setup": "set-up", "sft": "SFT", "rl": "RL"}
        split = ", ".join(f"{names[name]} {clock(spent)}" for name, spent in seconds.items())
        parts.append(_tile("Wall clock", clock(sum(seconds.values())), split))
    if "sft/nll" in _keys(steps):
        nll = number_text(charts.last(_points(steps, "sft/nll")))
        parts.append(_tile("Negative log-likelihood", nll, "nats per token, last step"))
    return f'<div class="tiles">{"".join(parts)}</div>' if parts else ""


def _tile(label: str, value: str, hint: str) -> str:
    lines = (("label", escape(label)), ("value", value), ("hint", escape(hint)))
    return '<div class="tile">' + "".join(f'<div class="{css}">{text}</div>' for css, text in lines) + "</div>"


def _points(rows: Sequence[Row], key: str) -> charts.Points:
    return [(row["step"], row.get(key)) for row in rows if key in row]


def lesson_box(evaluations: Sequence[Row]) -> str:
    return '<div class="lesson">' + "".join(f"<p>{escape(text)}</p>" for text in lessons(evaluations)) + "</div>"


def evaluation_table(evaluations: Sequence[Row]) -> str:
    first, final = evaluations[0], evaluations[-1]
    rows = []
    for suffix, name in PASSES:
        if f"eval/accuracy{suffix}" not in final:
            continue
        before, after = first.get(f"eval/accuracy{suffix}"), final[f"eval/accuracy{suffix}"]
        cells = [f"<td>{escape(number_text(a, '%'))}{_bar(a)}</td>" for a in (before, after)]
        change = "–" if before is None else f"{(after - before) * 100:+.1f}".replace("-", "−")
        css = "" if before is None or abs(after - before) < NOISE else "up" if after > before else "down"
        lengths = " → ".join(f"{row.get(f'eval/response_tokens{suffix}', float('nan')):.1f}" for row in (first, final))
        cut = number_text(final.get(f"eval/truncated{suffix}"), "%")
        rows.append(f'<tr><td>{name}</td>{"".join(cells)}<td class="{css}">{change}</td><td>{lengths}</td><td>{cut}</td></tr>')
    heads = ("", f"step {first['step']}", f"step {final['step']}", "change, points", "tokens per answer", "cut off")
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    return f'<div class="framed scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _bar(value: float | None) -> str:
    return "" if value is None else f'<span class="bar"><i style="width:{min(max(value, 0), 1) * 100:.1f}%"></i></span>'


def curves(steps: Sequence[Row], evaluations: Sequence[Row]) -> str:
    figures = [
        line_chart(title, [Series(name, _points(steps, key)) for key, name in lines], unit, scale, note)
        for title, unit, scale, lines, note in CHARTS
    ]
    figures.insert(1, rewards_by_domain(steps))
    if len(evaluations) > 2:
        lines = [Series(name, _points(evaluations, f"eval/accuracy{suffix}")) for suffix, name in PASSES]
        figures.insert(1, line_chart("Held-out accuracy", lines, "%"))
    return f'<div class="grid3">{"".join(figures)}</div>'


def rewards_by_domain(steps: Sequence[Row]) -> str:
    """Of the domains with the most groups; one alone is the whole."""
    groups: Counter[str] = Counter()
    for row in steps:
        for key, value in row.items():
            if key.startswith(DOMAIN_GROUPS) and value:
                groups[key.removeprefix(DOMAIN_GROUPS)] += value
    if len(groups) < 2:
        return ""
    shown = [Series(domain, _points(steps, f"reward/mean/{domain}")) for domain, _ in groups.most_common(DOMAINS)]
    return line_chart("Reward by domain", shown, note=f"The largest of {len(groups)} domains." if len(groups) > DOMAINS else "")


def samples(folder: Path) -> str:
    """Of the first and the last dump, evenly through each: not chosen by what they say."""
    dumps = sorted((int(file.stem.removeprefix("step_")), file) for file in folder.glob("step_*.jsonl"))
    if not dumps:
        return ""
    columns = []
    for step, file in dict.fromkeys((dumps[0], dumps[-1])):
        rows = read_rows(file)
        count = min(SAMPLES, len(rows))
        cards = "".join(sample_card(rows[i * len(rows) // count]) for i in range(count))
        columns.append(f"<div><h3>Step {step}</h3>{cards}</div>")
    note = '<p class="sub">A shaded stretch of a response was sampled under one version of the weights.</p>'
    return section("Rollouts, early and late", f'{note}<div class="two">{"".join(columns)}</div>')


def sample_card(row: Row) -> str:
    good = "good" if row["status"] == "correct" else "bad"
    spans = [f"{tokens} under weights {version}" for version, tokens in row["versions"]]
    pieces = row.get("pieces") or [row["response"]]
    body = "".join(
        f'<span class="v v{version % VERSION_COLOURS}" title="weights version {version}">{escape(text)}</span>'
        for (version, _), text in zip(row["versions"], pieces, strict=False)  # an empty response has no version
    )
    facts = [f"tokens: {', '.join(spans)}"] if spans else ["no tokens"]
    if row["finish_reason"] == "length":
        facts.append("cut off")
    if row["status"] != "correct":
        facts.append(f"right: {row['answer']}" if row["status"] == "wrong" else row["reason"])
    return (
        f'<div class="card"><div class="head"><span class="chip {good}">{escape(row["status"])} {row["reward"]:g}</span>'
        f"<span>{escape(' · '.join(facts))}</span></div>"
        f'<pre><span class="prompt">{escape(row["prompt"])}</span>{body}</pre></div>'
    )


def configuration(file: Path) -> str:
    if not file.exists():
        return ""
    return f"<details><summary>Configuration</summary><pre>{escape(file.read_text())}</pre></details>"


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    try:
        print(write_report(sys.argv[1]))
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(problem.exit_code)
