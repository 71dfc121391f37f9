"""What a whole run comes to, from its metrics.jsonl alone, so that resumed runs add up."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics.jsonl, in order."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # a line torn by a crash is the last one
            break
    return rows


def rl_summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Totals and rates over all steps; `eval_start` and `eval_end` are the first and last evaluation."""
    steps = [row for row in rows if row["step"] > 0]
    evaluations = [{k.removeprefix("eval/"): v for k, v in row.items() if k.startswith("eval/")} for row in rows]
    evaluations = [evaluation for evaluation in evaluations if evaluation]

    def total(name: str) -> float:
        return sum(row.get(name, 0.0) for row in steps)

    return {
        "rl_steps": len(steps),
        "seconds_rl": round(total("time/step_s") + rows[0].get("time/eval_s", 0.0) * (rows[0]["step"] == 0), 1) if rows else 0.0,
        "generated_tokens": int(total("rollout/generated_tokens")),
        "trained_tokens": int(total("train/tokens")),
        "generated_tokens_per_s": round(_rate(total("rollout/generated_tokens"), total("time/rollout_s")), 1),
        "trained_tokens_per_s": round(_rate(total("train/tokens"), total("time/train_s")), 1),
        "eval_start": evaluations[0] if evaluations else None,
        "eval_end": evaluations[-1] if len(evaluations) > 1 else None,
    }


def _rate(amount: float, seconds: float) -> float:
    return amount / seconds if seconds else 0.0
