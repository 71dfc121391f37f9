"""Routed experts on a CPU: all of them in two grouped matmuls, and the factor that SGLang's native path forgets for BailingMoeV2.

- `moe_forward_native` (srt/layers/moe/fused_moe_native.py:62) loops over experts; `grouped_mm` saves 5 % of a small decode.
- SGLang's GPU runners multiply the experts' sum by `routed_scaling_factor` (moe_runner/triton.py:111); the native path does not,
  and BailingMoE leaves it to the runner (models/bailing_moe.py:288, :296): without it log-probs are off by 0.1 nats and more. This
  can go when the native path applies it, which `register` notices.

Both go in through SGLang's hook registry. Invariant: log-probs of a server on a CPU are those of the reference implementation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.moe import fused_moe_native
from sglang.srt.models.bailing_moe import BailingMoESparseMoeBlock
from torch.nn.functional import grouped_mm, silu

from megatron_rl.engine.hooks import hook

_HOOKED = {
    fused_moe_native.moe_forward_native: "layer x topk_output moe_runner_config",
    BailingMoESparseMoeBlock._forward_router_experts: "self hidden_states forward_batch",
}


def register() -> None:
    for function, expected in _HOOKED.items():
        found = " ".join(inspect.signature(function).parameters)
        if found != expected:
            raise RuntimeError(f"SGLang's {function.__qualname__} takes ({found}), cpu_experts.py hooks into ({expected})")
    if "routed_scaling_factor" in inspect.getsource(fused_moe_native):
        raise RuntimeError("SGLang's fused_moe_native now knows routed_scaling_factor: cpu_experts.py would apply it twice")
    hook("sglang.srt.layers.moe.fused_moe_native.moe_forward_native", "AROUND", grouped_experts)
    hook("sglang.srt.models.bailing_moe.BailingMoESparseMoeBlock._forward_router_experts", "AFTER", scale)


def scale(routed: torch.Tensor, block: Any, hidden_states: torch.Tensor, forward_batch: Any) -> torch.Tensor:
    return routed * block.routed_scaling_factor


def grouped_experts(
    native: Callable[..., torch.Tensor], layer: Any, x_TH: torch.Tensor, topk_output: Any, moe_runner_config: Any
) -> torch.Tensor:
    if not _is_plain_swiglu(layer, moe_runner_config):
        return native(layer, x_TH, topk_output, moe_runner_config)
    weights_TK, experts_TK, _ = topk_output
    order_P = experts_TK.flatten().argsort()  # pairs of token and choice, expert by expert
    ends_E = torch.bincount(experts_TK.flatten(), minlength=layer.num_experts).cumsum(0).int()
    tokens_P = order_P // experts_TK.shape[1]
    gate, up = grouped_mm(x_TH[tokens_P], layer.w13_weight.transpose(1, 2), offs=ends_E).chunk(2, -1)
    out_PH = grouped_mm(silu(gate) * up, layer.w2_weight.transpose(1, 2), offs=ends_E)
    weighted_PH = out_PH.to(weights_TK.dtype) * weights_TK.flatten()[order_P, None]
    return torch.zeros(x_TH.shape, dtype=weights_TK.dtype).index_add_(0, tokens_P, weighted_PH).to(x_TH.dtype)


def _is_plain_swiglu(layer: Any, moe_runner_config: Any) -> bool:
    biased = getattr(layer, "w13_weight_bias", None) is not None or getattr(layer, "w2_weight_bias", None) is not None
    oai_swiglu = moe_runner_config.gemm1_alpha is not None
    return moe_runner_config.activation == "silu" and not (biased or oai_swiglu or moe_runner_config.apply_router_weight_on_input)
