"""What a whole run comes to, from its metrics.jsonl alone, so that resumed runs add up."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSONL file, in order; none of an absent one."""
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows
    for line in path.read_bytes().split(b"\n")[:-1]:  # what follows the last newline was torn by a crash
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def rl_summary(steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Totals and rates over all steps; `eval_start` and `eval_end` are the first and the last evaluation."""

    def total(name: str) -> float:
        return float(sum(row.get(name) or 0.0 for row in steps))  # null: it was not finite

    measured = [{key.removeprefix("eval/"): value for key, value in row.items()} for row in evaluations]
    return {
        "rl_steps": len(steps),
        "seconds_rl": round(total("time/step_s") + sum(row["time/eval_s"] for row in evaluations), 1),
        "generated_tokens": int(total("rollout/generated_tokens")),
        "trained_tokens": int(total("train/tokens")),
        "generated_tokens_per_s": round(_rate(total("rollout/generated_tokens"), total("time/rollout_s")), 1),
        "trained_tokens_per_s": round(_rate(total("train/tokens"), total("time/train_s")), 1),
        "eval_start": measured[0] if measured else None,
        "eval_end": measured[-1] if len(measured) > 1 else None,
    }


def _rate(amount: float, seconds: float) -> float:
    return amount / seconds if seconds else 0.0
