"""RMSNorm against torch's."""

from __future__ import annotations

import pytest
import torch

from megatron_rl.policy.norm import RmsNorm


@pytest.mark.parametrize("shape", [(7, 16), (5, 1, 16), (3, 4, 2, 16)])
def test_values_and_gradients_are_torchs(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    ours, theirs = RmsNorm(16, 1e-6), torch.nn.RMSNorm(16, 1e-6)
    with torch.no_grad():
        theirs.weight.copy_(ours.weight.uniform_(0.5, 1.5))
    x = torch.randn(shape, requires_grad=True)
    x2 = x.detach().clone().requires_grad_()
    grad = torch.randn(shape)
    ours(x).backward(grad)
    theirs(x2).backward(grad)
    assert torch.allclose(ours(x), theirs(x2), atol=1e-6)
    assert x.grad is not None and x2.grad is not None and ours.weight.grad is not None and theirs.weight.grad is not None
    assert torch.allclose(x.grad, x2.grad, atol=1e-6)
    assert torch.allclose(ours.weight.grad, theirs.weight.grad, atol=1e-5)


def test_zeros_stay_zeros_and_have_finite_gradients() -> None:
    x = torch.zeros(2, 16, requires_grad=True)
    y = RmsNorm(16, 1e-6)(x)
    y.sum().backward()
    assert x.grad is not None and y.eq(0).all() and x.grad.isfinite().all()


def test_half_precision_is_normalised_in_fp32() -> None:
    torch.manual_seed(0)
    x = (torch.randn(8, 64) * 300).bfloat16()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    norm = RmsNorm(64, 1e-6).bfloat16()
    assert norm(x).dtype == torch.bfloat16
    assert (norm(x).double() - exact).abs().max() < 2**-8 * exact.abs().max()
