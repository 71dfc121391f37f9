"""Forward: one program a row walks the vocabulary once with an online softmax. Backward: one program a tile of the gradient.

With z = logits / temperature, p = softmax(z), H the entropy and y the row's token:
    d logprob / dz_i = [i = y] - p_i          d H / dz_i = -p_i (log p_i + H)
The walk keeps the largest logit, s = sum exp(d) and u = sum d exp(d) over d = (logit - largest) / temperature; then
log p_i = d_i - log s and H = log s - u / s. The shift comes before the scaling, so nothing cancels however large the logits are.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

FORWARD_BLOCK = 4096
BACKWARD_BLOCK = 2048


@triton.jit
def forward_kernel(
    logits, tokens, logprobs, entropies, maxima, log_sums,
    stride, vocab, inv_temperature, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride  # rows x vocabulary passes 2**31 at 13,663 rows of 157,184
    columns = tl.arange(0, BLOCK)
    largest = float("-inf")
    s = 0.0
    u = 0.0
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits + start + columns, mask=start + columns < vocab, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(x, axis=0))
        shift = tl.where(larger == float("-inf"), 0.0, larger)  # nothing but -inf so far
        drop = tl.where(largest == float("-inf"), 0.0, (largest - shift) * inv_temperature)
        d = (x - shift) * inv_temperature
        e = tl.exp(d)
        u = tl.exp(drop) * (u + drop * s) + tl.sum(e * tl.where(e > 0, d, 0.0), axis=0)
        s = tl.exp(drop) * s + tl.sum(e, axis=0)
        largest = larger
    token = tl.load(tokens + row)
    known = (token >= 0) & (token < vocab)
    x_y = tl.load(logits + token, mask=known, other=float("nan")).to(tl.float32)
    log_s = tl.log(s)
    tl.store(logprobs + row, (x_y - largest) * inv_temperature - log_s)
    tl.store(entropies + row, log_s - u / s)
    tl.store(maxima + row, largest)
    tl.store(log_sums + row, log_s)


@triton.jit
def backward_kernel(
    logits, tokens, entropies, maxima, log_sums, grad_logprobs, grad_entropies, grad_logits,
    stride, vocab, inv_temperature, LOGPROB_GRAD: tl.constexpr, ENTROPY_GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocab
    x = tl.load(logits + row.to(tl.int64) * stride + columns, mask=inside, other=float("-inf")).to(tl.float32)
    logp = (x - tl.load(maxima + row)) * inv_temperature - tl.load(log_sums + row)
    p = tl.exp(logp)
    grad = tl.zeros([BLOCK], tl.float32)
    if LOGPROB_GRAD:
        hit = (columns == tl.load(tokens + row)).to(tl.float32)
        grad += tl.load(grad_logprobs + row) * (hit - p)
    if ENTROPY_GRAD:
        grad -= tl.load(grad_entropies + row) * p * tl.where(p > 0, logp + tl.load(entropies + row), 0.0)
    grad_logits += row.to(tl.int64) * vocab
    tl.store(grad_logits + columns, (grad * inv_temperature).to(grad_logits.dtype.element_ty), mask=inside)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: torch.Tensor, tokens_T: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        rows, vocab = logits_TV.shape
        logprobs_T, entropy_T, maxima_T, log_sums_T = (
            torch.empty(rows, dtype=torch.float32, device=logits_TV.device) for _ in range(4)
        )
        forward_kernel[(rows,)](
            logits_TV, tokens_T, logprobs_T, entropy_T, maxima_T, log_sums_T,
            logits_TV.stride(0), vocab, 1.0 / temperature,
            BLOCK=min(FORWARD_BLOCK, triton.next_power_of_2(vocab)), num_warps=8,
        )  # fmt: skip
        ctx.save_for_backward(logits_TV, tokens_T, entropy_T, maxima_T, log_sums_T)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return logprobs_T, entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor, None, None]:
        logits_TV, *saved = ctx.saved_tensors
        rows, vocab = logits_TV.shape
        block = min(BACKWARD_BLOCK, triton.next_power_of_2(vocab))
        grad_logprobs_T, grad_entropy_T = (None if grad is None else grad.contiguous() for grad in grads)
        grad_TV = torch.empty(rows, vocab, dtype=logits_TV.dtype, device=logits_TV.device)
        backward_kernel[(rows, triton.cdiv(vocab, block))](
            logits_TV, *saved, grad_logprobs_T, grad_entropy_T, grad_TV,
            logits_TV.stride(0), vocab, 1.0 / ctx.temperature,
            LOGPROB_GRAD=grad_logprobs_T is not None, ENTROPY_GRAD=grad_entropy_T is not None, BLOCK=block, num_warps=8,
        )  # fmt: skip
        return grad_TV, None, None


def token_logprobs(logits_TV: torch.Tensor, tokens_T: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    if logits_TV.stride(1) != 1:
        raise ValueError(f"logits of strides {logits_TV.stride()}: the vocabulary has to be contiguous")
    return _TokenLogprobs.apply(logits_TV, tokens_T.contiguous(), temperature)
