"""How much better a sample is than others: rewards in, advantages out, the same for all tokens of a sample.

Invariants (tests/unit/test_algorithms_advantages.py):
- grpo, dr_grpo, rloo and reinforce_pp_baseline are exactly 0 where the rewards of a group are all equal, rounding included, and
  where there is only one; so is reinforce_pp where all rewards of the step are equal;
- they add up to 0: over the group, or over the step where a method normalises over the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

AdvantageMethod = Literal["grpo", "dr_grpo", "rloo", "reinforce", "reinforce_pp", "reinforce_pp_baseline"]
STD_EPS = 1e-6


def step_advantages(groups: Sequence[torch.Tensor], method: AdvantageMethod) -> list[torch.Tensor]:
    """advantages_G of each of a step's groups, from their rewards_G; n rewards with mean m and sample deviation s (over n - 1):

    - grpo: (r - m) / (s + 1e-6)         (DeepSeekMath, arXiv 2402.03300, section 4.1.2)
    - dr_grpo: r - m                     (arXiv 2503.20783: the deviation overweights questions that are too easy or too hard)
    - rloo: r - mean of the others = (r - m) n / (n - 1)     (arXiv 2402.14740)
    - reinforce: r, without a baseline   (Williams 1992)
    - reinforce_pp: (r - M) / (S + 1e-6) with mean M and deviation S over all groups     (REINFORCE++, arXiv 2501.03262)
    - reinforce_pp_baseline: (r - m) / (S' + 1e-6), S' the deviation of all r - m        (there, for groups)
    """
    if not groups:
        return []
    if method == "reinforce_pp":
        return _split(_standard(torch.cat(list(groups))), groups)
    centred = [_group_advantages(rewards_G, method) for rewards_G in groups]
    if method == "reinforce_pp_baseline":
        return _split(_over_deviation(torch.cat(centred)), groups)  # their mean over the step is 0 already
    return centred


def teaches_nothing(rewards_G: torch.Tensor, method: AdvantageMethod) -> bool:
    """All advantages are 0 whatever the other groups are: with a baseline of the group where rewards are equal, without one where
    they are 0. A group of equal rewards can still be better or worse than the step, which is what reinforce_pp learns from."""
    if method == "reinforce_pp":
        return False
    return not bool(rewards_G.any()) if method == "reinforce" else _all_equal(rewards_G)


def _group_advantages(rewards_G: torch.Tensor, method: AdvantageMethod) -> torch.Tensor:
    if method == "reinforce":
        return rewards_G.clone()
    if method == "grpo":
        return _standard(rewards_G)
    if _all_equal(rewards_G):
        return torch.zeros_like(rewards_G)
    centred_G = rewards_G - rewards_G.mean()
    return centred_G * len(rewards_G) / (len(rewards_G) - 1) if method == "rloo" else centred_G


def _standard(rewards_G: torch.Tensor) -> torch.Tensor:
    if _all_equal(rewards_G):
        return torch.zeros_like(rewards_G)
    return _over_deviation(rewards_G - rewards_G.mean())


def _over_deviation(centred_G: torch.Tensor) -> torch.Tensor:
    return centred_G if len(centred_G) < 2 else centred_G / (centred_G.std() + STD_EPS)


def _all_equal(rewards_G: torch.Tensor) -> bool:
    """Or fewer than two: nothing to compare."""
    return len(rewards_G) < 2 or bool(rewards_G.min() == rewards_G.max())


def _split(values: torch.Tensor, groups: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return list(torch.split(values, [len(rewards_G) for rewards_G in groups]))
