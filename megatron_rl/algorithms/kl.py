"""Per-token estimators of KL(new || ref) from one token sampled by the policy.

With p the policy and q the reference, x = log q - log p at the sampled token (Schulman 2020, "Approximating KL divergence"):

    k1         -x             its mean is the divergence; its own gradient has mean 0, so it steers as a reward and not as a loss
    k2         x^2 / 2        biased; its gradient has the divergence's mean on-policy
    k3         e^x - x - 1    as k1, never negative and of low variance (DeepSeekMath, arXiv 2402.03300, equation 4)
    unbiased   r k3           r = new / old: value and gradient have the right mean although the old policy sampled
                              (DeepSeek-V3.2, arXiv 2512.02556, section 3.1)

Invariants (tests/unit/test_algorithms_kl.py): summed over the vocabulary under p, k1, k3 and unbiased are the divergence, and the
gradients of unbiased (under any old policy) and of k2 (on-policy) are the divergence's.
"""

from __future__ import annotations

from typing import Literal

import torch

KlEstimator = Literal["k1", "k2", "k3", "unbiased"]
# exp overflows float32 at 88, and 0 x inf = NaN backwards; far outside of what a run that trains ever sees.
LOG_RATIO_LIMIT = 20.0


def kl_estimate(
    estimator: KlEstimator, new_logprobs: torch.Tensor, ref_logprobs: torch.Tensor, log_ratio: torch.Tensor | None = None
) -> torch.Tensor:
    """(T,), from (T,) log-probs in nats. `log_ratio` = new - old is read by `unbiased` alone; None: r = 1."""
    x_T = limited(ref_logprobs - new_logprobs)
    if estimator == "k1":
        return -x_T
    if estimator == "k2":
        return x_T.square() / 2
    if estimator == "unbiased" and log_ratio is not None:
        return limited(log_ratio).exp() * k3(x_T)
    return k3(x_T)


def k3(x: torch.Tensor) -> torch.Tensor:
    return x.exp() - x - 1


def limited(log_ratio: torch.Tensor) -> torch.Tensor:
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
