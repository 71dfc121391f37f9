"""Losses over packed tokens: (new_logprobs_T, entropy_T, batch) -> LossOutput.

Every term is a sum of weight x value over the response tokens; the weights (aggregation.py) hold the global divisor, so the sum of
`loss` over all microbatches of all replicas is the objective. Nothing here waits for the device.

Invariants (tests/unit/test_algorithms_loss.py):
- what is not asked for is not in the loss, and every term in it is logged under its own name, `loss/...`, coefficient included;
- how tokens are packed and split into microbatches changes neither the summed loss nor its gradient;
- entries outside the loss mask are never read; a token that the correction masks stays in the divisor and has no policy gradient;
- infinite or undefined engine and old log-probs leave loss and gradients finite.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch

from megatron_rl.algorithms.batch import LossOutput, PackedBatch
from megatron_rl.algorithms.correction import CorrectionKind, correction_weights

TokenLoss = Callable[[torch.Tensor, torch.Tensor, PackedBatch], LossOutput]
# exp overflows float32 at 88, and min(inf A, clipped) still sends inf x 0 = NaN backwards; far outside of any clip range.
LOG_RATIO_LIMIT = 20.0
MEANS = {  # a sum over tokens -> (the metric, the sum that counts these tokens)
    "mismatch/masked": ("mismatch/masked_fraction", "tokens"),
    "mismatch/logprob_gap_sum": ("mismatch/logprob_gap_mean", "mismatch/fresh_tokens"),
    "mismatch/stale_gap_sum": ("mismatch/stale_gap_mean", "mismatch/stale_tokens"),
    "policy/clipped": ("policy/clip_fraction", "tokens"),
    "policy/entropy_sum": ("policy/entropy", "tokens"),
    "policy/kl_old_new_sum": ("policy/kl_old_new", "tokens"),
    "policy/old_logprob_sum": ("policy/old_logprob", "tokens"),
    "sft/nll_sum": ("sft/nll", "tokens"),
}


def policy_loss(
    *,
    correction: CorrectionKind = "icepop",
    low: float = 0.5,
    high: float = 5.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_weight: float = 0.0,
    entropy_weight: float = 0.0,
    old_logprobs: Literal["recompute", "reuse"] = "recompute",
) -> TokenLoss:
    """IcePop on top of clipped policy gradients (Ring-1T, arXiv 2510.18855, section 2.3.2), to be minimised:

        - sum_t weight (M(k) min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) - kl_weight KL(new || ref) + entropy_weight H)

    with r = exp(new - old), k = exp(old - engine), KL by the k3 estimator, A and weight per token. Reads the fields advantages,
    engine_logprobs, weight, fresh; old_logprobs unless they are to be reused (then old = new, detached: r = 1, its gradient kept);
    ref_logprobs if kl_weight > 0. Log-probs in nats.

    |engine - old| is logged apart for tokens that the present weights sampled (`fresh` = 1: the gap between trainer and engine,
    which ought to be rounding) and for those carried over from earlier weights (`fresh` = 0: staleness on top).
    """

    def loss(new_logprobs_T: torch.Tensor, entropy_T: torch.Tensor, batch: PackedBatch) -> LossOutput:
        mask_T = batch.loss_mask_T > 0

        def inside(values_T: torch.Tensor) -> torch.Tensor:
            return torch.where(mask_T, values_T, 0.0)

        new_T, entropy_T = inside(new_logprobs_T), inside(entropy_T)
        old_T = new_T.detach() if old_logprobs == "reuse" else inside(batch.fields["old_logprobs"])
        engine_T, weight_T, advantages_T = (inside(batch.fields[name]) for name in ("engine_logprobs", "weight", "advantages"))

        correction_T = torch.where(torch.isfinite(old_T), correction_weights(correction, old_T, engine_T, low, high), 0.0)
        used_T = correction_T > 0
        log_ratio_T = _limited(torch.where(used_T, new_T - old_T, 0.0))
        ratio_T = log_ratio_T.exp()
        plain_T = ratio_T * advantages_T
        clipped_T = ratio_T.clamp(1 - clip_low, 1 + clip_high) * advantages_T
        terms = {"loss/policy": -(weight_T * correction_T * torch.minimum(plain_T, clipped_T)).sum()}
        if kl_weight > 0:
            terms["loss/kl"] = kl_weight * (weight_T * _k3(inside(batch.fields["ref_logprobs"]) - new_T)).sum()
        if entropy_weight > 0:
            terms["loss/entropy"] = -entropy_weight * (weight_T * entropy_T).sum()

        gap_T = (engine_T - old_T).abs()
        finite_T = torch.isfinite(gap_T)
        gap_T = torch.where(finite_T, gap_T, 0.0)
        fresh_T = inside(batch.fields["fresh"]) > 0
        fresh_gap_T = torch.where(fresh_T, gap_T, 0.0)
        sums = terms | {
            "tokens": _count(mask_T, new_logprobs_T),
            "mismatch/masked": _count(mask_T & ~used_T, new_logprobs_T),
            "mismatch/logprob_gap_sum": fresh_gap_T.sum(),
            "mismatch/fresh_tokens": _count(fresh_T, new_logprobs_T),
            "mismatch/stale_gap_sum": (gap_T - fresh_gap_T).sum(),
            "mismatch/stale_tokens": _count(mask_T & ~fresh_T, new_logprobs_T),
            "mismatch/nonfinite": _count(~finite_T, new_logprobs_T),
            "policy/clipped": _count(plain_T > clipped_T, new_logprobs_T),
            "policy/entropy_sum": entropy_T.sum(),
            "policy/kl_old_new_sum": _k3(log_ratio_T).sum(),
            "policy/old_logprob_sum": torch.where(finite_T, old_T, 0.0).sum(),
        }
        maxima = {"mismatch/logprob_gap_max": fresh_gap_T.max(), "mismatch/stale_gap_max": (gap_T - fresh_gap_T).max()}
        return _output(terms, sums, maxima)

    return loss


def sft_loss(new_logprobs_T: torch.Tensor, entropy_T: torch.Tensor, batch: PackedBatch) -> LossOutput:
    """Weighted negative log-likelihood of the response tokens; reads the field weight."""
    mask_T = batch.loss_mask_T > 0
    nll_T = -torch.where(mask_T, new_logprobs_T, 0.0)
    terms = {"loss/sft": (torch.where(mask_T, batch.fields["weight"], 0.0) * nll_T).sum()}
    sums = terms | {
        "tokens": _count(mask_T, new_logprobs_T),
        "sft/nll_sum": nll_T.sum(),
        "policy/entropy_sum": torch.where(mask_T, entropy_T, 0.0).sum(),
    }
    return _output(terms, sums, {})


def summarise(totals: Mapping[str, float]) -> dict[str, float]:
    """From sums and maxima over all tokens of all replicas to the step's metrics: token sums become means (0 over no token),
    `loss/total` is added, other names stay. Raises ValueError when no token was trained on."""
    if totals["tokens"] < 1:
        raise ValueError("no token inside any loss mask")
    metrics = {name: value for name, value in totals.items() if name not in MEANS}
    metrics |= {metric: totals[name] / max(totals[count], 1) for name, (metric, count) in MEANS.items() if name in totals}
    metrics["policy/tokens"] = metrics.pop("tokens")
    metrics["loss/total"] = sum(value for name, value in totals.items() if name.startswith("loss/"))
    return metrics


def _limited(log_ratio_T: torch.Tensor) -> torch.Tensor:
    return log_ratio_T.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def _k3(log_ratio_T: torch.Tensor) -> torch.Tensor:
    """exp(x) - x - 1 >= 0: with x = log q - log p of samples from p, an unbiased estimator of KL(p || q)
    (Schulman 2020, "Approximating KL divergence"; DeepSeekMath, arXiv 2402.03300, equation 4)."""
    x_T = _limited(log_ratio_T)
    return x_T.exp() - x_T - 1


def _count(flags_T: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return flags_T.sum(dtype=like.dtype)  # one dtype for all sums: they are reduced together


def _output(terms: dict[str, torch.Tensor], sums: dict[str, torch.Tensor], maxima: dict[str, torch.Tensor]) -> LossOutput:
    return LossOutput(
        loss=torch.stack(list(terms.values())).sum(),
        sums={name: value.detach() for name, value in sums.items()},
        maxima={name: value.detach() for name, value in maxima.items()},
    )
