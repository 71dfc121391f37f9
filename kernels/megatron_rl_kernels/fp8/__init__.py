"""A matrix in FP8: float8_e4m3fn with one fp32 scale per block of 128 x 128, as DeepSeek-V3's checkpoints have it.

    weights ~ quantized * scale_inv[block],   scale_inv = (largest magnitude in the block) / 448

The kernel reads the matrix once and writes both; plain torch makes several fp32 copies of it on the way.

Invariants: both forms give the same bits; blocks at the right and lower edge may be smaller; a block of zeros has scale 1; a NaN or
an infinity in a block makes all of it NaN, so that no engine serves it unnoticed.
"""

from __future__ import annotations

import torch

from megatron_rl_kernels.fp8.reference import BLOCK, dequantize
from megatron_rl_kernels.fp8.reference import quantize as _reference


def quantize(weights_RC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(quantized_RC, scale_inv_rc): float8_e4m3fn, and fp32 of ceil(R / 128) x ceil(C / 128)."""
    if weights_RC.dim() != 2 or not weights_RC.is_floating_point():
        raise ValueError(f"{weights_RC.dtype} of shape {tuple(weights_RC.shape)} is no floating-point matrix")
    if weights_RC.is_cuda:
        from megatron_rl_kernels.fp8.triton import quantize as on_cuda  # triton is only needed where it can run

        return on_cuda(weights_RC)
    return _reference(weights_RC)


__all__ = ["BLOCK", "dequantize", "quantize"]
