"""The checksum is additive over pieces, sees every position, and agrees with plain Python integers."""

from __future__ import annotations

import pytest
import torch

from megatron_rl import checksum as module
from megatron_rl.checksum import checksum, contiguous_strides


def in_python(tensor: torch.Tensor) -> int:
    bits = {4: torch.int32, 2: torch.int16}[tensor.element_size()]
    total = 0
    for position, value in enumerate(tensor.contiguous().view(bits).flatten().tolist()):
        z = position
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        total += value * ((z ^ (z >> 31)) | 1)
    return (total + 2**63) % 2**64 - 2**63


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_what_the_docstring_says(dtype: torch.dtype) -> None:
    tensor = random(7, 5, 3, dtype=dtype)
    assert checksum(tensor).item() == in_python(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float64])
@pytest.mark.parametrize("axis", [0, 1])
def test_pieces_add_up(dtype: torch.dtype, axis: int) -> None:
    tensor = random(12, 8, dtype=dtype)
    strides = contiguous_strides(tensor.shape)
    pieces, at = [], 0
    for piece in tensor.split([1, 3, tensor.shape[axis] - 4], dim=axis):
        pieces.append(checksum(piece, at * strides[axis], strides))
        at += piece.shape[axis]
    assert torch.stack(pieces).sum() == checksum(tensor)


def test_a_transposed_view_keeps_its_positions() -> None:
    tensor = random(6, 4)
    assert checksum(tensor.t(), 0, (1, 4)) == checksum(tensor)
    assert checksum(tensor.t()) != checksum(tensor)


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = random(5, 40, 3)
    whole = checksum(tensor)
    monkeypatch.setattr(module, "CHUNK", 7)
    assert checksum(tensor) == whole


def test_every_bit_and_every_swap_shows() -> None:
    tensor = random(64)
    seen = {checksum(tensor).item()}
    for position in range(64):
        for bit in (0, 22, 31):
            changed = tensor.clone()
            changed.view(torch.int32)[position] ^= -(2**31) if bit == 31 else 2**bit
            seen.add(checksum(changed).item())
        for other in range(position):
            order = torch.arange(64)
            order[position], order[other] = other, position
            seen.add(checksum(tensor[order]).item())
    assert len(seen) == 1 + 64 * 3 + 64 * 63 // 2


def test_scalars_and_nothing() -> None:
    assert checksum(torch.tensor(1.5)) == checksum(torch.tensor([1.5]))
    assert checksum(torch.empty(0, 3)) == 0
