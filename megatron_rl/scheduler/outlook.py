"""What to expect of a schedule before it runs, and what the lengths seen so far say of it. Pure.

In a steady state a pool of Omega rollouts shares a budget of Phi tokens a phase: each grows by about Phi / Omega tokens a phase,
and to (sigma + 1) Phi / Omega before its first token is more than sigma versions old.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron_rl.scheduler.lengths import Survival
from megatron_rl.scheduler.messages import Settings


def longest_fresh(settings: Settings) -> float:
    """Tokens that a rollout reaches, in a steady state, before it is stale."""
    return (settings.retention_bound + 1) * settings.token_budget / settings.pool_capacity


def outlook(settings: Settings, max_prompt_tokens: int, max_response_tokens: int, kv_tokens: int | None) -> tuple[str, list[str]]:
    """A line that says what to expect, and warnings. `kv_tokens`: of all engines' caches together, if known."""
    if settings.policy != "c3po_pp":
        groups = settings.groups_per_phase or settings.pool_capacity // settings.group_size
        return f"{settings.policy}: {groups} groups of {settings.group_size} a phase from a pool of {settings.pool_capacity}", []
    growth = settings.token_budget / settings.pool_capacity
    held = settings.pool_capacity * (max_prompt_tokens + max_response_tokens / 2)
    line = (
        f"C3PO++: {settings.token_budget:,} tokens a phase for a pool of {settings.pool_capacity:,}: a rollout grows by about "
        f"{growth:,.0f} tokens a phase, the longest takes {max_response_tokens / growth:,.1f} phases, "
        f"retention_bound={settings.retention_bound}; the pool holds at most about {held:,.0f} tokens"
    )
    line += f" of the engines' {kv_tokens:,}" if kv_tokens else ""
    warnings = []
    if kv_tokens and held > kv_tokens:
        warnings.append(
            f"rollout.pool_capacity={settings.pool_capacity}: long rollouts may need {held:,.0f} tokens of KV cache, and the "
            f"engines have {kv_tokens:,}; what does not fit waits or is computed again"
        )
    if longest_fresh(settings) < max_response_tokens:
        fate = {
            "finish": "go on with older tokens",
            "restart": "begin again",
            "drop_group": "are dropped with their group",
        }
        warnings.append(
            f"rollout.retention_bound={settings.retention_bound}: rollouts beyond about {longest_fresh(settings):,.0f} of "
            f"{max_response_tokens:,} tokens outgrow it, and then {fate[settings.on_stale]} (rollout.on_stale={settings.on_stale})"
        )
    return line, warnings


def length_metrics(
    settings: Settings, ended: Sequence[int], growing: Sequence[int], given_up: Iterable[int], trained: Sequence[int]
) -> dict[str, float]:
    """Of a recent stretch of the run: lengths of rollouts that ended, of those that have not yet, of those that were given up, and
    of those that were trained. `rollout/length_bias`: by how much trained rollouts are shorter (below 0) than rollouts are;
    `rollout/tail_tokens`: what the slowest of those that go on is expected to need, and a phase that waits would wait for."""
    if not ended or not trained:
        return {}
    survival = Survival.of(ended, (*growing, *given_up))
    metrics = {"rollout/length_mean": survival.mean, "rollout/length_bias": sum(trained) / len(trained) / survival.mean - 1.0}
    metrics["rollout/tail_tokens"] = survival.longest_rest(growing)
    if settings.policy == "c3po_pp":
        metrics["rollout/stale_fraction"] = survival.beyond(longest_fresh(settings))
    return metrics
