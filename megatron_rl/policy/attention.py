"""Causal attention over packed segments, for machines without Transformer Engine.

Segments are sorted into buckets of similar length and every bucket is one padded call of torch's fused attention: no mask over the
whole microbatch, no call per segment. Padding stands behind its segment, where causality hides it. Under context parallelism keys
and values of all ranks are gathered, and a rank's queries (two chunks of every segment) see them through a mask per bucket.

The rotary embedding is applied here and not by Megatron, whose packed form (rope_utils.py:200) slices every segment in Python, for
queries and keys, in every layer; here the angles of a microbatch are computed once, in `PackedPlan`.

Invariants: the result for a segment is that of plain causal attention over it alone, at any CP; no segment is padded to
more than LENGTH_RATIO of its length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule

from megatron_rl.policy.packed import Segments

LENGTH_RATIO = 2.0  # of the longest to the shortest segment of a bucket


@dataclass(frozen=True)
class Bucket:
    """B segments of up to L positions, of which this rank computes up to Q."""

    segments: int
    queries: int
    keys: int
    mask_BQL: torch.Tensor | None  # None: plain causal


@dataclass
class PackedPlan(PackedSeqParams):
    """What attention needs to know about a microbatch; Megatron hands it through to the core attention."""

    qkv_format: str = "thd"
    buckets: list[Bucket] = field(default_factory=list)
    query_rows: torch.Tensor | None = None  # of every slot of all buckets: the row it is filled from
    key_rows: torch.Tensor | None = None  # the same among the gathered rows
    slots_R: torch.Tensor | None = None  # of every row: its query slot
    cos_R: torch.Tensor | None = None
    sin_R: torch.Tensor | None = None


def make_plan(segments: Segments, rotary_dim: int, rotary_base: float) -> PackedPlan:
    device, cp = segments.positions_R.device, segments.cp
    starts_S = segments.lengths_S.cumsum(0) - segments.lengths_S
    buckets: list[Bucket] = []
    query_rows, key_rows = [], []
    slots_R = torch.empty_like(segments.positions_R)
    offset = 0
    for members in _buckets(segments.lengths_S.tolist()):
        members_B = torch.tensor(members, device=device)
        lengths_B, starts_B = segments.lengths_S[members_B], starts_S[members_B]
        keys, queries = int(lengths_B[0]), int(lengths_B[0]) // cp
        inside_BL = torch.arange(keys, device=device) < lengths_B[:, None]
        key_rows.append(segments.gathered_P[starts_B[:, None] + torch.arange(keys, device=device) * inside_BL].flatten())
        inside_BQ = torch.arange(queries, device=device) < lengths_B[:, None] // cp
        rows_BQ = starts_B[:, None] // cp + torch.arange(queries, device=device) * inside_BQ
        query_rows.append(rows_BQ.flatten())
        slots_R[rows_BQ[inside_BQ]] = offset + inside_BQ.flatten().nonzero().squeeze(1)
        offset += len(members) * queries
        mask_BQL = segments.positions_R[rows_BQ][:, :, None] >= torch.arange(keys, device=device) if cp > 1 else None
        buckets.append(Bucket(len(members), queries, keys, mask_BQL))
    frequencies = rotary_base ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device) / rotary_dim)
    angles_R = segments.positions_R[:, None, None].float() * frequencies  # (R, 1, rotary_dim / 2)
    return PackedPlan(
        buckets=buckets,
        query_rows=torch.cat(query_rows),
        key_rows=torch.cat(key_rows),
        slots_R=slots_R,
        cos_R=angles_R.cos(),
        sin_R=angles_R.sin(),
    )


def for_transformer_engine(segments: Segments) -> PackedSeqParams:
    """Transformer Engine splits padded segments over CP ranks by itself, in the same zig-zag."""
    cu_seqlens = torch.nn.functional.pad(segments.lengths_S.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(segments.lengths_S.max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


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


class PackedAttention(MegatronModule):
    """Takes the place of Megatron's DotProductAttention, which knows neither packed sequences nor context parallelism."""

    def __init__(self, config: Any, softmax_scale: float | None = None, pg_collection: Any = None, **_: Any) -> None:
        super().__init__(config=config)
        self.scale, self.cp_group = softmax_scale, pg_collection.cp

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, packed_seq_params: PackedPlan, **__: Any
    ) -> torch.Tensor:
        query, key = rotate(query, packed_seq_params), rotate(key, packed_seq_params)
        if self.cp_group.size() > 1:
            from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

            # torch.distributed.nn's all_gather gives wrong gradients on gloo
            key, value = (gather_from_sequence_parallel_region(x.contiguous(), group=self.cp_group) for x in (key, value))
        return attend(query, key, value, packed_seq_params, self.scale)


def rotate(x_RHD: torch.Tensor, plan: PackedPlan) -> torch.Tensor:
    """Rotary embedding of the first dimensions, by halves (not interleaved)."""
    assert plan.cos_R is not None and plan.sin_R is not None
    half = plan.cos_R.size(-1)
    cos, sin = plan.cos_R.to(x_RHD.dtype), plan.sin_R.to(x_RHD.dtype)
    first, second, rest = x_RHD[..., :half], x_RHD[..., half : 2 * half], x_RHD[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def attend(
    query_RHD: torch.Tensor, key_RGD: torch.Tensor, value_RGD: torch.Tensor, plan: PackedPlan, scale: float | None
) -> torch.Tensor:
    """(R, H * D), for queries of this rank and keys and values of all CP ranks, one after the other."""
    assert plan.query_rows is not None and plan.key_rows is not None and plan.slots_R is not None
    queries = query_RHD.index_select(0, plan.query_rows).split([b.segments * b.queries for b in plan.buckets])
    keys, values = (
        x.index_select(0, plan.key_rows).split([b.segments * b.keys for b in plan.buckets]) for x in (key_RGD, value_RGD)
    )
    outputs = []
    for bucket, q, k, v in zip(plan.buckets, queries, keys, values, strict=True):
        q_BHQD, k_BGLD, v_BGLD = (x.unflatten(0, (bucket.segments, -1)).transpose(1, 2) for x in (q, k, v))
        output_BHQD = torch.nn.functional.scaled_dot_product_attention(
            q_BHQD,
            k_BGLD,
            v_BGLD,
            attn_mask=None if bucket.mask_BQL is None else bucket.mask_BQL[:, None],
            is_causal=bucket.mask_BQL is None,
            scale=scale,
            enable_gqa=k_BGLD.size(1) != q_BHQD.size(1),
        )
        outputs.append(output_BHQD.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, plan.slots_R).flatten(1)
