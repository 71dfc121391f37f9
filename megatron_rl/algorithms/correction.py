"""Corrections for the gap between the engine that sampled and the policy that trains: what a token's policy gradient weighs.

k = exp(old_logprobs - engine_logprobs) is how much likelier the policy at the step's start finds a token than the engine
(possibly under older weights) did when it sampled it. All arguments are (T,) tensors over packed tokens, log-probs in nats; so are
the results, and masks are weights of 0 and 1.

Invariants (tests/unit/test_algorithms_correction.py):
- icepop: M(k) = k for low <= k <= high, both ends included, else 0: the ratio multiplies, it is no 0/1 mask;
- decided on log k, so that a token whose log k is infinite or undefined weighs exactly 0, whatever the correction, and no inf or
  NaN is ever computed from it; `none` looks at no k;
- detached;
- what is set multiplies, and what is not set leaves every weight as it was.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_rl.algorithms.batch import PackedBatch

CorrectionKind = Literal["icepop", "tis", "clip", "kpop", "none"]


@dataclass(frozen=True, slots=True)
class Correction:
    """The corrections of a run. `kind` is the token's own weight; the sequence mask multiplies it."""

    kind: CorrectionKind = "icepop"
    low: float = 0.5  # of icepop and clip
    high: float = 5.0
    cap: float = 2.0  # of tis
    phi: float | None = None  # of kpop
    sequence_band: tuple[float, float] | None = None  # of the sequence's geometric mean of k
    off_policy_delta: float | None = None  # of the sequence's mean of old - new

    def weights(self, old_logprobs: torch.Tensor, engine_logprobs: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """What k alone decides: the token's weight times the sequence mask."""
        weights_T = self._of_tokens(old_logprobs, engine_logprobs)
        if self.sequence_band:
            weights_T = weights_T * sequence_mask(old_logprobs, engine_logprobs, batch, *self.sequence_band)
        return weights_T

    def _of_tokens(self, old_logprobs: torch.Tensor, engine_logprobs: torch.Tensor) -> torch.Tensor:
        if self.kind == "icepop":
            return icepop_weights(old_logprobs, engine_logprobs, self.low, self.high)
        if self.kind == "tis":
            return tis_weights(old_logprobs, engine_logprobs, self.cap)
        if self.kind == "clip":
            return clip_weights(old_logprobs, engine_logprobs, self.low, self.high)
        if self.kind == "kpop":
            if self.phi is None:
                raise ValueError("kind=kpop needs a phi")
            return kpop_mask(old_logprobs, engine_logprobs, self.phi)
        return torch.ones_like(old_logprobs)


def icepop_weights(old_logprobs: torch.Tensor, engine_logprobs: torch.Tensor, low: float = 0.5, high: float = 5.0) -> torch.Tensor:
    """M(k) = k inside [low, high], else 0; (T,). IcePop: Ring-1T, arXiv 2510.18855, section 2.3.2, with alpha = low and
    beta = high. low may be 0: no lower bound."""
    log_k_T = (old_logprobs - engine_logprobs).detach()
    return _exp_where((log_k_T >= _log(low)) & (log_k_T <= _log(high)), log_k_T)  # False for NaN


def tis_weights(old_logprobs: torch.Tensor, engine_logprobs: torch.Tensor, cap: float = 2.0) -> torch.Tensor:
    """min(k, cap); (T,). Truncated importance sampling (Ionides 2008) of engine tokens: Yao et al. 2025, "Your Efficient RL
    Framework Secretly Brings You Off-Policy RL Training"."""
    log_k_T = (old_logprobs - engine_logprobs).detach()
    return _exp_where(log_k_T.isfinite(), log_k_T.clamp(max=_log(cap)))


def clip_weights(old_logprobs: torch.Tensor, engine_logprobs: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """k, brought into [low, high]; (T,). The two-sided form of truncated importance sampling: a token outside keeps the weight of
    the nearer end, where IcePop gives it none."""
    log_k_T = (old_logprobs - engine_logprobs).detach()
    return _exp_where(log_k_T.isfinite(), log_k_T.clamp(_log(low), _log(high)))


SUREST = -(2.0**-24)  # a log-prob that float32 rounds to 0 leaves other tokens a chance all the same


def kpop_mask(old_logprobs: torch.Tensor, engine_logprobs: torch.Tensor, phi: float) -> torch.Tensor:
    """1 where D(p || q) <= phi and D(q || p) <= phi, else 0; (T,). p and q are the token's probability to trainer and engine, D the
    KL divergence of two coins: D(p || q) = p log(p / q) + (1 - p) log((1 - p) / (1 - q)). KPop: arXiv 2606.15079.

    At equal k a likely token is further apart than an unlikely one. Published values of phi differ twentyfold: measure first."""
    log_p_T, log_q_T = old_logprobs.detach(), engine_logprobs.detach()
    defined_T = (log_p_T - log_q_T).isfinite()
    log_p_T, log_q_T = (torch.where(defined_T, values_T, 0.0).clamp(max=SUREST) for values_T in (log_p_T, log_q_T))
    near_T = (_coin_kl(log_p_T, log_q_T) <= phi) & (_coin_kl(log_q_T, log_p_T) <= phi)
    return (defined_T & near_T).to(old_logprobs.dtype)


def sequence_mask(
    old_logprobs: torch.Tensor, engine_logprobs: torch.Tensor, batch: PackedBatch, low: float = 0.999, high: float = 1.002
) -> torch.Tensor:
    """1 on the tokens of sequences whose geometric mean of k lies in [low, high], else 0; (T,). One undefined k drops its sequence.

    Masked importance sampling (MIS) in its geometric form: Liu et al. 2025, "When Speed Kills Stability: Demystifying RL Collapse
    from the Training-Inference Mismatch". *Collective* over the CP ranks."""
    log_k_T = (old_logprobs - engine_logprobs).detach()
    mean_T = batch.sequence_means(log_k_T, batch.loss_mask_T > 0)
    return ((mean_T >= _log(low)) & (mean_T <= _log(high))).to(old_logprobs.dtype)


def off_policy_sequence_mask(
    new_logprobs: torch.Tensor, engine_logprobs: torch.Tensor, advantages: torch.Tensor, batch: PackedBatch, delta: float
) -> torch.Tensor:
    """0 on tokens with a negative advantage in sequences with mean(engine - new) > delta, else 1; (T,). DeepSeek-V3.2, arXiv
    2512.02556, section 3.1, whose old policy is the engine as it sampled, staleness and gap included: what the policy has left
    behind need not be pushed further away. *Collective* over the CP ranks."""
    gap_T = (engine_logprobs - new_logprobs).detach()
    near_T = batch.sequence_means(gap_T, batch.loss_mask_T > 0) <= delta  # False for NaN
    return (near_T | (advantages >= 0)).to(new_logprobs.dtype)


def _exp_where(kept_T: torch.Tensor, log_weights_T: torch.Tensor) -> torch.Tensor:
    return torch.where(kept_T, torch.where(kept_T, log_weights_T, 0.0).exp(), 0.0)


def _log(bound: float) -> float:
    return math.log(bound) if bound > 0 else -math.inf


def _coin_kl(log_p_T: torch.Tensor, log_q_T: torch.Tensor) -> torch.Tensor:
    tails_T = -log_p_T.expm1()  # 1 - p, exact where p is near 1
    gap_T = _log1mexp(log_p_T) - _log1mexp(log_q_T)
    return log_p_T.exp() * (log_p_T - log_q_T) + torch.where(tails_T > 0, tails_T * gap_T, 0.0)


def _log1mexp(log_p_T: torch.Tensor) -> torch.Tensor:
    return (-log_p_T.expm1()).log()
