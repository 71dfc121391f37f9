"""Which domains prompts come from, by step: the schedule of `data.stages`. Pure.

Invariant: the stage in force depends on the weights' version alone, so that a resumed run is in the stage that it would be in.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate

from megatron_rl.config.data import Stage
from megatron_rl.config.errors import UserError, some
from megatron_rl.types import Prompt


def stage_at(stages: Sequence[Stage], version: int) -> int:
    """The number of the stage whose steps train the weights `version`. Beyond the last step, it is the last."""
    ends = list(accumulate(stage.steps for stage in stages if stage.steps is not None))
    return min(bisect_right(ends, version), len(stages) - 1)


def refuse_unknown_domains(stages: Sequence[Stage], prompts: Iterable[Prompt]) -> None:
    there = sorted({prompt.domain for prompt in prompts})
    for number, stage in enumerate(stages):
        for domain in stage.domains or ():
            if domain not in there:
                raise UserError(f"data.stages.{number}.domains: no prompt is of domain {domain!r}; there are {some(there, 20)}")
