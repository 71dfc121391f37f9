"""Objectives by hand, and sequence methods against their plain form, differentiated by torch directly."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch.autograd import gradcheck

from megatron_rl.algorithms.batch import PackedBatch
from megatron_rl.algorithms.surrogates import cispo, gmpo, gspo, ppo, reinforce

LOG = math.log
LENGTHS = [4, 1, 7, 3]


def packed(lengths: list[int]) -> PackedBatch:
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return PackedBatch(torch.zeros(int(ends[-1]), dtype=torch.long), ends.to(torch.int32), torch.ones(int(ends[-1])))


def case(scale: float = 0.3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, PackedBatch]:
    """(log_ratio_T, advantages_T, among_T, batch) in float64, an advantage of its own for every sequence, one token not counted."""
    draw, total = torch.Generator().manual_seed(3), sum(LENGTHS)
    log_ratio_T = scale * torch.randn(total, generator=draw, dtype=torch.float64)
    advantages_T = torch.repeat_interleave(torch.tensor([1.0, 0.5, -2.0, -1.5], dtype=torch.float64), torch.tensor(LENGTHS))
    among_T = torch.ones(total, dtype=torch.bool)
    among_T[2] = False
    return log_ratio_T.requires_grad_(), advantages_T, among_T, packed(LENGTHS)


def ends() -> list[tuple[int, int]]:
    return list(pairwise([0, *torch.tensor(LENGTHS).cumsum(0).tolist()]))


def test_ppo_by_hand() -> None:
    ratio_T = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.1, 1.1], dtype=torch.float64)
    advantages_T = torch.tensor([2.0, 2.0, -2.0, -2.0, 2.0, 0.0], dtype=torch.float64)
    values_T, clipped_T = ppo(ratio_T.log(), advantages_T, 0.2, 0.3)
    torch.testing.assert_close(values_T, torch.tensor([2.6, 1.0, -3.0, -1.6, 2.2, 0.0], dtype=torch.float64))
    assert clipped_T.tolist() == [True, False, False, True, False, False]


def test_dual_clip_by_hand() -> None:
    log_ratio_T = torch.tensor([LOG(8), LOG(3), LOG(8)], requires_grad=True)
    values_T, clipped_T = ppo(log_ratio_T, torch.tensor([-1.0, -1.0, 1.0]), 0.2, 0.2, dual_clip=4.0)
    torch.testing.assert_close(values_T, torch.tensor([-4.0, -3.0, 1.2]))
    assert clipped_T.tolist() == [True, False, True]
    torch.testing.assert_close(torch.autograd.grad(values_T.sum(), log_ratio_T)[0], torch.tensor([0.0, -3.0, 0.0]))


def test_dual_clip_is_light_r1s_two_sided_clip() -> None:
    log_ratio_T = torch.linspace(-4, 4, 4001, dtype=torch.float64).repeat(2)
    advantages_T = torch.tensor([1.3, -0.7], dtype=torch.float64).repeat_interleave(4001)
    ratio_T = log_ratio_T.exp()
    clipped_T = torch.minimum(ratio_T * advantages_T, ratio_T.clamp(0.8, 1.3) * advantages_T)
    dual_T = torch.where(advantages_T < 0, torch.maximum(clipped_T, 4.0 * advantages_T), clipped_T)  # arXiv 1912.09729
    light_r1_T = torch.minimum(ratio_T.clamp(max=4.0) * advantages_T, ratio_T.clamp(0.8, 1.3) * advantages_T)
    assert dual_T.equal(light_r1_T)
    assert ppo(log_ratio_T, advantages_T, 0.2, 0.3, 4.0).values.equal(light_r1_T)


def test_cispo_by_hand() -> None:
    new_T = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    log_ratio_T = new_T - torch.tensor([-1.0 - LOG(8), -2.0 - LOG(3), -3.0 - LOG(0.1)])
    advantages_T = torch.tensor([1.0, -2.0, 3.0])
    values_T, clipped_T = cispo(log_ratio_T, new_T, advantages_T, 4.0)
    torch.testing.assert_close(values_T, torch.tensor([-5.0, 12.0, -0.9]))
    assert clipped_T.tolist() == [True, False, False]
    # Every token keeps the gradient of its log-prob, at its bounded weight.
    torch.testing.assert_close(torch.autograd.grad(values_T.sum(), new_T)[0], torch.tensor([5.0, -6.0, 0.3]))


def test_reinforce_by_hand() -> None:
    new_T = torch.tensor([-1.0, -2.0], requires_grad=True)
    values_T, clipped_T = reinforce(new_T, torch.tensor([3.0, -1.0]))
    assert values_T.tolist() == [-3.0, 2.0] and not clipped_T.any()
    assert torch.autograd.grad(values_T.sum(), new_T)[0].tolist() == [3.0, -1.0]


def plain_gspo(log_ratio_T: torch.Tensor) -> torch.Tensor:
    """Equations 5 and 7 of arXiv 2507.18071, sequence by sequence, in one piece."""
    _, advantages_T, among_T, _ = case()
    total = torch.zeros((), dtype=torch.float64)
    for begin, end in ends():
        s = log_ratio_T[begin:end][among_T[begin:end]].mean().exp()
        a = advantages_T[begin]
        total = total + torch.minimum(s * a, s.clamp(1 - 0.01, 1 + 0.02) * a)
    return total


def plain_gmpo(log_ratio_T: torch.Tensor) -> torch.Tensor:
    """Geometric mean of |min(r A, clip(r, e^-0.2, e^0.2) A)|, with the sign of A, as a product."""
    _, advantages_T, among_T, _ = case()
    total = torch.zeros((), dtype=torch.float64)
    for begin, end in ends():
        r, a = log_ratio_T[begin:end][among_T[begin:end]].exp(), advantages_T[begin]
        terms = torch.minimum(r * a, r.clamp(math.exp(-0.2), math.exp(0.2)) * a).abs()
        total = total + a.sign() * terms.prod() ** (1 / len(r))
    return total


@pytest.mark.parametrize(("token_form", "plain", "clips"), [(gspo, plain_gspo, (0.01, 0.02)), (gmpo, plain_gmpo, (0.2, 0.2))])
def test_token_forms_have_value_and_gradient_of_the_sequence_forms(token_form, plain, clips) -> None:  # type: ignore[no-untyped-def]
    log_ratio_T, advantages_T, among_T, batch = case()
    values_T, clipped_T = token_form(log_ratio_T, advantages_T, among_T, batch, *clips)
    counts_S = batch.segment_sums(among_T.double())
    actual = (values_T * among_T / counts_S[batch.segment_ids_T]).sum()
    assert clipped_T.any() and not clipped_T.all()  # both branches are there
    torch.testing.assert_close(actual, plain(log_ratio_T), atol=1e-12, rtol=0)
    (gradient_T,) = torch.autograd.grad(actual, log_ratio_T)
    (expected_T,) = torch.autograd.grad(plain(log_ratio_T), log_ratio_T)
    torch.testing.assert_close(gradient_T, expected_T, atol=1e-12, rtol=0)
    assert gradient_T.abs().max() > 0.1
    assert gradcheck(plain, (log_ratio_T,), eps=1e-7, atol=1e-7)  # what it was compared with is differentiated rightly


def test_ppo_against_finite_differences() -> None:
    log_ratio_T, advantages_T, _, _ = case(1.0)
    assert ppo(log_ratio_T, advantages_T, 0.2, 0.3, 2.0).clipped.any()
    assert gradcheck(lambda x: ppo(x, advantages_T, 0.2, 0.3, 2.0).values, (log_ratio_T,), eps=1e-7, atol=1e-7)


def test_clipped_tokens_have_no_gradient() -> None:
    log_ratio_T, advantages_T, among_T, batch = case()
    for values_T, clipped_T in (
        ppo(log_ratio_T, advantages_T, 0.1, 0.1),
        gspo(log_ratio_T, advantages_T, among_T, batch, 0.01, 0.02),
        gmpo(log_ratio_T, advantages_T, among_T, batch, 0.2, 0.2),
    ):
        (gradient_T,) = torch.autograd.grad(values_T.sum(), log_ratio_T)
        assert clipped_T.any() and ((gradient_T == 0) == clipped_T).all()
