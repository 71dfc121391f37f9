"""Log-probability of one token per row, and the entropy of the row, from logits whose vocabulary is split over TP ranks; of rows
with a support, under the softmax over the ids of it alone.

Invariants: value and gradient are those of the unsplit vocabulary without padding, for log-probs and for entropies; both come from
one pass forward and one backward; every TP rank gets the same values; supports take memory by their ids, not by the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron_rl_kernels.logprob import token_logprobs
from torch.autograd.function import once_differentiable

from megatron_rl.policy.packed import RowSupport

NO_TOKEN = -1e30  # a logit of padding: no probability, and finite, so that 0 times it is 0


def row_logprobs(
    logits_RV: torch.Tensor,
    tokens_R: torch.Tensor,
    temperature: float,
    tp_group: dist.ProcessGroup,
    vocab_size: int,
    support: RowSupport | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logprobs_R, entropy_R), fp32, under softmax(logits / temperature); V is this rank's part of the vocabulary, of which the
    ranks' last columns may be padding."""
    if support is None:
        return _whole(logits_RV, tokens_R, temperature, tp_group, vocab_size)
    local_K = support.ids_K - tp_group.rank() * logits_RV.size(1)
    elsewhere_K = (local_K < 0) | (local_K >= logits_RV.size(1))
    logits_RV, logits_K = _Tap.apply(logits_RV, support.rows_K, local_K.masked_fill(elsewhere_K, 0))
    whole = _whole(logits_RV, tokens_R, temperature, tp_group, vocab_size)
    cut = _cut(logits_K, elsewhere_K, support, tokens_R, temperature, tp_group)
    is_cut_R = torch.zeros_like(tokens_R, dtype=torch.bool).index_fill(0, support.rows_K, True)
    return torch.where(is_cut_R, cut[0], whole[0]), torch.where(is_cut_R, cut[1], whole[1])


def _whole(
    logits_RV: torch.Tensor, tokens_R: torch.Tensor, temperature: float, tp_group: dist.ProcessGroup, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    if tp_group.size() == 1:
        return token_logprobs(logits_RV, tokens_R, temperature)
    return _VocabParallel.apply(logits_RV, tokens_R, temperature, tp_group, vocab_size)


def _cut(
    logits_K: torch.Tensor,
    elsewhere_K: torch.Tensor,
    support: RowSupport,
    tokens_R: torch.Tensor,
    temperature: float,
    tp_group: dist.ProcessGroup,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the rows with a support; of others, no number."""
    from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region

    x_K = logits_K.to(torch.promote_types(logits_K.dtype, torch.float32)) / temperature
    x_K = x_K.masked_fill(elsewhere_K, NO_TOKEN)
    largest_R = x_K.new_full(tokens_R.shape, NO_TOKEN).scatter_reduce(0, support.rows_K, x_K.detach(), "amax")
    if tp_group.size() > 1:
        dist.all_reduce(largest_R, dist.ReduceOp.MAX, tp_group)
    x_K = x_K - largest_R[support.rows_K]
    exp_K = x_K.exp()
    own_K = x_K.masked_fill(elsewhere_K | (support.ids_K != tokens_R[support.rows_K]), 0.0)
    sums_3R = x_K.new_zeros(3, len(tokens_R)).index_add(1, support.rows_K, torch.stack([exp_K, exp_K * x_K, own_K]))
    if tp_group.size() > 1:  # every rank goes on alike: the gradient is not summed
        sums_3R = reduce_from_tensor_model_parallel_region(sums_3R, tp_group)
    log_sum_R = sums_3R[0].log()
    return sums_3R[2] - log_sum_R, log_sum_R - sums_3R[1] / sums_3R[0]


class _Tap(torch.autograd.Function):
    """The logits, to be read in full, and some of them by row and column. The gradients of the few are added to that of the whole
    in place: nobody else has it, and autograd would lay out a second one of its size."""

    @staticmethod
    def forward(
        ctx: Any, logits_RV: torch.Tensor, rows_K: torch.Tensor, columns_K: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(rows_K, columns_K)
        return logits_RV.view_as(logits_RV), logits_RV[rows_K, columns_K]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        grad_RV, grad_K = grads
        return grad_RV.index_put_(ctx.saved_tensors, grad_K, accumulate=True), None, None


class _VocabParallel(torch.autograd.Function):
    """With x = logits / temperature, p = softmax(x) and H its entropy: d logprob / dx_i = [i is the token] - p_i and
    d H / dx_i = -p_i (log p_i + H)."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_RV: torch.Tensor,
        tokens_R: torch.Tensor,
        temperature: float,
        group: dist.ProcessGroup,
        vocab_size: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x_RV = logits_RV.float() / temperature
        x_RV[:, max(0, vocab_size - group.rank() * x_RV.size(1)) :] = NO_TOKEN
        largest_R = x_RV.amax(-1)
        dist.all_reduce(largest_R, dist.ReduceOp.MAX, group)
        x_RV = x_RV - largest_R[:, None]
        local_R = tokens_R - group.rank() * x_RV.size(1)
        elsewhere_R = (local_R < 0) | (local_R >= x_RV.size(1))
        local_R = local_R.masked_fill(elsewhere_R, 0)
        exp_RV = x_RV.exp()
        own_R = x_RV.gather(1, local_R[:, None]).squeeze(1).masked_fill(elsewhere_R, 0.0)
        sums_3R = torch.stack([exp_RV.sum(-1), (exp_RV * x_RV).sum(-1), own_R])
        dist.all_reduce(sums_3R, group=group)
        log_sum_R = sums_3R[0].log()
        entropy_R = log_sum_R - sums_3R[1] / sums_3R[0]
        ctx.save_for_backward(x_RV.sub_(log_sum_R[:, None]), local_R, elsewhere_R, entropy_R)
        ctx.temperature, ctx.dtype = temperature, logits_RV.dtype
        ctx.set_materialize_grads(False)
        return sums_3R[2] - log_sum_R, entropy_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor, None, None, None, None]:
        logp_RV, local_R, elsewhere_R, entropy_R = ctx.saved_tensors
        grad_logprobs_R, grad_entropy_R = grads
        p_RV = logp_RV.exp()
        grad_RV = torch.zeros_like(p_RV)
        if grad_logprobs_R is not None:
            grad_RV -= grad_logprobs_R[:, None] * p_RV
            grad_RV.scatter_add_(1, local_R[:, None], grad_logprobs_R.masked_fill(elsewhere_R, 0.0)[:, None])
        if grad_entropy_R is not None:
            grad_RV -= grad_entropy_R[:, None] * p_RV * (logp_RV + entropy_R[:, None])
        return (grad_RV / ctx.temperature).to(ctx.dtype), None, None, None, None
