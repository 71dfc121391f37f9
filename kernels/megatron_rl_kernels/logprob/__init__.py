"""Log-probability of one token per row, and the entropy of the row, from logits, without a log-softmax in memory.

At a vocabulary of 157,184 the fp32 log-softmax of 8,192 tokens is 5.2 GB, and autograd keeps it. Here the forward pass reads
the logits once and keeps three numbers a row; the backward pass writes the logits' gradient and nothing else.

Invariants: both devices compute in fp32 (float64 for float64 logits, CPU only) whatever the logits' type; a logit of -inf has
probability 0 and gets gradient 0; a token that is not in the vocabulary is an error on CPU and NaN on CUDA, never memory
out of bounds.
"""

from __future__ import annotations

import torch

from megatron_rl_kernels.logprob.reference import token_logprobs as _reference


def token_logprobs(logits_TV: torch.Tensor, tokens_T: torch.Tensor, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """(logprobs_T, entropy_T) in nats under softmax(logits / temperature); gradients flow from both to the logits.

    Row t scores tokens_T[t]: the shift between a token and the position that predicts it is the caller's.
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} is not above 0")
    if logits_TV.dim() != 2 or tokens_T.shape != logits_TV.shape[:1]:
        raise ValueError(f"logits {tuple(logits_TV.shape)} and tokens {tuple(tokens_T.shape)} are not (T, V) and (T,)")
    if logits_TV.is_cuda:
        from megatron_rl_kernels.logprob.triton import token_logprobs as on_cuda  # triton is only needed where it can run

        return on_cuda(logits_TV, tokens_T, temperature)
    return _reference(logits_TV, tokens_T, temperature)


__all__ = ["token_logprobs"]
