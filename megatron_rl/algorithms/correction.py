"""Corrections for the gap between the engine that sampled and the policy that trains, per token, constant in the policy's weights.

k = exp(old_logprobs - engine_logprobs) is how much likelier the policy at the step's start finds a token than the engine
(possibly under older weights) did when it sampled it.

Invariants (tests/unit/test_algorithms_correction.py):
- icepop: M(k) = k for low <= k <= high, both ends included, else 0: the ratio multiplies, it is no 0/1 mask;
- decided on log k, so that infinite or undefined log-probs weigh exactly 0 and no inf or NaN is ever computed from them;
- detached.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

CorrectionKind = Literal["icepop", "none"]


def correction_weights(
    kind: CorrectionKind, old_logprobs_T: torch.Tensor, engine_logprobs_T: torch.Tensor, low: float, high: float
) -> torch.Tensor:
    """weights_T of the policy-gradient term; `none` is 1 everywhere."""
    if kind == "icepop":
        return icepop_weights(old_logprobs_T, engine_logprobs_T, low, high)
    return torch.ones_like(engine_logprobs_T)


def icepop_weights(
    old_logprobs_T: torch.Tensor, engine_logprobs_T: torch.Tensor, low: float = 0.5, high: float = 5.0
) -> torch.Tensor:
    """M(k) (Ring-1T, arXiv 2510.18855, section 2.3.2, alpha = low and beta = high); low may be 0: no lower bound."""
    log_k_T = (old_logprobs_T - engine_logprobs_T).detach()
    log_low = math.log(low) if low > 0 else -math.inf
    inside_T = (log_k_T >= log_low) & (log_k_T <= math.log(high))  # False for NaN
    return torch.where(inside_T, torch.where(inside_T, log_k_T, 0.0).exp(), 0.0)
