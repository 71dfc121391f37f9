"""The policy-gradient objective of a token, to be maximised, from r = exp(new - old) and the advantage A.

All arguments are (T,) tensors over packed tokens; log-ratios are finite. Methods on whole sequences are in token form: detached
statistics of the sequence times something whose value is 1 and whose gradient is the token's own (GSPO-token, arXiv 2507.18071,
section 4.3). Weighted by 1 / |y| (aggregation `sequence`) the tokens of a sequence add up to the sequence's objective, in
value and in gradient, however they are spread over CP ranks.

Invariants (tests/unit/test_algorithms_surrogates.py):
- ppo with dual_clip is Light-R1's two-sided clip;
- the token forms of gspo and gmpo have value and gradient of the sequence forms;
- a clipped token has no gradient, except under cispo, which keeps all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from megatron_rl.algorithms.batch import PackedBatch

SurrogateKind = Literal["ppo", "gspo", "cispo", "gmpo", "reinforce"]


class Objective(NamedTuple):
    values: torch.Tensor  # (T,)
    clipped: torch.Tensor  # (T,), bool: the clip decides the value


@dataclass(frozen=True, slots=True)
class Surrogate:
    """The objective of a run."""

    kind: SurrogateKind = "ppo"
    clip_low: float = 0.2  # of log r under gmpo, of r under all others
    clip_high: float = 0.2
    dual_clip: float | None = None  # of ppo

    def objective(
        self,
        new_logprobs: torch.Tensor,
        log_ratio: torch.Tensor,
        advantages: torch.Tensor,
        among: torch.Tensor,
        batch: PackedBatch,
    ) -> Objective:
        """`among`: the tokens (bool) that statistics of a sequence are about."""
        if self.kind == "gspo":
            return gspo(log_ratio, advantages, among, batch, self.clip_low, self.clip_high)
        if self.kind == "gmpo":
            return gmpo(log_ratio, advantages, among, batch, self.clip_low, self.clip_high)
        if self.kind == "cispo":
            return cispo(log_ratio, new_logprobs, advantages, self.clip_high)
        if self.kind == "reinforce":
            return reinforce(new_logprobs, advantages)
        return ppo(log_ratio, advantages, self.clip_low, self.clip_high, self.dual_clip)


def ppo(
    log_ratio: torch.Tensor, advantages: torch.Tensor, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> Objective:
    """min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) (PPO, arXiv 1707.06347, equation 7; separate bounds: DAPO, arXiv 2503.14476,
    equation 10). With `dual_clip` = delta > 1 + clip_high, at least delta A where A < 0 (arXiv 1912.09729): a huge ratio
    cannot push without limit. Light-R1 (arXiv 2503.10460) writes the same as min(min(r, delta) A, clip(r) A)."""
    ratio_T = log_ratio.exp()
    free_T = ratio_T * advantages
    plain_T = free_T if dual_clip is None else ratio_T.clamp(max=dual_clip) * advantages
    values_T = torch.minimum(plain_T, ratio_T.clamp(1 - clip_low, 1 + clip_high) * advantages)
    return Objective(values_T, values_T != free_T)


def gspo(
    log_ratio: torch.Tensor, advantages: torch.Tensor, among: torch.Tensor, batch: PackedBatch, clip_low: float, clip_high: float
) -> Objective:
    """min(s A, clip(s, 1 - clip_low, 1 + clip_high) A) with the sequence's ratio s = exp(mean of log r) over the tokens `among`
    (GSPO, arXiv 2507.18071, equations 5 and 7), in the form of its equation 14: s_t = sg(s) new / sg(new)."""
    return ppo(batch.sequence_means(log_ratio, among) + _only_gradient(log_ratio), advantages, clip_low, clip_high)


def cispo(log_ratio: torch.Tensor, new_logprobs: torch.Tensor, advantages: torch.Tensor, clip_high: float) -> Objective:
    """sg(min(r, 1 + clip_high)) A log new (CISPO: MiniMax-M1, arXiv 2506.13585, equations 4 and 5, without a lower bound, as
    there): the weight of a token is bounded, but every token keeps its gradient."""
    ratio_T = log_ratio.detach().exp()
    return Objective(ratio_T.clamp(max=1 + clip_high) * advantages * new_logprobs, ratio_T > 1 + clip_high)


def gmpo(
    log_ratio: torch.Tensor, advantages: torch.Tensor, among: torch.Tensor, batch: PackedBatch, clip_low: float, clip_high: float
) -> Objective:
    """A times the geometric mean, over the tokens `among`, of r clipped from above (A > 0) or below (A < 0), with the bounds
    e^-clip_low and e^clip_high (GMPO, arXiv 2507.20673, section 3). In token form: sg(mean) c / sg(c), c the token's clipped r."""
    positive_T = advantages > 0
    clipped_T = torch.where(positive_T, log_ratio.clamp(max=clip_high), log_ratio.clamp(min=-clip_low))
    mean_T = batch.sequence_means(clipped_T, among)
    return Objective(advantages * (mean_T + _only_gradient(clipped_T)).exp(), clipped_T != log_ratio)


def reinforce(new_logprobs: torch.Tensor, advantages: torch.Tensor) -> Objective:
    """A log new (Williams 1992): no ratio, nothing clipped."""
    return Objective(advantages * new_logprobs, torch.zeros_like(advantages, dtype=torch.bool))


def _only_gradient(values_T: torch.Tensor) -> torch.Tensor:
    """0, with the gradient of `values_T`."""
    return values_T - values_T.detach()
