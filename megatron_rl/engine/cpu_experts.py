"""BailingMoeV2's routed experts on a CPU: SGLang's native path forgets `routed_scaling_factor`.

Its GPU runners multiply the experts' sum by it (moe_runner/triton.py:111); `moe_forward_native` (fused_moe_native.py:62), which the
CPU takes, does not, and BailingMoE leaves it to the runner (models/bailing_moe.py:288, :296). Log-probs are off by 0.1 nats and
more. The factor is put back through SGLang's hook registry. This can go when upstream's native path applies it, which
`register` notices.

Invariant: log-probs of a BailingMoeV2 server on a CPU are those of the reference implementation.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from sglang.srt.layers.moe import fused_moe_native
from sglang.srt.models.bailing_moe import BailingMoESparseMoeBlock

from megatron_rl.engine.hooks import hook

METHOD = "_forward_router_experts"


def scale(routed: torch.Tensor, block: Any, hidden_states: torch.Tensor, forward_batch: Any) -> torch.Tensor:
    return routed * block.routed_scaling_factor


def register() -> None:
    upstream = getattr(BailingMoESparseMoeBlock, METHOD)
    if list(inspect.signature(upstream).parameters) != ["self", "hidden_states", "forward_batch"]:
        raise RuntimeError(f"SGLang's BailingMoESparseMoeBlock.{METHOD} has changed: look whether cpu_experts.py is still needed")
    if "routed_scaling_factor" in inspect.getsource(fused_moe_native):
        raise RuntimeError("SGLang's fused_moe_native now knows routed_scaling_factor: cpu_experts.py would apply it twice")
    hook(f"{BailingMoESparseMoeBlock.__module__}.BailingMoESparseMoeBlock.{METHOD}", "AFTER", scale)
