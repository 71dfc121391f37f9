"""The forward pass of BailingMoe and BailingMoeV2 in plain torch, from the tensors of a checkpoint: what every engine and policy
must agree with.

    logits_TV = reference_logits(weights, config, tokens)          # one sequence, no cache
    logprobs_T = reference_logprobs(weights, config, tokens, temperature=1.0)   # of tokens[1:], given what is before each

Written from the Ling reports (arXiv 2503.05139, 2510.22115); the second is checked against the original implementation's outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import linear, scaled_dot_product_attention, silu

Weights = Mapping[str, torch.Tensor]


def reference_experts(weights: Weights, config: Mapping[str, Any], tokens: Sequence[int]) -> torch.Tensor:
    """(positions, MoE layers, top-k): what each position's routers choose, in ascending order."""
    chosen: list[torch.Tensor] = []
    with torch.no_grad():
        _logits(weights, config, tokens, chosen=chosen)
    return torch.stack(chosen, 1).sort(-1).values


@torch.no_grad()
def reference_logits(weights: Weights, config: Mapping[str, Any], tokens: Sequence[int]) -> torch.Tensor:
    return _logits(weights, config, tokens)


def logits_by_experts(
    weights: Weights, config: Mapping[str, Any], tokens: Sequence[int], experts_TLK: torch.Tensor
) -> torch.Tensor:
    """With gradients, and these experts in place of the routers' choices; -1: the router's own."""
    return _logits(weights, config, tokens, fixed_TLK=experts_TLK)


def _logits(
    weights: Weights,
    config: Mapping[str, Any],
    tokens: Sequence[int],
    chosen: list[torch.Tensor] | None = None,
    fixed_TLK: torch.Tensor | None = None,
) -> torch.Tensor:
    x = weights["model.word_embeddings.weight"][torch.tensor(tokens)]
    for i in range(config["num_hidden_layers"]):
        layer = {name.removeprefix(f"model.layers.{i}."): w for name, w in weights.items() if name.startswith(f"model.layers.{i}.")}
        x = x + _attention(layer, config, _norm(x, layer["input_layernorm.weight"], config))
        h = _norm(x, layer["post_attention_layernorm.weight"], config)
        if i < config["first_k_dense_replace"]:
            x = x + _mlp(layer, "mlp", h)
        else:
            fixed_TK = None if fixed_TLK is None else fixed_TLK[:, i - config["first_k_dense_replace"]]
            x = x + _experts(layer, config, h, chosen, fixed_TK)
    head = weights["lm_head.weight"]
    if config.get("norm_head"):
        head = head / head.norm(dim=0)
    return linear(_norm(x, weights["model.norm.weight"], config), head)


def reference_logprobs(
    weights: Weights, config: Mapping[str, Any], tokens: Sequence[int], temperature: float = 1.0
) -> torch.Tensor:
    logprobs_TV = (reference_logits(weights, config, tokens)[:-1] / temperature).log_softmax(-1)
    return logprobs_TV.gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0]


def _norm(x: torch.Tensor, weight: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]) * weight


def _attention(layer: Weights, config: Mapping[str, Any], h: torch.Tensor) -> torch.Tensor:
    heads, kv_heads, dim = config["num_attention_heads"], config["num_key_value_heads"], _head_dim(config)
    qkv = linear(h, layer["attention.query_key_value.weight"]).view(len(h), heads + 2 * kv_heads, dim)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    if config.get("use_qk_norm"):
        q, k = (_norm(x, layer[f"attention.{which}_layernorm.weight"], config) for x, which in ((q, "query"), (k, "key")))
    q, k = _rotate(q, config), _rotate(k, config)
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return linear(out[0].transpose(0, 1).flatten(1), layer["attention.dense.weight"])


def _rotate(x_THD: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    rotated = int(_head_dim(config) * config.get("partial_rotary_factor", 1.0))
    frequencies = config["rope_theta"] ** -(torch.arange(0, rotated, 2) / rotated)
    angles = torch.arange(len(x_THD))[:, None] * frequencies
    cos, sin = (torch.cat([f, f], -1)[:, None] for f in (angles.cos(), angles.sin()))
    x, rest = x_THD[..., :rotated], x_THD[..., rotated:]
    first, second = x.chunk(2, -1)
    return torch.cat([x * cos + torch.cat([-second, first], -1) * sin, rest], -1)


def _mlp(layer: Weights, name: str, h: torch.Tensor) -> torch.Tensor:
    gate, up = linear(h, layer[f"{name}.gate_proj.weight"]), linear(h, layer[f"{name}.up_proj.weight"])
    return linear(silu(gate) * up, layer[f"{name}.down_proj.weight"])


def _head_dim(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _experts(
    layer: Weights,
    config: Mapping[str, Any],
    h: torch.Tensor,
    chosen: list[torch.Tensor] | None,
    fixed_TK: torch.Tensor | None,
) -> torch.Tensor:
    logits_TE = linear(h, layer["mlp.gate.weight"])
    if config.get("score_function") == "sigmoid":
        scores_TE = logits_TE.sigmoid()
        chosen_TK = _grouped(layer, config, scores_TE)
    else:
        scores_TE = logits_TE.softmax(-1)
        chosen_TK = scores_TE.topk(config["num_experts_per_tok"], -1).indices
    if fixed_TK is not None:
        chosen_TK = torch.where(fixed_TK >= 0, fixed_TK, chosen_TK)
    gates_TK = scores_TE.gather(1, chosen_TK)
    if chosen is not None:
        chosen.append(chosen_TK)
    gates_TK = gates_TK / gates_TK.sum(-1, keepdim=True) * config.get("routed_scaling_factor", 1.0)
    out = _mlp(layer, "mlp.shared_experts", h)
    for expert in range(config["num_experts"]):
        gate_T = (gates_TK * (chosen_TK == expert)).sum(-1)
        out = out + gate_T[:, None] * _mlp(layer, f"mlp.experts.{expert}", h)
    return out


def _grouped(layer: Weights, config: Mapping[str, Any], scores_TE: torch.Tensor) -> torch.Tensor:
    biased_TE = scores_TE + layer["mlp.gate.expert_bias"]
    grouped_TGE = biased_TE.view(len(scores_TE), config["n_group"], -1)
    best_TG = grouped_TGE.topk(2, -1).values.sum(-1).topk(config["topk_group"], -1).indices
    allowed_TG = torch.zeros(grouped_TGE.shape[:2], dtype=torch.bool).scatter(1, best_TG, True)
    allowed_TE = allowed_TG[..., None].expand_as(grouped_TGE).flatten(1)
    return biased_TE.masked_fill(~allowed_TE, float("-inf")).topk(config["num_experts_per_tok"], -1).indices
