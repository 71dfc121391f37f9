"""BailingMoeV2: Ling 2.0 and Ring (arXiv 2510.22115), without their multi-token-prediction layer.

Q, K and V are one tensor [all Q, all K, all V]. Layer norms before a linear sit inside it under Transformer Engine.
`partial_rotary_factor` must stand in a config.json: where it is missing some readers take 1.0 and produce noise without an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_rl.config.model import ModelConfig
from megatron_rl.resharding.names import Family, Rule

HF, MG = "model.layers.{layer}.", "decoder.layers.{layer}."

RULES = (
    Rule(
        ("model.word_embeddings.weight",),
        ("embedding.word_embeddings.weight",),
        ("vocab", "hidden"),
        "vocab",
        where="model",
        when=lambda model: not model.tie_embeddings,
    ),
    Rule(
        ("model.word_embeddings.weight",),
        ("embedding.word_embeddings.weight", "output_layer.weight"),  # the last pipeline stage holds a copy of its own
        ("vocab", "hidden"),
        "vocab",
        where="model",
        when=lambda model: model.tie_embeddings,
    ),
    Rule(
        (HF + "input_layernorm.weight",),
        (MG + "input_layernorm.weight", MG + "self_attention.linear_qkv.layer_norm_weight"),
        ("hidden",),
        "replicated",
    ),
    Rule(
        (HF + "attention.query_key_value.weight",),
        (MG + "self_attention.linear_qkv.weight",),
        ("q+k+v", "hidden"),
        "column",
        transform="qkv",
    ),
    Rule(
        (HF + "attention.query_layernorm.weight",),
        (MG + "self_attention.q_layernorm.weight",),
        ("head",),
        "replicated",
        when=lambda model: model.qk_norm,
    ),
    Rule(
        (HF + "attention.key_layernorm.weight",),
        (MG + "self_attention.k_layernorm.weight",),
        ("head",),
        "replicated",
        when=lambda model: model.qk_norm,
    ),
    Rule((HF + "attention.dense.weight",), (MG + "self_attention.linear_proj.weight",), ("hidden", "q"), "row"),
    Rule(
        (HF + "post_attention_layernorm.weight",),
        (MG + "pre_mlp_layernorm.weight", MG + "mlp.linear_fc1.layer_norm_weight"),
        ("hidden",),
        "replicated",
    ),
    Rule(
        (HF + "mlp.gate_proj.weight", HF + "mlp.up_proj.weight"),
        (MG + "mlp.linear_fc1.weight",),
        ("ffn", "hidden"),
        "column",
        transform="gate_up",
        where="dense",
    ),
    Rule((HF + "mlp.down_proj.weight",), (MG + "mlp.linear_fc2.weight",), ("hidden", "ffn"), "row", where="dense"),
    Rule((HF + "mlp.gate.weight",), (MG + "mlp.router.weight",), ("experts", "hidden"), "replicated", where="moe"),
    Rule(
        (HF + "mlp.gate.expert_bias",),
        (MG + "mlp.router.expert_bias",),
        ("experts",),
        "replicated",
        where="moe",
        when=lambda model: model.moe is not None and model.moe.expert_bias,
    ),
    Rule(
        (HF + "mlp.experts.{expert}.gate_proj.weight", HF + "mlp.experts.{expert}.up_proj.weight"),
        (MG + "mlp.experts.local_experts.{expert}.linear_fc1.weight", MG + "mlp.experts.linear_fc1.weight{expert}"),
        ("expert_ffn", "hidden"),
        "column",
        transform="gate_up",
        where="moe",
    ),
    Rule(
        (HF + "mlp.experts.{expert}.down_proj.weight",),
        (MG + "mlp.experts.local_experts.{expert}.linear_fc2.weight", MG + "mlp.experts.linear_fc2.weight{expert}"),
        ("hidden", "expert_ffn"),
        "row",
        where="moe",
    ),
    Rule(
        (HF + "mlp.shared_experts.gate_proj.weight", HF + "mlp.shared_experts.up_proj.weight"),
        (MG + "mlp.shared_experts.linear_fc1.weight",),
        ("shared_ffn", "hidden"),
        "column",
        transform="gate_up",
        where="moe",
        when=lambda model: model.moe is not None and model.moe.num_shared_experts > 0,
    ),
    Rule(
        (HF + "mlp.shared_experts.down_proj.weight",),
        (MG + "mlp.shared_experts.linear_fc2.weight",),
        ("hidden", "shared_ffn"),
        "row",
        where="moe",
        when=lambda model: model.moe is not None and model.moe.num_shared_experts > 0,
    ),
    Rule(("model.norm.weight",), ("decoder.final_layernorm.weight",), ("hidden",), "replicated", where="model"),
    Rule(
        ("lm_head.weight",),
        ("output_layer.weight",),
        ("vocab", "hidden"),
        "vocab",
        where="model",
        when=lambda model: not model.tie_embeddings,
    ),
)


def to_hf_config(model: ModelConfig) -> dict[str, Any]:
    """Every key that the reference implementation or SGLang's models/bailing_moe.py reads; neither has safe defaults."""
    rope = {"rope_type": "default", "rope_theta": model.rotary_base, "partial_rotary_factor": model.rotary_percent}
    config: dict[str, Any] = {
        "architectures": ["BailingMoeV2ForCausalLM"],
        "model_type": "bailing_moe_v2",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.ffn_hidden_size,
        "hidden_act": "silu",
        "use_qk_norm": model.qk_norm,
        "use_qkv_bias": False,
        "use_bias": False,
        "rms_norm_eps": model.rms_norm_eps,
        "max_position_embeddings": model.max_position_embeddings,
        "partial_rotary_factor": model.rotary_percent,
        "rope_theta": model.rotary_base,
        "rope_scaling": None,
        "rope_parameters": rope,  # bailing_moe.py:574 takes rope_theta from here
        "embedding_dropout": 0.0,
        "attention_dropout": 0.0,
        "output_dropout": 0.0,
        "num_nextn_predict_layers": 0,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
        "use_cache": True,
    }
    if model.moe is None:
        return config | {"num_experts": 0, "first_k_dense_replace": model.num_layers}
    moe = model.moe
    return config | {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.ffn_hidden_size,
        "num_shared_experts": moe.num_shared_experts,
        "first_k_dense_replace": moe.first_dense_layers,
        "n_group": moe.num_groups,
        "topk_group": moe.topk_groups,
        "routed_scaling_factor": moe.routed_scaling_factor,
        "norm_topk_prob": True,
        "score_function": moe.score_function,
        "router_dtype": "fp32",
        "moe_router_enable_expert_bias": moe.expert_bias,
    }


def from_hf_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """ModelConfig's values for a config.json; ValueError naming what is missing or what this family does not have here."""
    if "BailingMoeV2ForCausalLM" not in (config.get("architectures") or ()):
        raise ValueError(f"architectures={config.get('architectures')}: not a BailingMoeV2ForCausalLM checkpoint")
    config = {**(config.get("rope_parameters") or {}), **config}  # where transformers 5 keeps the rope keys
    moe_keys = _EXPERTS if config.get("num_experts") else {}
    missing = sorted(key for key in (_MODEL | moe_keys).values() if config.get(key) is None)
    if missing:
        raise ValueError(f"missing {', '.join(missing)}")
    fixed = _FIXED | ({"moe_shared_expert_intermediate_size": config["moe_intermediate_size"]} if moe_keys else {})
    wrong = [f"{key}={config[key]!r}" for key, value in fixed.items() if config.get(key, value) != value]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: not supported")
    values: dict[str, Any] = {ours: config[theirs] for ours, theirs in _MODEL.items()}
    values["moe"] = {ours: config[theirs] for ours, theirs in _EXPERTS.items()} if moe_keys else None
    return values


_MODEL = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_hidden_size": "intermediate_size",
    "qk_norm": "use_qk_norm",
    "rotary_base": "rope_theta",
    "rotary_percent": "partial_rotary_factor",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
_EXPERTS = {
    "num_experts": "num_experts",
    "top_k": "num_experts_per_tok",
    "ffn_hidden_size": "moe_intermediate_size",
    "num_shared_experts": "num_shared_experts",
    "first_dense_layers": "first_k_dense_replace",
    "num_groups": "n_group",
    "topk_groups": "topk_group",
    "routed_scaling_factor": "routed_scaling_factor",
    "score_function": "score_function",
    "expert_bias": "moe_router_enable_expert_bias",
}
_FIXED = {
    "hidden_act": "silu",
    "use_bias": False,
    "use_qkv_bias": False,
    "norm_topk_prob": True,
    "rope_scaling": None,
    "rope_type": "default",
    "norm_head": False,
}

FAMILY = Family(RULES, to_hf_config, from_hf_config)
