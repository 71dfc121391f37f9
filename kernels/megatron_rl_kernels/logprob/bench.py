"""python -m megatron_rl_kernels.logprob.bench [TOKENS] [VOCAB]: forward + backward on this GPU, in bf16, beside plain torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from triton.testing import do_bench

from megatron_rl_kernels.logprob import reference, triton

TokenLogprobs = Callable[[torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]]


def measure(token_logprobs: TokenLogprobs, tokens: int, vocab: int) -> tuple[float, float]:
    """(milliseconds, GiB beyond the logits at the peak)."""
    logits_TV = torch.randn(tokens, vocab, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    tokens_T = torch.randint(vocab, (tokens,), device="cuda")

    def step() -> None:
        logits_TV.grad = None
        logprobs_T, entropy_T = token_logprobs(logits_TV, tokens_T, 1.0)
        (logprobs_T.sum() + entropy_T.sum()).backward()

    step()
    logits_TV.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    peak = torch.cuda.max_memory_allocated() - before
    return float(do_bench(step)), peak / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokens", type=int, nargs="?", default=8192)
    parser.add_argument("vocab", type=int, nargs="?", default=157_184)
    tokens, vocab = vars(parser.parse_args()).values()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {tokens} tokens, vocabulary {vocab}")
    for name, token_logprobs in (("torch", reference.token_logprobs), ("triton", triton.token_logprobs)):
        milliseconds, gib = measure(token_logprobs, tokens, vocab)
        print(f"{name:>8}: {milliseconds:8.2f} ms  {gib:6.2f} GiB beyond the logits")


if __name__ == "__main__":
    main()
