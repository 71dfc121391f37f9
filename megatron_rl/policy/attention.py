"""Causal attention over packed segments, for machines without Transformer Engine.

Segments are sorted into buckets of similar length and every bucket is one padded call of torch's fused attention: no mask over the
whole microbatch, no call per segment. Padding stands behind its segment, where causality hides it. Under context parallelism keys
and values of all ranks are gathered, and a rank's queries (two chunks of every segment) see them through a mask per bucket.

The rotary embedding is applied here, on the way into the buckets, and not by Megatron, whose packed form (rope_utils.py:200) slices
every segment in Python, for queries and keys, in every layer; here the angles of a microbatch are computed once. Latent attention
is the exception: Megatron turns the few dimensions that it turns before it puts keys together.

Invariants: the result for a segment is that of plain causal attention over it alone, at any CP, and so are the gradients; no
segment is padded to more than LENGTH_RATIO of its length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from torch.autograd.function import once_differentiable

from megatron_rl.policy.packed import Segments

LENGTH_RATIO = 1.25  # of the longest to the shortest segment of a bucket


@dataclass(frozen=True)
class Bucket:
    """B segments of up to L positions, of which this rank computes up to Q."""

    segments: int
    queries: int
    keys: int
    mask_BQL: torch.Tensor | None  # None: plain causal


@dataclass(frozen=True)
class Slots:
    """The places of all buckets, one after the other, and the R rows that go there."""

    rows: torch.Tensor  # of every slot: the row it is filled from; padding takes row 0
    padding: torch.Tensor  # the slots that belong to no row
    slots_R: torch.Tensor  # of every row: its slot
    angles: torch.Tensor  # of every slot: cosines and sines, (2, slots, 1, rotary_dim)
    angles_R: torch.Tensor  # of every row


@dataclass
class PackedPlan(PackedSeqParams):
    """What attention needs to know about a microbatch; Megatron hands it through to the core attention."""

    qkv_format: str = "thd"
    buckets: Sequence[Bucket] = ()
    queries: Slots | None = None  # rows are this rank's
    keys: Slots | None = None  # rows are those of all CP ranks, one after the other


def make_plan(segments: Segments, rotary_dim: int, rotary_base: float) -> PackedPlan:
    device, cp = segments.positions_R.device, segments.cp
    starts_S = segments.lengths_S.cumsum(0) - segments.lengths_S
    own_R = torch.arange(len(segments.positions_R), device=device)
    buckets, query_rows, key_rows = [], [], []
    for members in _buckets(segments.lengths_S.tolist()):
        members_B = torch.tensor(members, device=device)
        starts_B, lengths_B = starts_S[members_B], segments.lengths_S[members_B]
        rows_BQ = _padded(own_R, starts_B // cp, lengths_B // cp)
        rows_BL = _padded(segments.gathered_P, starts_B, lengths_B)
        mask_BQL = None
        if cp > 1:
            mask_BQL = segments.positions_R[rows_BQ.clamp(min=0)][:, :, None] >= torch.arange(rows_BL.size(1), device=device)
        buckets.append(Bucket(len(members), rows_BQ.size(1), rows_BL.size(1), mask_BQL))
        query_rows.append(rows_BQ.flatten())
        key_rows.append(rows_BL.flatten())
    frequencies = rotary_base ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device) / rotary_dim)
    queries = _slots(torch.cat(query_rows), segments.positions_R, frequencies)
    keys = queries if cp == 1 else _slots(torch.cat(key_rows), segments.gathered_positions(), frequencies)
    return PackedPlan(buckets=buckets, queries=queries, keys=keys, **_cumulative(segments))


def for_transformer_engine(segments: Segments) -> PackedSeqParams:
    """Transformer Engine splits padded segments over CP ranks by itself, in the same zig-zag."""
    return PackedSeqParams(qkv_format="thd", **_cumulative(segments))


def _cumulative(segments: Segments) -> dict[str, Any]:
    cu_seqlens = torch.nn.functional.pad(segments.lengths_S.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(segments.lengths_S.max())
    return {"cu_seqlens_q": cu_seqlens, "cu_seqlens_kv": cu_seqlens, "max_seqlen_q": longest, "max_seqlen_kv": longest}


def _buckets(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of segments, longest first."""
    buckets: list[list[int]] = []
    shortest = float("inf")
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[index] < shortest:
            buckets.append([])
            shortest = lengths[index] / LENGTH_RATIO
        buckets[-1].append(index)
    return buckets


def _padded(rows: torch.Tensor, starts_B: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
    """The rows of segments that begin at `starts_B` of `rows`, longest first, a line each; -1 where a segment has ended."""
    at_L = torch.arange(int(lengths_B[0]), device=rows.device)
    inside_BL = at_L < lengths_B[:, None]
    return torch.where(inside_BL, rows[torch.where(inside_BL, starts_B[:, None] + at_L, 0)], -1)


def _slots(rows: torch.Tensor, positions_R: torch.Tensor, frequencies: torch.Tensor) -> Slots:
    filled = (rows >= 0).nonzero().squeeze(1)
    slots_R = torch.empty_like(positions_R)
    slots_R[rows[filled]] = filled
    angles_R = positions_R[:, None, None] * frequencies
    sines_R = angles_R.sin()
    turns_R = torch.stack([angles_R.cos().repeat(1, 1, 2), torch.cat([-sines_R, sines_R], -1)])
    padding = (rows < 0).nonzero().squeeze(1)
    rows = rows.clamp(min=0)
    return Slots(rows, padding, slots_R, turns_R[:, rows], turns_R)


class PackedAttention(MegatronModule):
    """Takes the place of Megatron's DotProductAttention, which knows neither packed sequences nor context parallelism."""

    def __init__(self, config: Any, softmax_scale: float | None = None, pg_collection: Any = None, **_: Any) -> None:
        super().__init__(config=config)
        self.scale, self.cp_group = softmax_scale, pg_collection.cp
        self.rotary = not config.multi_latent_attention

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, packed_seq_params: PackedPlan, **__: Any
    ) -> torch.Tensor:
        if self.cp_group.size() > 1:
            from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

            # torch.distributed.nn's all_gather gives wrong gradients on gloo
            key, value = (gather_from_sequence_parallel_region(x.contiguous(), group=self.cp_group) for x in (key, value))
        return attend(query, key, value, packed_seq_params, self.scale, self.rotary)


def attend(
    query_RHD: torch.Tensor,
    key_PGD: torch.Tensor,
    value_PGE: torch.Tensor,
    plan: PackedPlan,
    scale: float | None,
    rotary: bool = True,
) -> torch.Tensor:
    """(R, H * E), for queries of this rank and keys and values of all CP ranks, one after the other; `rotary`: to be turned."""
    assert plan.queries and plan.keys
    placed = (
        _IntoSlots.apply(query_RHD, plan.queries, rotary).split([b.segments * b.queries for b in plan.buckets]),
        _IntoSlots.apply(key_PGD, plan.keys, rotary).split([b.segments * b.keys for b in plan.buckets]),
        _IntoSlots.apply(value_PGE, plan.keys, False).split([b.segments * b.keys for b in plan.buckets]),
    )
    outputs = []
    for bucket, *qkv in zip(plan.buckets, *placed, strict=True):
        q_BHQD, k_BGLD, v_BGLE = (x.unflatten(0, (bucket.segments, -1)).transpose(1, 2) for x in qkv)
        output_BHQE = torch.nn.functional.scaled_dot_product_attention(
            q_BHQD,
            k_BGLD,
            v_BGLE,
            attn_mask=None if bucket.mask_BQL is None else bucket.mask_BQL[:, None],
            is_causal=bucket.mask_BQL is None,
            scale=scale,
            enable_gqa=k_BGLD.size(1) != q_BHQD.size(1),
        )
        outputs.append(output_BHQE.transpose(1, 2).flatten(0, 1))
    return _OutOfSlots.apply(torch.cat(outputs), plan.queries).flatten(1)


class _IntoSlots(torch.autograd.Function):
    """Padding has no gradient (what is computed for it is never read), so a row's gradient is that of its slot."""

    @staticmethod
    def forward(ctx: Any, x_RHD: torch.Tensor, slots: Slots, rotary: bool) -> torch.Tensor:
        ctx.slots, ctx.rotary = slots, rotary
        placed = x_RHD.index_select(0, slots.rows)
        return _rotate_(placed, slots.angles) if rotary else placed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        grad_RHD = grad.index_select(0, ctx.slots.slots_R)
        return (_rotate_(grad_RHD, ctx.slots.angles_R, back=True) if ctx.rotary else grad_RHD), None, None


class _OutOfSlots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, placed: torch.Tensor, slots: Slots) -> torch.Tensor:
        ctx.slots = slots
        return placed.index_select(0, slots.slots_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RHD: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad_RHD.index_select(0, ctx.slots.rows).index_fill_(0, ctx.slots.padding, 0.0), None


def _rotate_(x_NHD: torch.Tensor, angles_2N1R: torch.Tensor, back: bool = False) -> torch.Tensor:
    """In place, in the first R dimensions, by halves: dimension i turns with i + R/2 (Megatron's rotary_interleaved=False)."""
    cos, sin = angles_2N1R.to(x_NHD.dtype)
    turning = x_NHD[..., : cos.size(-1)]
    partners = turning.roll(cos.size(-1) // 2, -1)
    turning.mul_(cos).addcmul_(partners, sin, value=-1 if back else 1)
    return x_NHD
