"""Recording of each token's experts by a server that was started with --enable-return-routed-experts: what SGLang lacks for it.

- BailingMoe's blocks build their TopK without a layer number (srt/models/bailing_moe.py:286), and the capturer files by it. Can go
  when they pass `layer_id`.
- The capturer's host buffer is registered with CUDA unless the device has an allocator of its own
  (srt/mem_cache/pool_host/common.py:325), and a CPU has none. Can go when there is one.

Invariant: every row that a server reports is the choice of the routers that computed the position (tests/integration).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from sglang.srt.mem_cache.pool_host.common import ALLOC_MEMORY_FUNCS
from sglang.srt.models.bailing_moe import BailingMoESparseMoeBlock

from megatron_rl.engine.hooks import hook


def register() -> None:
    construction = inspect.getsource(BailingMoESparseMoeBlock.__init__).partition("self.topk = TopK(")[2]
    if "layer_id=" not in construction.partition("\n        )")[0]:
        hook("sglang.srt.models.bailing_moe.BailingMoESparseMoeBlock.__init__", "AFTER", number_its_choice)
    if "cpu" not in ALLOC_MEMORY_FUNCS:
        ALLOC_MEMORY_FUNCS["cpu"] = allocate


def number_its_choice(built: None, block: Any, *args: Any, **kwargs: Any) -> None:
    block.topk.layer_id = block.layer_id


def allocate(
    dims: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    pin_memory: bool,
    allocator: Any,
    registration_granularity_bytes: int | None = None,
) -> torch.Tensor:
    return torch.empty(dims, dtype=dtype, device=device)
