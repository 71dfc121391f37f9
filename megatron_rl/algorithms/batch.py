"""Packed token batches and what a loss returns.

Shape legend: T tokens of a microbatch (all segments end to end), S segments (sequences), G samples of a group, K ids of supports.

Invariants:
- every per-token field is aligned with the token itself: entry t of `advantages`, `old_logprobs`, `loss_mask` and so on belongs to
  `tokens[t]`, the token that was sampled, not to the position that predicted it. The policy does the shift;
- sums and means over a sequence are those of the whole sequence on every CP rank that holds a part of it, and carry no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch


def alone(values: torch.Tensor) -> torch.Tensor:
    """The sum over the ranks that share the segments, where there is one."""
    return values


@dataclass(frozen=True)
class Support:
    """Of tokens that were sampled after a cut (top-p, top-k): the ids that were left, the token's own among them, each once. Their
    log-prob and entropy are those of the softmax over these alone; of tokens without an entry, over the whole vocabulary
    (Keep Sampling Mask, arXiv 2512.02556)."""

    ids_K: torch.Tensor  # int64
    tokens_K: torch.Tensor  # int64, ascending: the token of the batch that an id might have been

    def to(self, device: torch.device) -> Support:
        return Support(self.ids_K.to(device), self.tokens_K.to(device))


@dataclass(frozen=True)
class PackedBatch:
    """Sequences end to end, without padding (THD). A field's entries where `loss_mask` is 0 are ignored by losses."""

    tokens_T: torch.Tensor  # int64
    cu_seqlens: torch.Tensor  # int32, S + 1 entries: 0, len_0, len_0 + len_1, ..., T
    loss_mask_T: torch.Tensor  # float32: 1 on response tokens
    fields: dict[str, torch.Tensor] = field(default_factory=dict)  # name -> (T,), e.g. advantages, engine_logprobs, old_logprobs
    experts_TLK: torch.Tensor | None = None  # int16: the engine's of each token's own position, MoE layers x top-k; -1: unknown
    support: Support | None = None
    over_cp: Callable[[torch.Tensor], torch.Tensor] = alone  # *collective*: the sum over the CP ranks that share the segments

    @property
    def segment_ids_T(self) -> torch.Tensor:  # noqa: N802 (a shape suffix)
        lengths_S = self.cu_seqlens.diff()
        numbers_S = torch.arange(len(lengths_S), device=lengths_S.device)
        return torch.repeat_interleave(numbers_S, lengths_S, output_size=len(self.tokens_T))  # a known size: no wait for the device

    def segment_sums(self, values_T: torch.Tensor) -> torch.Tensor:
        """sums_S, on every CP rank those of the whole segments; (..., T) becomes (..., S). *Collective* over the CP ranks."""
        zeros_S = values_T.new_zeros(*values_T.shape[:-1], len(self.cu_seqlens) - 1)
        return self.over_cp(zeros_S.index_add_(-1, self.segment_ids_T, values_T.detach()))

    def sequence_means(self, values_T: torch.Tensor, among_T: torch.Tensor) -> torch.Tensor:
        """means_T: at each token, the mean over those tokens of its sequence that are `among_T` (bool); 0 where there are none."""
        sums_S, counts_S = self.segment_sums(torch.stack([torch.where(among_T, values_T, 0.0), among_T.to(values_T.dtype)]))
        means_S: torch.Tensor = sums_S / counts_S.clamp(min=1)
        return means_S[self.segment_ids_T]


@dataclass(frozen=True)
class LossOutput:
    loss: torch.Tensor  # scalar with gradient, already divided by the global divisor
    sums: dict[str, torch.Tensor] = field(default_factory=dict)  # detached scalars, added up over microbatches and replicas
    maxima: dict[str, torch.Tensor] = field(default_factory=dict)  # detached scalars, the largest over them
    tables: dict[str, torch.Tensor] = field(default_factory=dict)  # detached, of any shape, added up as `sums` are
