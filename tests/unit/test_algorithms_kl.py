"""Estimators of the KL divergence: by hand, and their means over a whole vocabulary."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_rl.algorithms.kl import KlEstimator, kl_estimate


@pytest.mark.parametrize(
    ("estimator", "expected"),
    # new = 0.5, ref = 0.25, old = 0.4: x = log(1 / 2), r = 1.25
    [("k1", math.log(2)), ("k2", math.log(2) ** 2 / 2), ("k3", math.log(2) - 0.5), ("unbiased", 1.25 * (math.log(2) - 0.5))],
)
def test_by_hand(estimator: KlEstimator, expected: float) -> None:
    new_T, ref_T, ratio_T = (torch.tensor([p], dtype=torch.float64).log() for p in (0.5, 0.25, 1.25))
    assert kl_estimate(estimator, new_T, ref_T, ratio_T).item() == pytest.approx(expected, rel=1e-12)


def distributions() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    logits_V, ref_V, old_V = torch.randn(3, 50, generator=draw, dtype=torch.float64)
    return logits_V.requires_grad_(), ref_V.log_softmax(-1), old_V.log_softmax(-1)


def divergence(logits_V: torch.Tensor, ref_V: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    new_V = logits_V.log_softmax(-1)
    kl = (new_V.exp() * (new_V - ref_V)).sum()
    return kl, torch.autograd.grad(kl, logits_V)[0]


@pytest.mark.parametrize("estimator", ["k1", "k3", "unbiased"])
def test_the_mean_over_the_vocabulary_is_the_divergence(estimator: KlEstimator) -> None:
    logits_V, ref_V, old_V = distributions()
    new_V = logits_V.log_softmax(-1)
    sampler_V = old_V if estimator == "unbiased" else new_V
    mean = (sampler_V.exp() * kl_estimate(estimator, new_V, ref_V, new_V - old_V)).sum()
    torch.testing.assert_close(mean, divergence(logits_V, ref_V)[0])


@pytest.mark.parametrize(("estimator", "off_policy"), [("unbiased", True), ("unbiased", False), ("k2", False)])
def test_the_mean_gradient_is_the_divergences(estimator: KlEstimator, off_policy: bool) -> None:
    logits_V, ref_V, old_V = distributions()
    new_V = logits_V.log_softmax(-1)
    sampler_V = old_V if off_policy else new_V.detach()
    mean = (sampler_V.exp() * kl_estimate(estimator, new_V, ref_V, new_V - sampler_V)).sum()
    torch.testing.assert_close(torch.autograd.grad(mean, logits_V)[0], divergence(logits_V, ref_V)[1])


def test_k1_has_no_gradient_in_the_mean() -> None:
    logits_V, ref_V, _ = distributions()
    new_V = logits_V.log_softmax(-1)
    mean = (new_V.detach().exp() * kl_estimate("k1", new_V, ref_V)).sum()
    assert torch.autograd.grad(mean, logits_V)[0].abs().max() < 1e-12


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "unbiased"])
def test_impossible_tokens_leave_value_and_gradient_finite(estimator: KlEstimator) -> None:
    new_T = torch.tensor([-math.inf, -1.0, -500.0], requires_grad=True)
    kl_T = kl_estimate(estimator, new_T, torch.tensor([-1.0, -math.inf, -1.0]), torch.tensor([-math.inf, 0.0, 400.0]))
    kl_T.sum().backward()
    assert kl_T.isfinite().all() and new_T.grad is not None and new_T.grad.isfinite().all()
