"""How far the policy that trains and the engine that sampled are apart, in sums that add up over microbatches and replicas.

    mismatch_sums(old, engine, entropy, age, weights, mask)     # in the loss, once a microbatch
    mismatch_metrics(totals), mismatch_histograms(totals)       # once a step, of all of them together

The gap of a token is old_logprobs - engine_logprobs = log k. Percentiles and groups cannot be added up, counts in fixed bins can:
sizes fall into bins of an eighth of a decade (`GAP_BINS`), entropies into such of a thirty-second, jointly, and percentiles and the
quantile groups of the entropy are read off the counts of the whole step.

Invariants (tests/unit/test_algorithms_mismatch.py):
- means, the KL and the effective sample size are exact; a percentile is never below its exact value, and a third above at most;
- any split into microbatches and replicas gives the same numbers;
- entries outside the mask are never read; a gap that is not finite is counted in `mismatch/nonfinite`, and in nothing else but the
  tokens and the masked ones;
- nothing here waits for the device before the step's end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from megatron_rl.algorithms.histogram import Histogram, quantile

Totals = Mapping[str, Any]  # numbers, and tables as nested lists
LOG_RATIO_LIMIT = 20.0  # as of the losses: exp overflows float32 at 88, and its square at 44
PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}
AGES = {"0": 0, "1": 1, "2-3": 2, "4-7": 4, "8_up": 8}  # weight versions between sampling and training: class -> its youngest
ENTROPIES = {"lowest_50": 0.0, "50-80": 0.5, "80-95": 0.8, "top_5": 0.95}  # group -> the share of tokens with less entropy


@dataclass(frozen=True)
class Bins:
    """Of log10 of a size: `per_decade` from 10^low to 10^high, one below and one above them."""

    low: int
    high: int
    per_decade: int

    @property
    def count(self) -> int:
        return (self.high - self.low) * self.per_decade + 2

    @property
    def width(self) -> float:
        return 1 / self.per_decade

    @property
    def start(self) -> float:
        """Where the lowest bin would begin if it were no wider than the others."""
        return self.low - self.width

    def index(self, sizes_T: torch.Tensor) -> torch.Tensor:
        place_T = (sizes_T.clamp_min(10.0 ** (self.low - 1)).log10() - self.low) * self.per_decade
        return (place_T.floor().clamp(-1, self.count - 2) + 1).long()


GAP_BINS = Bins(-7, 2, 8)  # nats; below: rounding of float32, told as 0
PROB_BINS = Bins(-7, 0, 8)
ENTROPY_BINS = Bins(-4, 2, 32)
TOKENS, MASKED, GAP_SUM, PROB_GAP_SUM = range(4)  # columns of the tables by age and by entropy


@dataclass(frozen=True)
class MismatchSums:
    """Of one microbatch, as of a LossOutput."""

    sums: dict[str, torch.Tensor]
    maxima: dict[str, torch.Tensor]
    tables: dict[str, torch.Tensor]


@torch.no_grad()
def mismatch_sums(
    old_logprobs_T: torch.Tensor,
    engine_logprobs_T: torch.Tensor,
    entropy_T: torch.Tensor,
    age_T: torch.Tensor,
    weights_T: torch.Tensor,
    mask_T: torch.Tensor,
) -> MismatchSums:
    """`age_T` is the number of weight versions between a token's sampling and its training; `weights_T` the correction's, 0 where
    it masks; `mask_T` the loss mask.

    With k = exp(log k) limited to e^+-20, over the engine's own samples: mean of -log k and of k - 1 - log k, both unbiased
    estimators of KL(engine || train), the second with less variance (Schulman 2020, "Approximating KL divergence": k1 and k3), and
    (sum k)^2 / (n sum k^2), Kish's effective sample size, as a share of n.
    """
    mask_T = mask_T > 0
    log_k_T = torch.where(mask_T, old_logprobs_T - engine_logprobs_T, 0.0)
    finite_T = torch.isfinite(log_k_T)
    counted_T = mask_T & finite_T
    masked_T = mask_T & ~(weights_T > 0)
    sums = {
        "mismatch/masked": masked_T.sum(),
        "mismatch/masked_low": (masked_T & (log_k_T < 0)).sum(),
        "mismatch/masked_high": (masked_T & (log_k_T > 0)).sum(),
        "mismatch/nonfinite": (mask_T & ~finite_T).sum(),
    }
    log_k_T = torch.where(finite_T, log_k_T, 0.0)
    engine_T, old_T = (torch.where(counted_T, values_T, 0.0) for values_T in (engine_logprobs_T, old_logprobs_T))
    gap_T, prob_gap_T = log_k_T.abs(), (old_T.exp() - engine_T.exp()).abs()
    limited_T = log_k_T.double().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    k_T = torch.where(counted_T, limited_T.exp(), 0.0)
    sums |= {
        "mismatch/k_sum": k_T.sum(),
        "mismatch/k_square_sum": k_T.square().sum(),
        "mismatch/k1_sum": -limited_T.sum(),
        "mismatch/k3_sum": torch.where(counted_T, torch.expm1(limited_T) - limited_T, 0.0).sum(),
    }

    # What is outside the mask goes into a row of its own, which is cut off: selecting would wait for the device.
    age_row_T = torch.where(mask_T, _age_class(age_T), len(AGES))
    entropy_row_T = torch.where(mask_T, ENTROPY_BINS.index(entropy_T.nan_to_num(nan=torch.inf)), ENTROPY_BINS.count)
    gap_bin_T, ones_T = GAP_BINS.index(gap_T), counted_T.double()
    side_T = (log_k_T < 0).long()
    columns_TK = torch.stack([mask_T, masked_T, gap_T, prob_gap_T], dim=1).double()

    def table(rows_T: torch.Tensor, rows: int) -> torch.Tensor:
        return columns_TK.new_zeros(rows + 1, columns_TK.size(1)).index_add_(0, rows_T, columns_TK)[:-1]

    def gap_counts(rows_T: torch.Tensor, rows: int) -> torch.Tensor:
        flat = ones_T.new_zeros((rows + 1) * GAP_BINS.count).index_add_(0, rows_T * GAP_BINS.count + gap_bin_T, ones_T)
        return flat.view(rows + 1, GAP_BINS.count)[:-1]

    tables = {
        "mismatch/prob_gaps": ones_T.new_zeros(PROB_BINS.count).index_add_(0, PROB_BINS.index(prob_gap_T), ones_T),
        "mismatch/gaps_by_side": gap_counts(torch.where(mask_T, side_T, 2), 2),
        "mismatch/gaps_by_age": gap_counts(age_row_T, len(AGES)),
        "mismatch/gaps_by_entropy": gap_counts(entropy_row_T, ENTROPY_BINS.count),
        "mismatch/by_age": table(age_row_T, len(AGES)),
        "mismatch/by_entropy": table(entropy_row_T, ENTROPY_BINS.count),
    }
    maxima = {
        "mismatch/logprob_gap_max": _largest(torch.where(age_row_T == 0, gap_T, 0.0)),
        "mismatch/stale_gap_max": _largest(torch.where(age_row_T == 0, 0.0, gap_T)),
        "mismatch/prob_gap_max": _largest(prob_gap_T),
    }
    return MismatchSums(sums, maxima, tables)


def mismatch_metrics(totals: Totals) -> dict[str, float]:
    """The step's numbers, of the sums, maxima and tables over all microbatches of all replicas; none where none was measured.

    - `mismatch/logprob_gap_mean` and `..._max` of |log k|: of tokens of age 0, for which it ought to be rounding, and
      `mismatch/stale_gap_mean`, `..._max` of older ones; `mismatch/gap_...` of all;
    - `mismatch/gap_p50` and so on: percentiles of |log k|, and `mismatch/prob_gap_...` of |p_old - p_engine|: the upper end of the
      bin that holds them, at most 1.33 times the exact value, never less; 0 below 1e-7. Means and maxima are exact;
    - `mismatch/kl_engine_train` (k3), `mismatch/kl_engine_train_k1`, `mismatch/ess`;
    - `mismatch/masked_fraction`, and `..._low_fraction`, `..._high_fraction` by the side of 1 on which k lies;
    - `mismatch/by_age/<versions>/share` of tokens, `gap_mean`, `gap_p99`, `prob_gap_mean` and `masked_fraction`: of classes that
      have tokens; `mismatch/by_entropy/<percent of tokens>/...` likewise, with `entropy_from` instead of the share: a bin of
      entropies on a boundary counts on both sides, in proportion, and tokens within one bin are not told apart.
    """
    if not _measured(totals):
        return {}
    by_age, by_entropy, gaps_by_age, gaps_by_entropy, prob_gaps = (
        torch.tensor(totals[f"mismatch/{name}"], dtype=torch.float64)
        for name in ("by_age", "by_entropy", "gaps_by_age", "gaps_by_entropy", "prob_gaps")
    )
    tokens = float(by_age[:, TOKENS].sum())
    n, fresh, stale = (max(float(part.sum()), 1.0) for part in (gaps_by_age, gaps_by_age[0], gaps_by_age[1:]))  # with a finite gap
    fresh_max, stale_max, prob_max = (totals[f"mismatch/{name}_max"] for name in ("logprob_gap", "stale_gap", "prob_gap"))
    gap_max = max(fresh_max, stale_max)
    metrics = {
        "mismatch/nonfinite": totals["mismatch/nonfinite"],
        **{
            f"mismatch/{name}_fraction": totals[f"mismatch/{name}"] / max(tokens, 1)
            for name in ("masked", "masked_low", "masked_high")
        },
        "mismatch/kl_engine_train": totals["mismatch/k3_sum"] / n,
        "mismatch/kl_engine_train_k1": totals["mismatch/k1_sum"] / n,
        "mismatch/ess": _ess(totals["mismatch/k_sum"], totals["mismatch/k_square_sum"], n),
        "mismatch/logprob_gap_mean": float(by_age[0, GAP_SUM]) / fresh,
        "mismatch/logprob_gap_max": fresh_max,
        "mismatch/stale_gap_mean": float(by_age[1:, GAP_SUM].sum()) / stale,
        "mismatch/stale_gap_max": stale_max,
        "mismatch/gap_mean": float(by_age[:, GAP_SUM].sum()) / n,
        "mismatch/gap_max": gap_max,
        "mismatch/prob_gap_mean": float(by_age[:, PROB_GAP_SUM].sum()) / n,
        "mismatch/prob_gap_max": prob_max,
    }
    for name, share in PERCENTILES.items():
        metrics[f"mismatch/gap_{name}"] = _quantile(gaps_by_age.sum(0), GAP_BINS, share, gap_max)
        metrics[f"mismatch/prob_gap_{name}"] = _quantile(prob_gaps, PROB_BINS, share, prob_max)
    for row, name in enumerate(AGES):
        if by_age[row, TOKENS] > 0:
            metrics[f"mismatch/by_age/{name}/share"] = float(by_age[row, TOKENS]) / tokens
            metrics |= _of_group(f"mismatch/by_age/{name}", by_age[row], gaps_by_age[row], gap_max)
    for name, parts in _entropy_groups(by_entropy[:, TOKENS]).items():
        lowest = int(parts.nonzero()[0])
        start = 10 ** (ENTROPY_BINS.start + lowest * ENTROPY_BINS.width)
        metrics[f"mismatch/by_entropy/{name}/entropy_from"] = start if lowest else 0.0
        metrics |= _of_group(f"mismatch/by_entropy/{name}", parts @ by_entropy, parts @ gaps_by_entropy, gap_max)
    return metrics


def mismatch_histograms(totals: Totals) -> dict[str, Histogram]:
    """Sizes of the gap where the policy finds a token likelier than the engine (log k >= 0), where less likely, and the sizes of
    the gap in probability; none where none was measured."""
    if not _measured(totals):
        return {}
    above, below = totals["mismatch/gaps_by_side"]
    return {
        "mismatch/gap_above": _histogram(above, GAP_BINS),
        "mismatch/gap_below": _histogram(below, GAP_BINS),
        "mismatch/prob_gap": _histogram(totals["mismatch/prob_gaps"], PROB_BINS),
    }


def _measured(totals: Totals) -> bool:
    return "mismatch/by_age" in totals


def _age_class(age_T: torch.Tensor) -> torch.Tensor:
    class_T = torch.zeros_like(age_T, dtype=torch.long)
    for youngest in list(AGES.values())[1:]:
        class_T += age_T >= youngest
    return class_T


def _entropy_groups(tokens_E: torch.Tensor) -> dict[str, torch.Tensor]:
    """Which part of each bin's tokens belongs to each group; none of no tokens."""
    total = tokens_E.sum()
    if total == 0:
        return {}
    ends_E = tokens_E.cumsum(0)
    starts_E = ends_E - tokens_E
    groups = {}
    for (name, low), (_, high) in pairwise([*ENTROPIES.items(), ("", 1.0)]):
        inside_E = ends_E.clamp(max=high * total) - starts_E.clamp(min=low * total)
        groups[name] = torch.where(tokens_E > 0, inside_E.clamp(min=0.0) / tokens_E.clamp(min=1.0), 0.0)
    return groups


def _of_group(name: str, row: torch.Tensor, gaps: torch.Tensor, gap_max: float) -> dict[str, float]:
    finite = max(float(gaps.sum()), 1e-300)
    return {
        f"{name}/gap_mean": float(row[GAP_SUM]) / finite,
        f"{name}/gap_p99": _quantile(gaps, GAP_BINS, 0.99, gap_max),
        f"{name}/prob_gap_mean": float(row[PROB_GAP_SUM]) / finite,
        f"{name}/masked_fraction": float(row[MASKED] / row[TOKENS]),
    }


def _ess(k_sum: float, k_square_sum: float, n: float) -> float:
    return k_sum**2 / (n * k_square_sum) if k_square_sum > 0 else 0.0


def _quantile(counts: torch.Tensor, bins: Bins, share: float, largest: float) -> float:
    return quantile(counts.tolist(), bins.start, bins.width, share, largest)


def _histogram(counts: Sequence[float], bins: Bins) -> Histogram:
    return Histogram(bins.start, bins.width, tuple(counts))


def _largest(sizes_T: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(sizes_T, (0, 1)).max()  # 0 over no token, as a CP rank may have
