"""What we say of C3PO++, each sentence with its setting and its bar: 480 prompts x 8 up to 65,536 tokens on 64 engines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_rl.config.simulate import Scheduler, SimulationRun
from megatron_rl.simulation.compare import against
from megatron_rl.simulation.results import Result


@dataclass(frozen=True)
class Claim:
    name: str
    baseline: Scheduler
    at_least: Mapping[str, float]
    changes: Mapping[str, Any] = field(default_factory=dict)  # dotted keys of the run

    def run(self, given: SimulationRun) -> SimulationRun:
        """The claim's setting with the given lengths, seed, steps and processes."""
        values = SimulationRun(lengths=given.lengths, steps=given.steps, jobs=given.jobs).model_dump()
        for key, value in self.changes.items():
            *parents, name = key.split(".")
            place = values
            for parent in parents:
                place = place[parent]
            place[name] = value
        return SimulationRun.model_validate(values)

    def judge(self, result: Result, baseline: Result) -> list[tuple[str, float, float, float, bool]]:
        """(number, value, lowest, highest, holds)"""
        values = asdict(result) | against(result, baseline)
        bars = {name: (bar, float("inf")) for name, bar in self.at_least.items()} | PRICES
        return [(name, values[name], low, high, low <= values[name] <= high) for name, (low, high) in bars.items()]


# No speed without them.
PRICES = {"length_bias": (-0.015, 0.015), "tail_ratio": (0.95, 1.05), "dropped_fraction": (0.0, 0.01)}
FREE = {"engines.prefill_tokens_per_s": None}
CLAIMS = (
    Claim(
        "prefill free",
        "synchronous",
        {"rollout_speedup": 4.0, "end_to_end_speedup": 1.8, "work_conserving_fraction": 0.97},
        FREE,
    ),
    Claim("prefill charged", "synchronous", {"work_conserving_fraction": 0.85}),
    Claim(
        "32,768 tokens at most, prefill charged",
        "synchronous",
        {"rollout_speedup": 2.5, "end_to_end_speedup": 1.55},
        {"lengths.max_tokens": 32_768},
    ),
    Claim("pool of 7,680, prefill charged", "count", {"rollout_speedup": 1.7}, {"pool_capacity": 7_680}),
)
