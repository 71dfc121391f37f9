"""The mismatch report against float64 references of the same tokens, whole, split and spoilt."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rl.algorithms.correction import icepop_weights
from megatron_rl.algorithms.histogram import Histogram, quantile
from megatron_rl.algorithms.mismatch import (
    AGES,
    ENTROPIES,
    GAP_BINS,
    MismatchSums,
    mismatch_histograms,
    mismatch_metrics,
    mismatch_sums,
)

BIN = 10 ** (1 / 8) * (1 + 1e-5)  # of the sizes, with float32's rounding at an edge
Tokens = dict[str, torch.Tensor]


def tokens_of(count: int = 20_000, seed: int = 0) -> Tokens:
    """Gaps from 1e-5 to a few nats with heavy tails, growing with age and entropy; a tenth outside the mask, filled with NaN."""
    random = torch.Generator().manual_seed(seed)
    normal = torch.randn(count, generator=random)
    age_T = torch.randint(0, 12, (count,), generator=random).float()
    entropy_T = torch.rand(count, generator=random) ** 4 * 3
    engine_T = -(torch.rand(count, generator=random) ** 3) * 8
    old_T = (engine_T + normal**3 * 0.02 * (1 + age_T) * (0.1 + entropy_T)).clamp(max=0.0)
    mask_T = (torch.rand(count, generator=random) > 0.1).float()
    tokens = {"old": old_T, "engine": engine_T, "entropy": entropy_T, "age": age_T}
    tokens = {name: torch.where(mask_T > 0, values_T, torch.nan) for name, values_T in tokens.items()}
    return tokens | {"weights": icepop_weights(tokens["old"], tokens["engine"]), "mask": mask_T}


def sums_of(tokens: Tokens) -> MismatchSums:
    return mismatch_sums(*(tokens[name] for name in ("old", "engine", "entropy", "age", "weights", "mask")))


def totals_of(*parts: Tokens) -> dict[str, Any]:
    found = [sums_of(part) for part in parts]
    totals: dict[str, Any] = {name: sum(of.sums[name] for of in found).tolist() for name in found[0].sums}  # type: ignore[union-attr]
    totals |= {name: sum(of.tables[name] for of in found).tolist() for name in found[0].tables}  # type: ignore[union-attr]
    return totals | {name: max(of.maxima[name].item() for of in found) for name in found[0].maxima}


def inside(tokens: Tokens) -> dict[str, np.ndarray]:
    return {name: values_T[tokens["mask"] > 0].double().numpy() for name, values_T in tokens.items()}


def test_numbers_are_those_of_a_float64_reference() -> None:
    tokens = tokens_of()
    metrics, numbers = mismatch_metrics(totals_of(tokens)), inside(tokens)
    log_k = numbers["old"] - numbers["engine"]
    k, gap, prob_gap = np.exp(log_k), np.abs(log_k), np.abs(np.exp(numbers["old"]) - np.exp(numbers["engine"]))
    exact = {
        "gap_mean": gap.mean(),
        "gap_max": gap.max(),
        "prob_gap_mean": prob_gap.mean(),
        "prob_gap_max": prob_gap.max(),
        "kl_engine_train": (k - 1 - log_k).mean(),
        "kl_engine_train_k1": -log_k.mean(),
        "ess": k.sum() ** 2 / (len(k) * (k**2).sum()),
        "masked_low_fraction": (k < 0.5).mean(),
        "masked_high_fraction": (k > 5).mean(),
        "masked_fraction": ((k < 0.5) | (k > 5)).mean(),
        "logprob_gap_mean": gap[numbers["age"] == 0].mean(),
        "logprob_gap_max": gap[numbers["age"] == 0].max(),
        "stale_gap_mean": gap[numbers["age"] > 0].mean(),
        "stale_gap_max": gap[numbers["age"] > 0].max(),
        "nonfinite": 0.0,
    }
    for name, value in exact.items():
        assert metrics[f"mismatch/{name}"] == pytest.approx(value, rel=2e-6, abs=1e-9), name
    for name, percent in (("p50", 50), ("p90", 90), ("p99", 99), ("p99.9", 99.9)):
        for kind, values in (("gap", gap), ("prob_gap", prob_gap)):
            value = np.percentile(values, percent, method="inverted_cdf")
            assert value * (1 - 1e-5) <= metrics[f"mismatch/{kind}_{name}"] <= value * BIN, (kind, name)


def test_small_numbers_by_hand() -> None:
    """log k = ln 2, -ln 2 and 0 over tokens of probability 1/2, 1/2 and 1; the second too old and masked from below."""
    half = math.log(0.5)
    tokens = {
        "old": torch.tensor([0.0, 2 * half, 0.0]),
        "engine": torch.tensor([half, half, 0.0]),
        "entropy": torch.tensor([0.5, 2.0, 0.0]),
        "age": torch.tensor([0.0, 3.0, 0.0]),
        "weights": torch.tensor([2.0, 0.0, 1.0]),
        "mask": torch.ones(3),
    }
    metrics = mismatch_metrics(totals_of(tokens))
    expected = {
        "gap_mean": 2 * math.log(2) / 3,
        "gap_max": math.log(2),
        "gap_p50": math.log(2),  # nearest rank: the second of 0, ln 2, ln 2
        "prob_gap_mean": (0.5 + 0.25) / 3,
        "prob_gap_max": 0.5,
        "kl_engine_train": (2 + 0.5 + 1 - 3) / 3,
        "kl_engine_train_k1": 0.0,
        "ess": 3.5**2 / (3 * 5.25),
        "masked_low_fraction": 1 / 3,
        "masked_high_fraction": 0.0,
        "by_age/0/share": 2 / 3,
        "by_age/0/gap_mean": math.log(2) / 2,
        "by_age/0/masked_fraction": 0.0,
        "by_age/2-3/share": 1 / 3,
        "by_age/2-3/gap_mean": math.log(2),
        "by_age/2-3/masked_fraction": 1.0,
        "by_entropy/top_5/gap_mean": math.log(2),
        "by_entropy/top_5/masked_fraction": 1.0,
        "by_entropy/lowest_50/gap_mean": (0 + 0.5 * math.log(2)) / 1.5,  # half of all: the third token and half of the first
        "by_entropy/lowest_50/masked_fraction": 0.0,
        "by_entropy/lowest_50/entropy_from": 0.0,
    }
    for name, value in expected.items():
        assert metrics[f"mismatch/{name}"] == pytest.approx(value, rel=1e-6, abs=1e-7), name
    assert not [name for name in metrics if "/by_age/1/" in name]  # no tokens, no numbers
    histograms = mismatch_histograms(totals_of(tokens))
    assert [histograms[f"mismatch/{name}"].total for name in ("gap_above", "gap_below", "prob_gap")] == [2, 1, 3]
    assert histograms["mismatch/gap_above"].counts[0] == 1  # no gap at all
    below = histograms["mismatch/gap_below"].trimmed()
    assert below.counts == (1,) and below.edge(0) <= math.log10(math.log(2)) < below.edge(1)


def test_groups_by_age_are_exact() -> None:
    tokens = tokens_of()
    metrics, numbers = mismatch_metrics(totals_of(tokens)), inside(tokens)
    gap, age = np.abs(numbers["old"] - numbers["engine"]), numbers["age"]
    bounds = [*AGES.values(), math.inf]
    for number, name in enumerate(AGES):
        chosen = (age >= bounds[number]) & (age < bounds[number + 1])
        group = f"mismatch/by_age/{name}"
        assert metrics[f"{group}/share"] == pytest.approx(chosen.mean(), rel=1e-9)
        assert metrics[f"{group}/gap_mean"] == pytest.approx(gap[chosen].mean(), rel=1e-6)
        assert metrics[f"{group}/masked_fraction"] == pytest.approx((numbers["weights"][chosen] == 0).mean(), rel=1e-9)
        p99 = np.percentile(gap[chosen], 99, method="inverted_cdf")
        assert p99 * (1 - 1e-5) <= metrics[f"{group}/gap_p99"] <= p99 * BIN


def test_entropy_groups_are_quantiles_of_the_step() -> None:
    """Bins of a thirty-second of a decade: a group differs from the exact one in the tokens of its outer bins alone."""
    tokens = tokens_of()
    metrics, numbers = mismatch_metrics(totals_of(tokens)), inside(tokens)
    order = np.argsort(numbers["entropy"])
    gap = np.abs(numbers["old"] - numbers["engine"])[order]
    shares = [*ENTROPIES.values(), 1.0]
    means = []
    for number, name in enumerate(ENTROPIES):
        first, end = (round(share * len(gap)) for share in shares[number : number + 2])
        mean = metrics[f"mismatch/by_entropy/{name}/gap_mean"]
        assert mean == pytest.approx(gap[first:end].mean(), rel=0.05)
        exact_from = numbers["entropy"][order][first]
        assert metrics[f"mismatch/by_entropy/{name}/entropy_from"] <= exact_from * (1 + 1e-5)
        means.append(mean * (end - first))
    assert sum(means) == pytest.approx(gap.sum(), rel=1e-3)  # each token is in one group
    assert metrics["mismatch/by_entropy/top_5/gap_mean"] > 5 * metrics["mismatch/by_entropy/lowest_50/gap_mean"]


def test_a_split_into_microbatches_changes_nothing() -> None:
    tokens = tokens_of(5000)
    ends = [0, 1, 700, 2500, 2501, 5000]
    parts = [{name: values[a:b] for name, values in tokens.items()} for a, b in pairwise(ends)]
    whole, split = totals_of(tokens), totals_of(*parts)
    assert mismatch_metrics(split) == pytest.approx(mismatch_metrics(whole), rel=1e-12)
    assert mismatch_histograms(split) == mismatch_histograms(whole)


def test_what_the_mask_leaves_out_is_never_read() -> None:
    tokens = tokens_of(2000)
    outside = tokens["mask"] == 0
    other = {name: torch.where(outside, 7.0, values) if name != "mask" else values for name, values in tokens.items()}
    chosen = {name: values[~outside] for name, values in tokens.items()}
    assert mismatch_metrics(totals_of(tokens)) == mismatch_metrics(totals_of(other))
    assert mismatch_metrics(totals_of(chosen)) == pytest.approx(mismatch_metrics(totals_of(tokens)), rel=1e-12)


def test_gaps_that_are_not_finite_are_counted_apart() -> None:
    tokens = tokens_of(2000)
    good = {name: values[tokens["mask"] > 0] for name, values in tokens.items()}
    inf, nan = torch.inf, torch.nan
    spoilt = {
        "old": torch.tensor([-inf, -1.0, nan, -inf, -1.0]),
        "engine": torch.tensor([-1.0, -inf, -1.0, -inf, -1.0]),
        "entropy": torch.tensor([0.5, nan, inf, 0.5, nan]),
        "age": torch.zeros(5),
        "weights": torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0]),
        "mask": torch.ones(5),
    }
    both = {name: torch.cat([good[name], spoilt[name]]) for name in good}
    clean, mixed = mismatch_metrics(totals_of(good)), mismatch_metrics(totals_of(both))
    assert all(math.isfinite(value) for value in mixed.values())
    assert mixed["mismatch/nonfinite"] == 4
    for name in ("gap_max", "gap_p99", "prob_gap_max"):
        assert mixed[f"mismatch/{name}"] == clean[f"mismatch/{name}"]
    n = len(good["old"])
    assert mixed["mismatch/gap_mean"] == pytest.approx(clean["mismatch/gap_mean"] * n / (n + 1), rel=1e-12)
    for side, more in (("", 4), ("_low", 1), ("_high", 1)):  # infinite on either side, and twice undefined
        masked = clean[f"mismatch/masked{side}_fraction"] * n + more
        assert mixed[f"mismatch/masked{side}_fraction"] == pytest.approx(masked / (n + 5), rel=1e-12)


def test_huge_gaps_stay_finite() -> None:
    names = ("entropy", "age", "weights", "mask")
    tokens = {"old": torch.tensor([0.0, -500.0, -1e30]), "engine": torch.tensor([-300.0, 0.0, -1.0])}
    metrics = mismatch_metrics(totals_of(tokens | {name: torch.ones(3) for name in names}))
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["mismatch/kl_engine_train"] == pytest.approx((math.exp(20) - 21 + 2 * (math.exp(-20) + 19)) / 3, rel=1e-6)
    assert metrics["mismatch/gap_p50"] == pytest.approx(1e30)  # beyond the last bin: the largest of all


@pytest.mark.parametrize("count", [0, 4])
def test_no_token_gives_zeros(count: int) -> None:
    """A CP rank may hold none, and a filler has none inside the mask."""
    names = ("old", "engine", "entropy", "age", "weights", "mask")
    metrics = mismatch_metrics(totals_of({name: torch.zeros(count) for name in names}))
    assert set(metrics.values()) == {0.0} and not [name for name in metrics if "/by_" in name]


def test_the_sums_carry_no_gradient() -> None:
    tokens = tokens_of(10)
    tokens["old"] = tokens["old"].nan_to_num().requires_grad_()
    found = sums_of(tokens)
    assert not any(value.requires_grad for value in (*found.sums.values(), *found.maxima.values(), *found.tables.values()))


@pytest.mark.parametrize("size", [0.0, 1e-12, 9e-8, 1.01e-7, 3.3e-4, 0.99, 1.01, 99.0, 1e4])
def test_a_size_lies_in_its_bin(size: float) -> None:
    number = int(GAP_BINS.index(torch.tensor([size])))
    low, high = (10 ** (GAP_BINS.start + (number + i) * GAP_BINS.width) for i in (0, 1))
    assert (low <= size or number == 0) and (size < high or number == GAP_BINS.count - 1)


def test_a_quantile_is_the_upper_end_of_its_bin() -> None:
    counts = [50.0, 0.0, 40.0, 10.0]
    for share, expected in ((0.5, 0.0), (0.51, 0.1), (0.9, 0.1), (0.91, 0.7), (1.0, 0.7)):
        assert quantile(counts, -4.0, 1.0, share, largest=0.7) == pytest.approx(expected), share
    assert quantile([0.0, 0.0], -4.0, 1.0, 0.5, largest=1.0) == 0.0


def test_trimming_and_json_keep_counts_and_places() -> None:
    histogram = Histogram(-3.0, 0.5, (0.0, 0.0, 3.0, 0.0, 5.0, 0.0))
    trimmed = histogram.trimmed()
    assert trimmed == Histogram(-2.0, 0.5, (3.0, 0.0, 5.0)) == trimmed.trimmed()
    assert Histogram.from_json(histogram.to_json()) == trimmed
    assert Histogram(-3.0, 0.5, (0.0, 0.0)).trimmed().counts == ()
