"""Hostile answers through the math verifier in a pool: each ends within its limit with a status, and leaves no trace."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from hostile_math import HAND_LIST, answers
from hypothesis import HealthCheck, given, settings

from megatron_rl.rewards.pool import RETIRED_AT, RewardPool
from megatron_rl.rewards.worker import Limits
from megatron_rl.types import Prompt, Rollout, Score
from megatron_rl.verifiers import MODULES

TIMEOUT_S = 1.0
GOLD = Prompt("p", "", (), r"\frac{22}{7}", "math")
TRACE = Path("/tmp/hostile_math")


class Texts:
    """A pool for texts instead of tokens."""

    def __init__(self) -> None:
        self._texts: Sequence[str] = ()
        limits = Limits(cpu_s=TIMEOUT_S, memory_mb=2048)
        self._pool = RewardPool(2, TIMEOUT_S, lambda tokens: self._texts[tokens[0]], {"math": MODULES["math"]}, limits=limits)
        self.close = self._pool.close

    def score(self, texts: Sequence[str], prompt: Prompt = GOLD) -> list[Score]:
        self._texts = texts
        rollouts = [Rollout(f"0:p#{i}", prompt, i, (i,), (0.0,), (0,), "stop") for i in range(len(texts))]
        return asyncio.run(self._pool.score(rollouts))


@pytest.fixture(scope="module")
def pool() -> Iterator[Texts]:
    made = Texts()
    yield made
    made.close()


def ends_with_a_status(scores: Sequence[Score]) -> None:
    for score in scores:
        assert score.status in ("wrong", "unparsable", "timeout", "error")
        assert score.value == 0.0
        assert score.seconds <= TIMEOUT_S + 0.5
        assert score.status == "wrong" or score.reason


def processes() -> list[psutil.Process]:
    return [
        child for child in psutil.Process().children(recursive=True) if "megatron_rl.rewards.worker" in " ".join(child.cmdline())
    ]


def test_hostile_answers_end_within_their_limit_and_the_pool_is_as_before(pool: Texts) -> None:
    easy = [rf"so \boxed{{\frac{{{22 * k}}}{{{7 * k}}}}}" for k in range(1, 41)]
    pool.score(easy)
    started = time.monotonic()
    assert {score.status for score in pool.score(easy)} == {"correct"}
    before = time.monotonic() - started
    ends_with_a_status(pool.score(list(HAND_LIST.values())))
    assert not TRACE.exists()
    started = time.monotonic()
    assert {score.status for score in pool.score(easy)} == {"correct"}
    assert time.monotonic() - started < 10 * before + 1.0  # fresh workers have cold caches
    assert len(processes()) == 3  # the nursery and two workers
    assert all(process.memory_info().rss < RETIRED_AT for process in processes())


@pytest.mark.parametrize("name", ["tower of powers", "a megabyte of digits", "open braces", "lone surrogates", "division by zero"])
def test_hostile_gold_answers_too(pool: Texts, name: str) -> None:
    prompt = Prompt("p", "", (), HAND_LIST[name], "math")
    (score,) = pool.score([r"\boxed{5}"], prompt)
    ends_with_a_status([score])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=1000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(answer=answers())
def test_any_answer_ends_within_its_limit(pool: Texts, answer: str) -> None:
    ends_with_a_status(pool.score([answer]))
