"""The Triton kernel against the reference, bit for bit. Run by test_fp8.py: under TRITON_INTERPRET=1, or on a GPU."""

from __future__ import annotations

import os

import pytest
import torch
from megatron_rl_kernels.fp8 import reference, triton

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
SHAPES = [(1, 1), (127, 129), (300, 64)]


def check(weights_RC: torch.Tensor) -> None:
    expected, expected_scale = reference.quantize(weights_RC)
    actual, actual_scale = triton.quantize(weights_RC)
    assert actual.dtype == torch.float8_e4m3fn and actual.shape == weights_RC.shape
    torch.testing.assert_close(actual_scale, expected_scale, rtol=0, atol=0, equal_nan=True)
    nan = expected.float().isnan()
    assert torch.equal(actual.float().isnan(), nan)
    assert torch.equal(actual.view(torch.uint8)[~nan], expected.view(torch.uint8)[~nan])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_random(shape: tuple[int, int], dtype: torch.dtype) -> None:
    check(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).to(DEVICE))


def test_values_between_two_numbers_of_the_type() -> None:
    """Ties, subnormals, both signs of zero, and the largest: with 448 in the block its scale is 1."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()].sort().values
    weights = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2, numbers * 1.01])
    check(torch.nn.functional.pad(weights, (0, 128 * 8 - len(weights))).clamp(-448, 448).view(8, 128).to(DEVICE))


def test_strides_zeros_and_broken_blocks() -> None:
    weights = torch.randn(256, 300, device=DEVICE)
    check(weights[:, :200])
    check(weights.t())
    weights[:128, :128] = 0.0
    weights[3, 130] = float("nan")
    weights[200, 5] = float("inf")
    weights[200, 290] = -float("inf")
    check(weights)


def test_the_smallest_and_the_largest() -> None:
    check(torch.full((4, 4), 1e-38, device=DEVICE))
    check(torch.full((4, 4), 3e38, device=DEVICE))
