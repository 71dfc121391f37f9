"""Pushes the policy's weights into the engines.

Invariants:
- nothing is sent before every engine has taken the manifest; a refusal is the same error on every rank;
- engines are sent what they have a use for (no multi-token prediction unless they speculate), in the smaller of their type and the
  policy's, and what no step changes only where one of them has not got it yet;
- each byte is written once into memory that the engines read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from megatron_rl.config.model import ModelConfig
from megatron_rl.ports import WeightSink
from megatron_rl.resharding.execute import Consume, Resharder, shared
from megatron_rl.resharding.plan import Plan
from megatron_rl.types import Intake


def frozen(model: ModelConfig) -> Callable[[str], bool]:
    """Which Megatron names no step changes: multi-token prediction, and the expert bias unless the router updates it."""
    frozen_bias = model.moe is not None and model.moe.expert_bias_update_rate == 0.0
    return lambda name: name.startswith("mtp.") or (frozen_bias and name.endswith(".expert_bias"))


class PushToEngines:
    """`ports.WeightSync`; the sink exists on rank 0 only."""

    def __init__(self, resharder: Resharder, sink: WeightSink | None, verify: bool = False) -> None:
        self._resharder, self._sink, self._verify = resharder, sink, verify
        self._manifest = resharder.plan.manifest
        self._planned: tuple[Intake, Plan] | None = None

    def push(self, version: int) -> None:
        intake = self._ask()
        plan = self._plan_for(intake)
        checksums = self._resharder.checksums(intake.dtypes) if self._verify else None
        sink = self._sink
        consumer = _bracket(sink, version, checksums) if sink else None
        self._resharder.deliver(consumer, plan, sink.memory if sink else None)

    def _ask(self) -> Intake:
        intake, error = None, None
        if self._sink:
            try:
                intake = self._sink.begin(self._manifest)
            except Exception as raised:
                error = raised
        return shared(self._resharder.ranks, "the engines' answer to the manifest of a push", intake, error)

    def _plan_for(self, intake: Intake) -> Plan:
        if self._planned is None or self._planned[0] != intake:
            plan = self._resharder.plan.only(intake.dtypes, self._resharder.destinations, frozen=not intake.has_all)
            self._planned = intake, plan
        return self._planned[1]


@contextmanager
def _bracket(sink: WeightSink, version: int, checksums: Mapping[str, int] | None) -> Iterator[Consume]:
    yield sink.send
    sink.end(version, checksums)
