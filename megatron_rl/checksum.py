"""A checksum of a tensor that can be taken piece by piece, wherever the pieces lie and however they are cut.

    checksum(tensor) = sum over positions p of  bits[p] * mix(p)   mod 2^64

p is an element's row-major position in the full tensor, mix a scrambling of p whose values are odd (splitmix64's finalizer,
https://prng.di.unimi.it/splitmix64.c), bits the element's bit pattern as an integer.

Invariants: the sum over any disjoint pieces that make up a tensor is the tensor's checksum; a changed bit always shows, two swapped
elements show with all but one chance in 2^32 or so; memory beyond the piece is bounded by `CHUNK` elements; CPU and CUDA agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

CHUNK = 2**20  # elements at a time
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MIX = ((30, -4658895280553007687), (27, -7723592293110705685))  # splitmix64's shifts and factors, as signed integers


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


@torch.no_grad()
def checksum(piece: torch.Tensor, offset: int = 0, strides: Sequence[int] | None = None) -> torch.Tensor:
    """An int64 scalar on the piece's device (sums of them wrap as they should). Element (i, j, ...) of the piece lies at position
    `offset + i * strides[0] + j * strides[1] + ...` of the full tensor; without strides the piece is the full tensor."""
    strides = contiguous_strides(piece.shape) if strides is None else strides
    if piece.numel() > CHUNK:
        axis = max(range(piece.dim()), key=lambda axis: piece.shape[axis])
        length = max(1, piece.shape[axis] * CHUNK // piece.numel())
        starts = range(0, piece.shape[axis], length)
        parts = [
            checksum(piece.narrow(axis, start, min(length, piece.shape[axis] - start)), offset + start * strides[axis], strides)
            for start in starts
        ]
        return torch.stack(parts).sum()
    positions = torch.full((), offset, dtype=torch.int64, device=piece.device)
    for size, stride in zip(piece.shape, strides, strict=True):
        positions = positions[..., None] + torch.arange(size, dtype=torch.int64, device=piece.device) * stride
    bits = piece.contiguous().view(_BITS[piece.element_size()]).to(torch.int64)
    return (bits * _mix(positions)).sum()


def _mix(z: torch.Tensor) -> torch.Tensor:
    for shift, factor in _MIX:
        z = (z ^ ((z >> shift) & (2 ** (64 - shift) - 1))) * factor  # the mask makes torch's arithmetic shift a logical one
    return (z ^ ((z >> 31) & (2**33 - 1))) | 1
