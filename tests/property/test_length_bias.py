"""Which lengths are trained, by the real loop on scripted engines: under C3PO++ those that the prompts give, under over-sampling to
a count, with the rest discarded, shorter ones.

A rollout's length is log-normal (sigma 0.6 between prompts and 0.6 between the samples of one), drawn from its id and attempt
alone: what is discarded and offered again draws anew, as sampling would. Rollouts of a group are not independent, groups are: the
test compares group totals, and the first member's lengths, with those of fresh groups (Kolmogorov-Smirnov, two samples).
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import math
from collections import Counter
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
from fakes import CountedPrompts, ParityRewards, ScriptedEngine, ScriptedEngines

from megatron_rl.config.rollout import RolloutConfig
from megatron_rl.loops.conductor import Conductor
from megatron_rl.loops.journal import Journal
from megatron_rl.loops.signals import StopFlag
from megatron_rl.scheduler.messages import Settings, rollout_id
from megatron_rl.types import Group, SamplingParams

GROUP, POOL, LONGEST, STEPS = 4, 96, 400, 120
BUDGET = 2_400
SIGMA = RolloutConfig(token_budget=BUDGET, pool_capacity=POOL, group_size=GROUP, max_response_tokens=LONGEST).sigma
ALPHA = 0.01


def normal(*key: object) -> float:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    return NormalDist().inv_cdf((int.from_bytes(digest, "big") + 0.5) / 2**56)


@functools.cache
def length_of(name: str, attempt: int = 0) -> int:
    z = 0.6 * normal(name.rpartition("#")[0]) + 0.6 * normal(name, attempt)
    return max(1, min(LONGEST, round(40 * math.exp(z))))


class RepeatedPrompts(CountedPrompts):
    """Knows how often each group was dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.attempts: Counter[str] = Counter()

    def give_back(self, group_id: str) -> None:
        super().give_back(group_id)
        self.attempts[group_id] += 1


def trained(folder: Path, settings: Settings) -> list[list[Group]]:
    """The groups of each step."""
    prompts = RepeatedPrompts()

    def length(name: str) -> int:
        return length_of(name, prompts.attempts[name.rpartition("#")[0]])

    engines = ScriptedEngines([ScriptedEngine("a", 2, length, chunk=16), ScriptedEngine("b", 2, length, chunk=16)])
    sampling = SamplingParams(max_response_tokens=LONGEST)
    journal = Journal(folder, {})
    with asyncio.Runner() as runner:
        c = Conductor(
            settings, sampling, engines, ParityRewards(), prompts, journal, StopFlag(), runner, 60, is_useful=lambda group: True
        )
        return [list(c.phase(version).groups) for version in range(STEPS)]


def lengths(steps: list[list[Group]]) -> np.ndarray:
    """One row a group."""
    return np.array([[len(rollout.tokens) for rollout in group.rollouts] for groups in steps for group in groups])


@pytest.fixture(scope="module")
def population() -> np.ndarray:
    return np.array([[length_of(rollout_id(f"fresh {i}", k)) for k in range(GROUP)] for i in range(10_000)])


def kolmogorov_smirnov(one: np.ndarray, other: np.ndarray) -> float:
    """The probability of samples that differ as much, if both come from one distribution (asymptotic; Numerical Recipes 14.3)."""
    values = np.concatenate([one, other])
    gap = np.abs(
        np.searchsorted(np.sort(one), values, side="right") / len(one)
        - np.searchsorted(np.sort(other), values, side="right") / len(other)
    ).max()
    root = math.sqrt(len(one) * len(other) / (len(one) + len(other)))
    scaled = (root + 0.12 + 0.11 / root) * gap
    return min(1.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * k**2 * scaled**2) for k in range(1, 101)))


def test_the_statistical_test_tells_a_bias_of_a_tenth(population: np.ndarray) -> None:
    half, other = population[:1_500].sum(axis=1), population[5_000:].sum(axis=1)
    assert kolmogorov_smirnov(half, other) > ALPHA
    assert kolmogorov_smirnov(0.9 * half, other) < ALPHA


def bias(groups: np.ndarray, population: np.ndarray) -> float:
    return float(groups.mean() / population.mean() - 1)


def test_c3po_pp_trains_the_lengths_that_the_prompts_give(tmp_path: Path, population: np.ndarray) -> None:
    """At the default sigma and on_stale. The first sigma steps are left out: from an empty pool the short ones come first."""
    steps = trained(tmp_path, Settings(token_budget=BUDGET, pool_capacity=POOL, group_size=GROUP, retention_bound=SIGMA))
    cold, warm = lengths(steps[: SIGMA // 2]), lengths(steps[SIGMA:])
    assert bias(cold, population) < -0.1  # -18 %
    assert len(warm) > 1_500 and abs(bias(warm, population)) < 0.03  # 0.0 %
    assert kolmogorov_smirnov(warm.sum(axis=1), population.sum(axis=1)) > ALPHA
    assert kolmogorov_smirnov(warm[:, 0], population[:, 0]) > ALPHA


def test_a_count_that_discards_the_rest_trains_shorter_ones(tmp_path: Path, population: np.ndarray) -> None:
    """Twice over-sampled, after as many steps."""
    settings = Settings(
        token_budget=BUDGET, pool_capacity=POOL, group_size=GROUP, retention_bound=SIGMA,
        policy="count", groups_per_phase=POOL // GROUP // 2, unfinished="discard",
    )  # fmt: skip
    warm = lengths(trained(tmp_path, settings)[SIGMA:])
    assert len(warm) > 1_000 and bias(warm, population) < -0.08  # -14 %
    assert kolmogorov_smirnov(warm.sum(axis=1), population.sum(axis=1)) < ALPHA
