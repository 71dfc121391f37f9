"""The truth in plain torch: differentiable by autograd, float64 in, float64 out."""

from __future__ import annotations

import torch


def token_logprobs(logits_TV: torch.Tensor, tokens_T: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(logits_TV.dtype, torch.float32)
    logprobs_TV = torch.log_softmax(logits_TV.to(dtype) / temperature, dim=-1)
    probs_TV = logprobs_TV.exp()
    entropy_T = -(probs_TV * logprobs_TV.masked_fill(probs_TV == 0, 0.0)).sum(-1)  # 0 log 0 = 0, and so is its gradient
    return logprobs_TV.gather(-1, tokens_T[:, None]).squeeze(-1), entropy_T
