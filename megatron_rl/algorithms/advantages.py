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


def group_advantages(rewards_G: torch.Tensor, method: AdvantageMethod, valid_G: torch.Tensor | None = None) -> torch.Tensor:
    """advantages_G, with n valid members of mean m and sample deviation s (over n - 1):

    - grpo: (r - m) / (s + 1e-6)         (DeepSeekMath, arXiv 2402.03300, section 4.1.2)
    - dr_grpo: r - m                     (arXiv 2503.20783: the deviation overweights questions that are too easy or too hard)
    - rloo: r - mean of the others = (r - m) n / (n - 1)     (arXiv 2402.14740)
    - reinforce: r, without a baseline   (Williams 1992); the only one that learns from equal rewards
    """
    if valid_G is None:
        valid_G = torch.ones_like(rewards_G, dtype=torch.bool)
    advantages_G = torch.zeros_like(rewards_G)
    if method == "reinforce":
        advantages_G[valid_G] = rewards_G[valid_G]
    elif not zero_variance(rewards_G, valid_G):
        rewards_V = rewards_G[valid_G]
        centred_V = rewards_V - rewards_V.mean()
        if method == "grpo":
            centred_V = centred_V / (rewards_V.std() + STD_EPS)
        elif method == "rloo":
            centred_V = centred_V * len(rewards_V) / (len(rewards_V) - 1)
        advantages_G[valid_G] = centred_V
    return advantages_G


def zero_variance(rewards_G: torch.Tensor, valid_G: torch.Tensor | None = None) -> bool:
    """Nothing to compare: all valid rewards are equal, or fewer than two are valid."""
    rewards_V = rewards_G if valid_G is None else rewards_G[valid_G]
    return len(rewards_V) < 2 or bool(rewards_V.min() == rewards_V.max())
