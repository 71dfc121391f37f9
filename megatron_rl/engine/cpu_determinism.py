"""Deterministic inference on a CPU: what SGLang's `--enable-deterministic-inference` needs there and has for accelerators alone.

- Seeded sampling (srt/layers/sampler.py:878) draws by `sgl_kernel`'s hash of seed, position and token, of which the package index
  has no CPU build: here it is numpy's work.
- Its batch-invariant kernels are Triton's (srt/batch_invariant_ops). Here there are none: float32 on a CPU gives a row of a batch
  the same logits within rounding, so that other rows of its batch can change a draw only where two tokens tie to six digits.
- The lists of attention backends that may be asked for it, with a prefix cache beside it (srt/arg_groups/choices.py:240), get ours.

Can go when SGLang's CPU build is on the package index and its mode takes CPUs.

Invariants: the hash is MurmurHash3's of the 16 bytes (seed, position, token), as SGLang's Triton kernel computes it; a request's
samples are those of its seed, in whatever batch, order and pieces they are made, and follow the model's probabilities.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.library import define, impl

Words = np.ndarray[Any, np.dtype[np.uint32]]


def register() -> None:
    from sglang.srt import server_args

    from megatron_rl.engine.hooks import hook

    server_args.add_deterministic_attention_backend_choices(["torch_native"])
    server_args.add_radix_supported_deterministic_attention_backend_choices(["torch_native"])
    define("sgl_kernel::murmur_hash32_cpu", "(Tensor seed, Tensor positions, Tensor col_indices) -> Tensor")
    impl("sgl_kernel::murmur_hash32_cpu", "CPU", murmur_hash32)
    hook("sglang.srt.model_executor.model_runner.ModelRunner.maybe_enable_batch_invariant_mode", "REPLACE", lambda runner: None)


def murmur_hash32(seed_N: torch.Tensor, position_N: torch.Tensor, column_M: torch.Tensor) -> torch.Tensor:
    """(N, M) uint32."""
    seeds = seed_N.numpy()
    h = np.zeros(len(seeds), np.uint32)
    for word in (seeds & np.uint64(0xFFFFFFFF), seeds >> np.uint64(32), position_N.numpy()):
        h = _mixed(h, _scrambled(word.astype(np.uint32)))
    h = _mixed(h[:, None], _scrambled(column_M.numpy().astype(np.uint32))[None, :])
    h ^= np.uint32(16)  # bytes
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h ^= h >> np.uint32(shift)
        h *= np.uint32(factor)
    h ^= h >> np.uint32(16)
    return torch.from_numpy(h)


def _scrambled(word: Words) -> Words:
    return _rotated(word * np.uint32(0xCC9E2D51), 15) * np.uint32(0x1B873593)


def _mixed(h: Words, word: Words) -> Words:
    return _rotated(h ^ word, 13) * np.uint32(5) + np.uint32(0xE6546B64)


def _rotated(word: Words, bits: int) -> Words:
    return (word << np.uint32(bits)) | (word >> np.uint32(32 - bits))
