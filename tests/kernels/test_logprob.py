"""megatron_rl_kernels.logprob: the reference against independent numbers, the Triton kernel in a process of its own."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron_rl_kernels.logprob import token_logprobs

CHECKS = Path(__file__).with_name("checks_logprob.py")


def test_hand_computed() -> None:
    logits_TV = torch.tensor([[math.log(1.0), math.log(2.0), math.log(5.0)]])
    logprobs_T, entropy_T = token_logprobs(logits_TV, torch.tensor([1]), 1.0)
    assert logprobs_T.item() == pytest.approx(math.log(0.25), abs=1e-6)
    assert entropy_T.item() == pytest.approx(-sum(p * math.log(p) for p in (0.125, 0.25, 0.625)), abs=1e-6)
    logprobs_T, _ = token_logprobs(logits_TV, torch.tensor([1]), 0.5)  # probabilities 1, 4, 25 over 30
    assert logprobs_T.item() == pytest.approx(math.log(4 / 30), abs=1e-6)


def test_the_reference_passes_gradcheck_in_float64() -> None:
    logits_TV = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    tokens_T = torch.tensor([0, 8, 3, 3])
    assert torch.autograd.gradcheck(lambda logits: token_logprobs(logits, tokens_T, 0.7), (logits_TV,))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-6)])
def test_the_reference_computes_in_fp32(dtype: torch.dtype, tolerance: float) -> None:
    logits_TV = (torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)) * 4).to(dtype)
    tokens_T = torch.tensor([0, 4999, 7])
    actual, expected = token_logprobs(logits_TV, tokens_T, 0.7), token_logprobs(logits_TV.double(), tokens_T, 0.7)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, atol=tolerance, rtol=tolerance)


def test_masked_logits_have_probability_and_gradient_zero() -> None:
    logits_TV = torch.tensor([[0.0, -math.inf, 0.0]], requires_grad=True)
    logprobs_T, entropy_T = token_logprobs(logits_TV, torch.tensor([0]))
    assert (logprobs_T.item(), entropy_T.item()) == pytest.approx((-math.log(2), math.log(2)))
    (logprobs_T + entropy_T).sum().backward()
    assert logits_TV.grad is not None
    torch.testing.assert_close(logits_TV.grad, torch.tensor([[0.5, 0.0, -0.5]]))


@pytest.mark.parametrize(
    ("tokens", "temperature", "message"),
    [([0, 1], 0.0, "temperature=0"), ([0], 1.0, r"logits \(2, 3\) and tokens \(1,\)")],
)
def test_bad_arguments_are_named(tokens: list[int], temperature: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_logprobs(torch.zeros(2, 3), torch.tensor(tokens), temperature)


def run_checks(interpret: str) -> None:
    """In a child: triton reads TRITON_INTERPRET when it is imported, and no other test may see it."""
    command = [sys.executable, "-P", "-m", "pytest", str(CHECKS), "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": interpret}, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_kernel_under_the_interpreter() -> None:
    run_checks("1")


@pytest.mark.gpu
def test_the_kernel_on_a_gpu() -> None:
    run_checks("0")


@pytest.mark.gpu
def test_cuda_tensors_go_to_the_kernel() -> None:
    logits_TV, tokens_T = torch.randn(3, 100), torch.tensor([1, 2, 3])
    for a, e in zip(token_logprobs(logits_TV.cuda(), tokens_T.cuda()), token_logprobs(logits_TV, tokens_T), strict=True):
        assert a.is_cuda
        torch.testing.assert_close(a.cpu(), e, atol=1e-5, rtol=0.0)
