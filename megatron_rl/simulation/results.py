"""From phases to the numbers that schedulers are compared by.

Speeds are those of *trained* tokens, over the steps after warm-up: a smaller budget makes a step shorter and trains less by as
much, so that only tokens count. Training is charged by the token for the same reason. No speed without its price: the same Result
says how far the trained lengths are from those of the prompts, what was thrown away, and how old the tokens were.

Invariants (tests/unit/test_simulation.py): the work-conserving fraction is at most 1; the shares of a token's age add up to 1.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rl.simulation.cluster import Phase
from megatron_rl.simulation.engine import EngineModel
from megatron_rl.simulation.lengths import Pmf

COLD_STEPS = 8  # shown one by one: the first steps train what is short


@dataclass(frozen=True)
class Result:
    scheduler: str
    steps: int
    token_budget: int
    pool_capacity: int
    retention_bound: int
    step_s: float
    rollout_s: float
    train_s: float
    sync_s: float
    tokens_per_s: float  # trained, over whole steps
    rollout_tokens_per_s: float  # trained, over rollout phases
    work_conserving_fraction: float  # of what the engines would generate with the pool always full and prefill free
    engine_idle_fraction: float  # of the engines' seconds in rollout phases
    prefill_fraction: float
    length_bias: float  # trained mean length over that of the prompts, less 1
    tail_ratio: float  # trained responses of the true p95 length or longer, over their true share
    cold_start_bias: tuple[float, ...]  # of the first steps, before any warm-up
    dropped_fraction: float  # tokens restarted or dropped, of those generated
    restarted: float  # rollouts a step; of the other counts too, the mean of a step
    dropped_groups: float
    carried: float
    overshoot: float  # tokens
    overshoot_max: int
    token_age_mean: float  # weight versions between a trained token and its update
    token_age_p99: int
    token_age_max: int
    token_ages: dict[int, float]  # the histogram: age -> share of the trained tokens
    kv_tokens_mean: float  # of an engine
    kv_tokens_peak: float
    retracted: float


def summarise(
    scheduler: str,
    phases: Sequence[Phase],
    warm_up: int,
    lengths: Pmf,
    model: EngineModel,
    engines: int,
    budget: tuple[int, int, int],
    sync_s: float,
    train_s_per_token: float,
) -> Result:
    """`budget`: token budget, pool capacity, retention bound."""
    measured = phases[warm_up:]
    steps = len(measured)
    rollout_s = math.fsum(phase.rollout_s for phase in measured)
    trained = sum(phase.trained for phase in measured)
    generated = sum(phase.generated for phase in measured)
    discarded = sum(phase.discarded for phase in measured)
    responses = [length for phase in measured for length in phase.trained_lengths]
    long = lengths.quantile(0.95)
    ages = Counter[int]()
    for phase in measured:
        ages.update(phase.token_ages)
    batch = min(model.slots, budget[1] / engines)
    train_s = trained * train_s_per_token
    return Result(
        scheduler=scheduler,
        steps=steps,
        token_budget=budget[0],
        pool_capacity=budget[1],
        retention_bound=budget[2],
        step_s=(rollout_s + train_s) / steps + sync_s,
        rollout_s=rollout_s / steps,
        train_s=train_s / steps,
        sync_s=sync_s,
        tokens_per_s=trained / (rollout_s + train_s + sync_s * steps),
        rollout_tokens_per_s=trained / rollout_s,
        work_conserving_fraction=(generated - discarded) / rollout_s / (engines * model.throughput(batch)),
        engine_idle_fraction=max(0.0, 1 - math.fsum(phase.busy_s for phase in measured) / engines / rollout_s),
        prefill_fraction=math.fsum(phase.prefill_s for phase in measured) / engines / rollout_s,
        length_bias=_bias(responses, lengths),
        tail_ratio=sum(length >= long for length in responses) / len(responses) / lengths.at_least(long),
        cold_start_bias=tuple(_bias(phase.trained_lengths, lengths) for phase in phases[:COLD_STEPS]),
        dropped_fraction=discarded / generated,
        restarted=sum(phase.restarted for phase in measured) / steps,
        dropped_groups=sum(phase.dropped_groups for phase in measured) / steps,
        carried=sum(phase.carried for phase in measured) / steps,
        overshoot=sum(phase.overshoot for phase in measured) / steps,
        overshoot_max=max(phase.overshoot for phase in measured),
        token_age_mean=sum(age * tokens for age, tokens in ages.items()) / trained,
        token_age_p99=_quantile(ages, 0.99),
        token_age_max=max(ages),
        token_ages={age: ages[age] / trained for age in sorted(ages)},
        kv_tokens_mean=math.fsum(phase.kv_seconds for phase in measured) / engines / rollout_s,
        kv_tokens_peak=max(phase.kv_peak for phase in measured),
        retracted=sum(phase.retracted for phase in measured) / steps,
    )


def _bias(responses: Sequence[int], lengths: Pmf) -> float:
    return sum(responses) / len(responses) / lengths.mean - 1


def _quantile(ages: Counter[int], share: float) -> int:
    left = share * ages.total()
    for age in sorted(ages):
        left -= ages[age]
        if left <= 0:
            return age
    return max(ages)
