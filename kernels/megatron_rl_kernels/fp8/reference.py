"""The truth in plain torch. Both divisions are IEEE's, so that another implementation can be compared bit for bit."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

BLOCK = 128
LARGEST = 448.0  # of float8_e4m3fn


def quantize(weights_RC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = weights_RC.shape
    padded = pad(weights_RC.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks_rBcB = padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    largest_r1c1 = blocks_rBcB.abs().amax((1, 3), keepdim=True)
    scale_r1c1 = torch.where(largest_r1c1 == 0, 1.0, largest_r1c1 / LARGEST)
    # An infinity over its infinite scale is NaN, but all that is finite beside it would be 0.
    scale_r1c1 = scale_r1c1.masked_fill(scale_r1c1.isinf(), float("nan"))
    # The largest may come out a rounding above 448, which the type does not have.
    quantized_rBcB = (blocks_rBcB / scale_r1c1).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    quantized_RC = quantized_rBcB.view(padded.shape)[:rows, :columns].contiguous()
    return quantized_RC, scale_r1c1[:, 0, :, 0].contiguous()


def dequantize(quantized_RC: torch.Tensor, scale_inv_rc: torch.Tensor) -> torch.Tensor:
    """In fp32."""
    rows, columns = quantized_RC.shape
    scale_RC = scale_inv_rc.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return quantized_RC.float() * scale_RC
