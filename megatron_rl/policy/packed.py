"""A PackedBatch as this rank of a replica computes on it, and the way back.

A replica's TP ranks see the same rows; its CP ranks share every segment in Megatron's zig-zag: a segment is padded to 2*cp equal
chunks, and CP rank r computes chunks r and 2*cp-1-r, so that causal attention costs every rank the same. Under sequence
parallelism a rank's rows are padded to a multiple of tp, with a segment of padding.

Row r of a rank's R rows holds one token and predicts its successor; per-token values of a batch belong to the token itself. So a
token's log-prob comes from the row before its own: `rows_N` leads from this rank's N tokens to the rows that predict them. The
first token of a segment is predicted by none.

Invariants: every token of the batch belongs to exactly one CP rank; without CP a rank's tokens are the batch, in order;
`tokens_of_rows` puts what row r says about its successor where that token is, and 0 at first tokens; a support lies at the row that
predicts its token, and is on one CP rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from megatron_rl.algorithms.batch import PackedBatch, Support, alone


@dataclass(frozen=True)
class Segments:
    """The segments of a microbatch as one CP rank sees them, padding included; S segments, P positions over all CP ranks, R rows.

    Rows lie segment by segment, in each by position.
    """

    lengths_S: torch.Tensor  # padded, over all CP ranks
    positions_R: torch.Tensor
    gathered_P: torch.Tensor  # of every position, segment by segment: its row among those of all CP ranks, rank after rank
    positions_P: torch.Tensor
    cp: int

    def gathered_positions(self) -> torch.Tensor:
        """Of the rows of all CP ranks, rank after rank."""
        return torch.empty_like(self.positions_P).index_copy_(0, self.gathered_P, self.positions_P)


@dataclass(frozen=True)
class RowSupport:
    """`batch.Support` of the tokens that this rank's rows predict."""

    ids_K: torch.Tensor
    rows_K: torch.Tensor


@dataclass(frozen=True)
class RankInputs:
    input_ids_R: torch.Tensor
    successors_R: torch.Tensor  # the token that a row predicts; 0 where there is none
    segments: Segments
    tokens_N: torch.Tensor  # this rank's tokens, as indices into the batch
    rows_N: torch.Tensor
    first_N: torch.Tensor  # bool: no row predicts it
    batch: PackedBatch  # this rank's tokens
    held_R: torch.Tensor  # the token that a row holds, as an index into the batch; -1: padding
    support: RowSupport | None

    def tokens_of_rows(self, values_R: torch.Tensor) -> torch.Tensor:
        return values_R[self.rows_N].masked_fill(self.first_N, 0.0)

    def experts_of_rows(self, experts_TLK: torch.Tensor, share: int, shares: int) -> torch.Tensor:
        """experts_LRK of the rows of one of the `shares` that sequence parallelism makes of R; -1 for padding."""
        held_R = self.held_R.view(shares, -1)[share]
        return experts_TLK[held_R].masked_fill((held_R < 0)[:, None, None], -1).movedim(0, 1).contiguous()


def rank_inputs(
    batch: PackedBatch, *, tp: int, cp: int, cp_rank: int, over_cp: Callable[[torch.Tensor], torch.Tensor] = alone
) -> RankInputs:
    """`over_cp` sums a tensor over the CP ranks: of the rank's own batch, whose segments they share."""
    device = batch.tokens_T.device
    starts_S, lengths_S = batch.cu_seqlens[:-1].long(), batch.cu_seqlens.diff().long()
    padded_S = lengths_S if cp == 1 else (lengths_S + 2 * cp - 1) // (2 * cp) * (2 * cp)
    if fill := _fill(int(padded_S.sum()) // cp, tp, cp):
        nothing = torch.zeros(1, dtype=torch.long, device=device)
        starts_S, lengths_S, padded_S = (
            torch.cat([values, extra]) for values, extra in ((starts_S, nothing), (lengths_S, nothing), (padded_S, nothing + fill))
        )
    segment_P = torch.repeat_interleave(torch.arange(len(padded_S), device=device), padded_S)
    positions_P = torch.arange(len(segment_P), device=device) - (padded_S.cumsum(0) - padded_S)[segment_P]
    owner_P, row_P = _zig_zag(positions_P, segment_P, padded_S, cp)

    mine_R = (owner_P == cp_rank).nonzero().squeeze(1)
    positions_R, segment_R = positions_P[mine_R], segment_P[mine_R]
    left_R = lengths_S[segment_R] - positions_R  # tokens from here to the end of the segment; <= 0: padding
    source_R = starts_S[segment_R] + positions_R
    input_ids_R = torch.where(left_R > 0, batch.tokens_T[source_R.clamp(max=len(batch.tokens_T) - 1)], 0)
    successors_R = torch.where(left_R > 1, batch.tokens_T[(source_R + 1).clamp(max=len(batch.tokens_T) - 1)], 0)

    rows_T = torch.full_like(batch.tokens_T, -1)
    predicting = (left_R > 1).nonzero().squeeze(1)
    rows_T[source_R[predicting] + 1] = predicting
    first_T = torch.zeros_like(rows_T, dtype=torch.bool).index_fill_(0, batch.cu_seqlens[:-1].long(), True)
    tokens_N = ((rows_T >= 0) | (first_T if cp_rank == 0 else False)).nonzero().squeeze(1)
    return RankInputs(
        input_ids_R=input_ids_R,
        successors_R=successors_R,
        segments=Segments(padded_S, positions_R, owner_P * len(mine_R) + row_P, positions_P, cp),
        tokens_N=tokens_N,
        rows_N=rows_T[tokens_N].clamp(min=0),
        first_N=first_T[tokens_N],
        batch=batch if cp == 1 else replace(_select(batch, tokens_N), over_cp=over_cp),
        held_R=torch.where(left_R > 0, source_R, -1),
        support=None if batch.support is None else _support_of_rows(batch.support, rows_T),
    )


def _support_of_rows(support: Support, rows_T: torch.Tensor) -> RowSupport:
    rows_K = rows_T[support.tokens_K]
    here_K = rows_K >= 0
    return RowSupport(support.ids_K[here_K], rows_K[here_K])


def _fill(rows: int, tp: int, cp: int) -> int:
    """Positions of the padding segment that makes a rank's rows a multiple of tp."""
    extra = -rows % tp
    if cp > 1 and extra % 2:  # a segment gives every CP rank two chunks
        extra += tp
    return extra * cp


def _zig_zag(
    positions_P: torch.Tensor, segment_P: torch.Tensor, padded_S: torch.Tensor, cp: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The CP rank that computes each position, and its row there."""
    if cp == 1:
        return torch.zeros_like(positions_P), torch.arange(len(positions_P), device=positions_P.device)
    local_S = padded_S // cp
    first_row_P = (local_S.cumsum(0) - local_S)[segment_P]
    chunk_P = (padded_S // (2 * cp))[segment_P]
    number_P = positions_P // chunk_P
    second_half_P = (number_P >= cp).long()
    owner_P = torch.minimum(number_P, 2 * cp - 1 - number_P)
    return owner_P, first_row_P + second_half_P * chunk_P + positions_P % chunk_P


def _select(batch: PackedBatch, tokens_N: torch.Tensor) -> PackedBatch:
    counts_S = torch.bincount(batch.segment_ids_T[tokens_N], minlength=len(batch.cu_seqlens) - 1)
    return PackedBatch(
        tokens_T=batch.tokens_T[tokens_N],
        cu_seqlens=torch.cat([counts_S.new_zeros(1), counts_S.cumsum(0)]).to(torch.int32),
        loss_mask_T=batch.loss_mask_T[tokens_N],
        fields={name: values_T[tokens_N] for name, values_T in batch.fields.items()},
    )
