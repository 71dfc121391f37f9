"""megatron_rl_kernels.fp8: the reference against independent numbers, the Triton kernel in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from megatron_rl_kernels.fp8 import BLOCK, dequantize, quantize
from megatron_rl_kernels.fp8.reference import LARGEST
from megatron_rl_kernels.fp8.triton import NUM_WARPS, quantize_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CHECKS = Path(__file__).with_name("checks_fp8.py")


def test_hand_computed() -> None:
    weights_RC = torch.zeros(129, 130)
    weights_RC[0, :3] = torch.tensor([448.0, -17.0, 0.07])  # scale 1; 17 lies between 16 and 18, 0.07 nearest to 0.0703125
    weights_RC[128, 129] = -2.0
    quantized_RC, scale_rc = quantize(weights_RC)
    assert scale_rc.tolist() == [[1.0, 1.0], [1.0, pytest.approx(2.0 / 448.0)]]
    assert quantized_RC[0, :3].float().tolist() == [448.0, -16.0, 0.0703125] and quantized_RC[128, 129].float() == -448.0
    assert quantized_RC.float().count_nonzero() == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_comes_back_is_within_half_a_step(dtype: torch.dtype) -> None:
    weights_RC = torch.randn(300, 200, generator=torch.Generator().manual_seed(0)).to(dtype) * 3e-3
    quantized_RC, scale_rc = quantize(weights_RC)
    assert quantized_RC.dtype == torch.float8_e4m3fn and scale_rc.shape == (3, 2) and scale_rc.dtype == torch.float32
    error_RC = (dequantize(quantized_RC, scale_rc) - weights_RC.float()).abs()
    step_RC = dequantize(torch.ones_like(quantized_RC), scale_rc) * 2.0**-9  # of the type's subnormals
    # Three bits of mantissa: half a step is 2**-4 of the value.
    assert (error_RC <= weights_RC.float().abs() * 2.0**-4 * (1 + 1e-6) + step_RC / 2).all()


def test_a_broken_block_is_nan_and_its_neighbours_are_not() -> None:
    for broken in (float("nan"), float("inf"), -float("inf")):
        weights_RC = torch.ones(BLOCK, 2 * BLOCK)
        weights_RC[5, 7] = broken
        restored_RC = dequantize(*quantize(weights_RC))
        assert restored_RC[:, :BLOCK].isnan().all() and torch.equal(restored_RC[:, BLOCK:], weights_RC[:, BLOCK:])


@pytest.mark.parametrize("weights", [torch.zeros(3), torch.zeros(2, 2, dtype=torch.int32)])
def test_bad_arguments_are_named(weights: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="no floating-point matrix"):
        quantize(weights)


@pytest.mark.parametrize("weights", ["*bf16", "*fp32"])
@pytest.mark.parametrize("arch", [80, 90])
def test_compiles(weights: str, arch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    signature = {"weights": weights, "quantized": "*u8", "scales": "*fp32", "rows": "i32", "columns": "i32", "stride": "i32"}
    constants = {"BLOCK": BLOCK, "LARGEST": LARGEST}
    source = ASTSource(fn=quantize_kernel, signature=signature | dict.fromkeys(constants, "constexpr"), constexprs=constants)
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": NUM_WARPS})
    assert f".target sm_{arch}" in kernel.asm["ptx"] and kernel.asm["cubin"]


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
