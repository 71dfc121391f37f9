"""Attention over packed segments against one plain causal attention per segment, at CP 1 to 3, ranks simulated one by one."""

from __future__ import annotations

import pytest
import torch

from megatron_rl.algorithms.batch import PackedBatch
from megatron_rl.policy import attention
from megatron_rl.policy.packed import Segments, rank_inputs

HEADS, GROUPS, DIM, ROTARY, BASE = 4, 2, 16, 8, 100.0
LENGTHS = [[5], [1, 1], [9, 2, 30, 17, 1, 16, 33]]


def segments_of(lengths: list[int], cp: int) -> list[Segments]:
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    batch = PackedBatch(torch.ones(sum(lengths), dtype=torch.long), ends, torch.ones(sum(lengths)))
    return [rank_inputs(batch, tp=1, cp=cp, cp_rank=rank).segments for rank in range(cp)]


def rotated(x_LHD: torch.Tensor) -> torch.Tensor:
    """By complex numbers."""
    half = ROTARY // 2
    angles_L1F = torch.arange(len(x_LHD))[:, None, None] * BASE ** (-torch.arange(half) / half)
    turned = torch.complex(x_LHD[..., :half], x_LHD[..., half:ROTARY]) * torch.polar(torch.ones_like(angles_L1F), angles_L1F)
    return torch.cat([turned.real, turned.imag, x_LHD[..., ROTARY:]], -1)


def plain(q_LHD: torch.Tensor, k_LGD: torch.Tensor, v_LGD: torch.Tensor) -> torch.Tensor:
    repeat = HEADS // GROUPS
    k_LHD, v_LHD = rotated(k_LGD).repeat_interleave(repeat, 1), v_LGD.repeat_interleave(repeat, 1)
    scores_HLL = torch.einsum("ihd,jhd->hij", rotated(q_LHD), k_LHD) / DIM**0.5
    length = len(q_LHD)
    scores_HLL = scores_HLL.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), float("-inf"))
    return torch.einsum("hij,jhd->ihd", scores_HLL.softmax(-1), v_LHD).flatten(1)


@pytest.mark.parametrize("cp", [1, 2, 3])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_segments_attend_as_if_alone(lengths: list[int], cp: int) -> None:
    ranks = segments_of(lengths, cp)
    gathered_P = ranks[0].gathered_P  # from segment order to the order of the CP ranks' rows
    padded = ranks[0].lengths_S.tolist()
    torch.manual_seed(0)
    whole = [torch.randn(sum(padded), heads, DIM) for heads in (HEADS, GROUPS, GROUPS)]
    ours = [torch.empty_like(x).index_copy_(0, gathered_P, x).requires_grad_() for x in whole]
    theirs = [x.clone().requires_grad_() for x in whole]
    grad = torch.randn(sum(padded), HEADS * DIM)

    rows = len(gathered_P) // cp
    outputs = []
    for rank, segments in enumerate(ranks):
        plan = attention.make_plan(segments, ROTARY, BASE)
        query = ours[0][rank * rows : (rank + 1) * rows]
        outputs.append(attention.attend(query, ours[1], ours[2], plan, None))
    output_P = torch.cat(outputs)[gathered_P]
    expected_P = torch.cat([plain(*qkv) for qkv in zip(*(x.split(padded) for x in theirs), strict=True)])
    assert torch.allclose(output_P, expected_P, atol=2e-6)
    output_P.backward(grad)
    expected_P.backward(grad)
    for mine, theirs_ in zip(ours, theirs, strict=True):
        assert mine.grad is not None and theirs_.grad is not None
        assert torch.allclose(mine.grad[gathered_P], theirs_.grad, atol=5e-6)


def test_no_segment_is_padded_beyond_the_ratio() -> None:
    lengths = torch.randint(1, 500, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    (segments,) = segments_of(lengths, 1)
    plan = attention.make_plan(segments, ROTARY, BASE)
    assert sum(bucket.segments for bucket in plan.buckets) == 200
    slots = sum(bucket.segments * bucket.keys for bucket in plan.buckets)
    assert slots <= attention.LENGTH_RATIO * sum(lengths)
    assert len(plan.buckets) <= 28  # log(500) / log(1.25)


def test_every_row_has_one_slot() -> None:
    (segments,) = segments_of([9, 2, 30, 17], 1)
    queries = attention.make_plan(segments, ROTARY, BASE).queries
    assert queries
    assert queries.rows[queries.slots_R].tolist() == list(range(58))
    assert len(queries.padding) + 58 == len(queries.rows)
