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

from collections.abc import Callable
from typing import Literal

import torch

from megatron_rl.algorithms.batch import LossOutput, PackedBatch
from megatron_rl.algorithms.correction import Correction, off_policy_sequence_mask
from megatron_rl.algorithms.kl import KlEstimator, k3, kl_estimate, limited
from megatron_rl.algorithms.mismatch import Totals, mismatch_metrics, mismatch_sums
from megatron_rl.algorithms.surrogates import Surrogate

ICEPOP, PPO = Correction(), Surrogate()
TokenLoss = Callable[[torch.Tensor, torch.Tensor, PackedBatch], LossOutput]
MEANS = {  # a sum over tokens -> (the metric, the sum that counts these tokens)
    "policy/clipped": ("policy/clip_fraction", "tokens"),
    "policy/entropy_sum": ("policy/entropy", "tokens"),
    "policy/kl_old_new_sum": ("policy/kl_old_new", "tokens"),
    "policy/off_policy_masked": ("policy/off_policy_masked_fraction", "tokens"),
    "policy/old_logprob_sum": ("policy/old_logprob", "tokens"),
    "sft/nll_sum": ("sft/nll", "tokens"),
}


def policy_loss(
    *,
    correction: Correction = ICEPOP,
    surrogate: Surrogate = PPO,
    kl_weight: float = 0.0,
    kl_estimator: KlEstimator = "k3",
    entropy_weight: float = 0.0,
    old_logprobs: Literal["recompute", "reuse"] = "recompute",
) -> TokenLoss:
    """A corrected, clipped policy gradient, to be minimised; by default IcePop (Ring-1T, arXiv 2510.18855, section 2.3.2):

        - sum_t weight (M_t objective_t - kl_weight KL(new || ref) + entropy_weight H)

    with M from k = exp(old - engine) (correction.py), the objective from r = exp(new - old) and A (surrogates.py), KL as in kl.py,
    A and weight per token. C3PO's report (arXiv 2506.14731) prints +alpha H in its loss and says that it encourages exploration:
    here a positive entropy_weight does.

    Reads the fields advantages, engine_logprobs, weight, age; old_logprobs unless they are to be reused (then old = new, detached:
    r = 1, its gradient kept); ref_logprobs if kl_weight > 0. Log-probs in nats; age in versions, from the weights that sampled the
    token to those under training. |engine - old| is logged apart for age 0 (the gap between trainer and engine, which ought to be
    rounding) and for tokens carried over from earlier weights (staleness on top).
    """

    def loss(new_logprobs_T: torch.Tensor, entropy_T: torch.Tensor, batch: PackedBatch) -> LossOutput:
        mask_T = batch.loss_mask_T > 0

        def inside(values_T: torch.Tensor) -> torch.Tensor:
            return torch.where(mask_T, values_T, 0.0)

        new_T, entropy_T = inside(new_logprobs_T), inside(entropy_T)
        old_T = new_T.detach() if old_logprobs == "reuse" else inside(batch.fields["old_logprobs"])
        engine_T, weight_T, advantages_T = (inside(batch.fields[name]) for name in ("engine_logprobs", "weight", "advantages"))

        defined_T = mask_T & (new_T - old_T).detach().isfinite()
        log_ratio_T = limited(torch.where(defined_T, new_T - old_T, 0.0))
        correction_T = torch.where(defined_T, correction.weights(old_T, engine_T, batch), 0.0)
        used_T = correction_T > 0
        sampled_T = torch.where(defined_T, new_T, 0.0)
        values_T, clipped_T = surrogate.objective(sampled_T, log_ratio_T, advantages_T, defined_T, batch)
        weighted_T = weight_T * correction_T * values_T
        sums = {}
        if correction.off_policy_delta is not None:
            near_T = off_policy_sequence_mask(new_T, engine_T, advantages_T, batch, correction.off_policy_delta)
            weighted_T = weighted_T * near_T
            sums["policy/off_policy_masked"] = _count(mask_T & (near_T == 0), new_T)
        terms = {"loss/policy": -weighted_T.sum()}
        if kl_weight > 0:
            kl_T = kl_estimate(kl_estimator, new_T, inside(batch.fields["ref_logprobs"]), log_ratio_T)
            terms["loss/kl"] = kl_weight * (weight_T * kl_T).sum()
        if entropy_weight > 0:
            terms["loss/entropy"] = -entropy_weight * (weight_T * entropy_T).sum()

        sums |= terms | {
            "tokens": _count(mask_T, new_T),
            "policy/clipped": _count(clipped_T & used_T, new_T),
            "policy/entropy_sum": entropy_T.sum(),
            "policy/kl_old_new_sum": k3(log_ratio_T).sum(),
            "policy/old_logprob_sum": torch.where(old_T.isfinite(), old_T, 0.0).sum(),
        }
        gap = mismatch_sums(old_T, engine_T, entropy_T, batch.fields["age"], correction_T, mask_T)
        return _output(terms, sums | gap.sums, gap.maxima, gap.tables)

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
    return _output(terms, sums)


def summarise(totals: Totals) -> dict[str, float]:
    """From sums, maxima and tables over all tokens of all replicas to a step's metrics: token sums become means (0 of no token),
    `loss/total` is added, what was measured of the mismatch becomes its report, other names stay. Raises ValueError when no token
    was trained on."""
    if totals["tokens"] < 1:
        raise ValueError("no token inside any loss mask")
    metrics = {name: value for name, value in totals.items() if name not in MEANS and not name.startswith("mismatch/")}
    metrics |= {metric: totals[name] / max(totals[count], 1) for name, (metric, count) in MEANS.items() if name in totals}
    metrics["policy/tokens"] = metrics.pop("tokens")
    metrics["loss/total"] = sum(value for name, value in totals.items() if name.startswith("loss/"))
    return metrics | mismatch_metrics(totals)


def _count(flags_T: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return flags_T.sum(dtype=like.dtype)


def _output(
    terms: dict[str, torch.Tensor],
    sums: dict[str, torch.Tensor],
    maxima: dict[str, torch.Tensor] | None = None,
    tables: dict[str, torch.Tensor] | None = None,
) -> LossOutput:
    detached = {name: value.detach() for name, value in sums.items()}
    return LossOutput(torch.stack(list(terms.values())).sum(), detached, maxima or {}, tables or {})
