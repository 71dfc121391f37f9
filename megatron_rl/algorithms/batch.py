"""Packed token batches and what a loss returns.

Shape legend: T tokens of a microbatch (all segments end to end), S segments (sequences), G samples of a group.

Invariant: every per-token field is aligned with the token itself: entry t of `advantages`, `old_logprobs`, `loss_mask` and so on
belongs to `tokens[t]`, the token that was sampled, not to the position that predicted it. The policy does the shift.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class PackedBatch:
    """Sequences end to end, without padding (THD). A field's entries where `loss_mask` is 0 are ignored by losses."""

    tokens_T: torch.Tensor  # int64
    cu_seqlens: torch.Tensor  # int32, S + 1 entries: 0, len_0, len_0 + len_1, ..., T
    loss_mask_T: torch.Tensor  # float32: 1 on response tokens
    fields: dict[str, torch.Tensor] = field(default_factory=dict)  # name -> (T,), e.g. advantages, engine_logprobs, old_logprobs

    @property
    def segment_ids_T(self) -> torch.Tensor:  # noqa: N802 (a shape suffix)
        lengths = self.cu_seqlens.diff()
        return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)


@dataclass(frozen=True)
class LossOutput:
    loss: torch.Tensor  # scalar with gradient, already divided by the global divisor
    sums: dict[str, torch.Tensor] = field(default_factory=dict)  # detached scalars, added up over microbatches and replicas
    maxima: dict[str, torch.Tensor] = field(default_factory=dict)  # detached scalars, the largest over them
