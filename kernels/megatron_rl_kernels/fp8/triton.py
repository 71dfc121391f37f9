"""One program a block of 128 x 128: its largest magnitude, its scale, its bytes.

The bytes are put together from the bits of the quotient, rounded to nearest even: devices before compute capability 8.9 have no
instruction for the conversion, and Triton's interpreter loses the carry from the mantissa into the exponent. The pass is bound by
memory either way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megatron_rl_kernels.fp8.reference import BLOCK, LARGEST

NUM_WARPS = 8


@triton.jit
def quantize_kernel(
    weights, quantized, scales,
    rows, columns, stride, BLOCK: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    x = tl.load(weights + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    magnitude = tl.abs(x)
    largest = tl.max(tl.max(magnitude, axis=1), axis=0)
    broken = tl.max(tl.max((~(magnitude < float("inf"))).to(tl.int32), axis=1), axis=0)  # maxima drop NaN
    scale = tl.where(largest == 0.0, 1.0, tl.div_rn(largest, LARGEST))
    scale = tl.where(broken > 0, float("nan"), scale)
    q = tl.minimum(tl.div_rn(magnitude, tl.zeros_like(x) + scale), LARGEST)
    bits = q.to(tl.int32, bitcast=True)
    bits += 0x7FFFF + ((bits >> 20) & 1)  # of 23 bits of mantissa 3 stay
    normal = (bits >> 20) - ((127 - 7) << 3)  # exponent and mantissa, with e4m3's bias
    subnormal = ((q * 512.0 + 8388608.0) - 8388608.0).to(tl.int32)  # multiples of 2**-9; fp32 has no fractions from 2**23 on
    negative = (x.to(tl.int32, bitcast=True) >> 31) & 0x80
    byte = tl.where(broken > 0, 0x7F, tl.where(q < 0.015625, subnormal, normal) | negative)
    tl.store(quantized + row[:, None] * columns + column[None, :], byte.to(tl.uint8), mask=inside)
    tl.store(scales + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), scale)


def quantize(weights_RC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if weights_RC.stride(1) != 1:
        weights_RC = weights_RC.contiguous()
    rows, columns = weights_RC.shape
    grid = (triton.cdiv(rows, BLOCK), triton.cdiv(columns, BLOCK))
    quantized_RC = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=weights_RC.device)
    scale_rc = torch.empty(grid, dtype=torch.float32, device=weights_RC.device)
    if weights_RC.numel():
        quantize_kernel[grid](
            weights_RC, quantized_RC.view(torch.uint8), scale_rc,
            rows, columns, weights_RC.stride(0), BLOCK=BLOCK, LARGEST=LARGEST, num_warps=NUM_WARPS,
        )  # fmt: skip
    return quantized_RC, scale_rc
