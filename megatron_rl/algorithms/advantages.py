"""How much better a sample is than its group. Rewards in, advantages out, one group at a time; the same for all tokens of a sample.

Invariants (tests/unit/test_algorithms_advantages.py):
- members that are not valid (a timeout or an error is no judgement) have advantage 0 and enter no mean and no deviation;
- grpo, dr_grpo and rloo are exactly 0 where the valid rewards are all equal, rounding included, and where there is only one;
- their advantages add up to 0 over the valid members.
"""

from __future__ import annotations

from typing import Literal

import torch

AdvantageMethod = Literal["grpo", "dr_grpo", "rloo", "reinforce"]
STD_EPS = 1e-6


def group_advantages(rewards_G: torch.Tensor, method: AdvantageMethod) -> torch.Tensor:
    """advantages_G of a group of n rewards with mean m and sample deviation s (over n - 1):

    - grpo: (r - m) / (s + 1e-6)         (DeepSeekMath, arXiv 2402.03300, section 4.1.2)
    - dr_grpo: r - m                     (arXiv 2503.20783: the deviation overweights questions that are too easy or too hard)
    - rloo: r - mean of the others = (r - m) n / (n - 1)     (arXiv 2402.14740)
    - reinforce: r, without a baseline   (Williams 1992); the only one that learns from equal rewards
    """
    if method == "reinforce":
        return rewards_G.clone()
    if zero_variance(rewards_G):
        return torch.zeros_like(rewards_G)
    centred_G = rewards_G - rewards_G.mean()
    if method == "grpo":
        return centred_G / (rewards_G.std() + STD_EPS)
    if method == "rloo":
        return centred_G * len(rewards_G) / (len(rewards_G) - 1)
    return centred_G


def zero_variance(rewards_G: torch.Tensor) -> bool:
    """Nothing to compare: all rewards are equal, or there are fewer than two."""
    return len(rewards_G) < 2 or bool(rewards_G.min() == rewards_G.max())
