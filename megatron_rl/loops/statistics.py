"""Numbers about one step's groups: rewards, lengths, ages. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean

from megatron_rl.types import Group

UNNAMED = "default"  # the domain of prompts that name none


def group_metrics(groups: Sequence[Group], trained: Sequence[Group], version: int) -> dict[str, float]:
    """`groups` left the scheduler in this step, `trained` are those that enter the update; ages are in weight versions. Where
    prompts name their domains, `<metric>/<domain>` says of each what `<metric>` says of all."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    if not rollouts:
        return {"reward/groups": 0.0, "train/groups": 0.0, "train/tokens": 0.0}
    scores = [score for group in groups for score in group.scores]
    statuses = Counter(score.status for score in scores)
    ages = [version - token_version for rollout in rollouts for token_version in rollout.versions]
    metrics = _outcomes(groups) | {
        "reward/seconds_max": max(score.seconds for score in scores),
        "response/tokens_max": float(max(len(rollout.tokens) for rollout in rollouts)),
        "rollout/token_age_mean": fmean(ages) if ages else 0.0,
        "rollout/token_age_max": float(max(ages, default=0)),
        "train/groups": float(len(trained)),
        "train/tokens": float(sum(len(rollout.tokens) for group in trained for rollout in group.rollouts)),
    }
    for status in ("unparsable", "timeout", "error"):
        metrics[f"reward/{status}_fraction"] = statuses[status] / len(scores)
    by_domain: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        by_domain[group.prompt.domain].append(group)
    if by_domain.keys() != {UNNAMED}:
        for domain in sorted(by_domain):
            metrics |= {f"{name}/{domain}": value for name, value in _outcomes(by_domain[domain]).items()}
    return metrics


def _outcomes(groups: Sequence[Group]) -> dict[str, float]:
    scores = [score for group in groups for score in group.scores]
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    return {
        "reward/mean": fmean(score.value for score in scores),
        "reward/groups": float(len(groups)),
        "reward/correct_fraction": _share(score.status == "correct" for score in scores),
        "reward/all_correct_fraction": _share(all(s.status == "correct" for s in group.scores) for group in groups),
        "reward/all_wrong_fraction": _share(all(s.status != "correct" for s in group.scores) for group in groups),
        "response/tokens_mean": fmean(len(rollout.tokens) for rollout in rollouts),
        "response/truncated_fraction": _share(rollout.finish_reason == "length" for rollout in rollouts),
    }


def _share(flags: Iterable[bool]) -> float:
    return fmean(float(flag) for flag in flags)
