"""DeepSeek-V3 and R1 (arXiv 2412.19437): latent attention, group-limited sigmoid routing, multi-token prediction.

The checkpoint repeats the embedding and the output layer in its multi-token-prediction layer. Published weights are FP8 in blocks
and are read as such; `num_routed_experts` is a spelling that some copies of its config.json have.
"""

from __future__ import annotations

from megatron_rl.config.model import ModelConfig
from megatron_rl.resharding.families.parts import (
    SIZES,
    TIED,
    ConfigTable,
    L,
    M,
    dense_mlp,
    embeddings,
    experts,
    layer_norms,
    multi_token_prediction,
)
from megatron_rl.resharding.names import Family, Rule

HF, MG = L + "self_attn.", M + "self_attention."


def compressed(model: ModelConfig) -> bool:
    """Whether queries, too, go through a latent."""
    return bool(model.mla and model.mla.q_lora_rank)


def direct(model: ModelConfig) -> bool:
    return not compressed(model)


RULES = (
    *embeddings("model.embed_tokens.weight"),
    *layer_norms(fused_into=""),
    Rule((HF + "q_proj.weight",), (MG + "linear_q_proj.weight",), ("q hidden",), "column", when=direct),
    Rule((HF + "q_a_proj.weight",), (MG + "linear_q_down_proj.weight",), ("q_lora hidden",), "replicated", when=compressed),
    Rule(
        (HF + "q_a_layernorm.weight",),
        (MG + "q_layernorm.weight", MG + "linear_q_up_proj.layer_norm_weight"),
        ("q_lora",),
        "replicated",
        when=compressed,
    ),
    Rule((HF + "q_b_proj.weight",), (MG + "linear_q_up_proj.weight",), ("q q_lora",), "column", when=compressed),
    Rule((HF + "kv_a_proj_with_mqa.weight",), (MG + "linear_kv_down_proj.weight",), ("kv_lora+rope hidden",), "replicated"),
    Rule(
        (HF + "kv_a_layernorm.weight",),
        (MG + "kv_layernorm.weight", MG + "linear_kv_up_proj.layer_norm_weight"),
        ("kv_lora",),
        "replicated",
    ),
    Rule((HF + "kv_b_proj.weight",), (MG + "linear_kv_up_proj.weight",), ("k+v kv_lora",), "column"),
    Rule((HF + "o_proj.weight",), (MG + "linear_proj.weight",), ("hidden v",), "row"),
    *dense_mlp(),
    *experts(bias="e_score_correction_bias"),
    *multi_token_prediction(norm="shared_head.norm"),
    Rule((L + "embed_tokens.weight",), ("embedding.word_embeddings.weight",), ("vocab hidden",), "vocab", "mtp", copy=True),
    Rule((L + "shared_head.head.weight",), ("output_layer.weight",), ("vocab hidden",), "vocab", "mtp", copy=True),
)
CONFIG = ConfigTable(
    "DeepseekV3ForCausalLM",
    "deepseek_v3",
    keys={
        **SIZES,
        "mla.kv_lora_rank": "kv_lora_rank",
        "mla.qk_nope_head_dim": "qk_nope_head_dim",
        "mla.qk_rope_head_dim": "qk_rope_head_dim",
        "mla.v_head_dim": "v_head_dim",
        "moe.num_experts": ("n_routed_experts", "num_routed_experts"),
        "moe.top_k": "num_experts_per_tok",
        "moe.ffn_hidden_size": "moe_intermediate_size",
        "moe.num_shared_experts": ("n_shared_experts", "num_shared_experts"),
        "moe.first_dense_layers": "first_k_dense_replace",
        "moe.num_groups": "n_group",
        "moe.topk_groups": "topk_group",
        "moe.routed_scaling_factor": "routed_scaling_factor",
    },
    optional={
        **TIED,
        "mla.q_lora_rank": ("q_lora_rank", None),
        "num_mtp_layers": ("num_nextn_predict_layers", 0),
    },
    same={
        "attention_bias": False,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "rope_interleave": True,
    },
    implied={
        "head_dim": lambda config: config["qk_nope_head_dim"] + config["qk_rope_head_dim"],
        "qk_norm": True,
        "rotary_percent": 1.0,
        "moe.score_function": "sigmoid",
        "moe.expert_bias": True,
    },
    yarn=True,
)
FAMILY = Family(RULES, CONFIG.write, CONFIG.read)
