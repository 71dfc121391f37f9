"""What a schedule is said to do before it runs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_rl.scheduler.messages import Settings
from megatron_rl.scheduler.outlook import length_metrics, longest_fresh, outlook

SETTINGS = Settings(token_budget=1000, pool_capacity=100, group_size=4, retention_bound=10)


def test_a_roomy_schedule_has_no_warnings() -> None:
    line, warnings = outlook(SETTINGS, max_prompt_tokens=20, max_response_tokens=110, kv_tokens=10_000)
    assert "grows by about 10 tokens a phase, the longest takes 11.0 phases, retention_bound=10" in line
    assert "at most about 7,500 tokens of the engines' 10,000" in line
    assert warnings == []


@pytest.mark.parametrize(
    ("on_stale", "fate"), [("finish", "go on with older tokens"), ("restart", "begin again"), ("drop_group", "are dropped")]
)
def test_a_tight_bound_says_what_becomes_of_long_rollouts(on_stale: str, fate: str) -> None:
    settings = replace(SETTINGS, retention_bound=3, on_stale=on_stale)
    _, (warning,) = outlook(settings, 20, 110, None)
    assert warning.startswith(f"rollout.retention_bound=3: rollouts beyond about 40 of 110 tokens outgrow it, and then {fate}")


def test_too_small_a_cache_is_named() -> None:
    _, (warning,) = outlook(SETTINGS, 20, 110, 5_000)
    assert "rollout.pool_capacity=100: long rollouts may need 7,500 tokens of KV cache" in warning


def test_the_share_of_stale_rollouts_is_that_beyond_the_bound() -> None:
    settings = replace(SETTINGS, retention_bound=3)
    assert longest_fresh(settings) == 40
    metrics = length_metrics(settings, ended=[10, 20, 50, 60], growing=[], given_up=[], trained=[10, 20])
    lengths = {"rollout/length_mean": 35, "rollout/length_bias": 15 / 35 - 1, "rollout/tail_tokens": 0}
    assert metrics == pytest.approx(lengths | {"rollout/stale_fraction": 0.5})
    assert length_metrics(settings, ended=[], growing=[1], given_up=[], trained=[]) == {}
