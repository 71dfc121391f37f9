"""BailingMoeV2: Ling 2.0 and Ring (arXiv 2510.22115).

`partial_rotary_factor` must stand in a config.json: where it is missing some readers take 1.0 and produce noise without an error.
SGLang's models/bailing_moe.py and the reference implementation read every key written here; neither has safe defaults.
"""

from __future__ import annotations

from megatron_rl.resharding.families.parts import (
    SIZES,
    ConfigTable,
    attention,
    dense_mlp,
    embeddings,
    experts,
    layer_norms,
    multi_token_prediction,
)
from megatron_rl.resharding.names import Family

RULES = (
    *embeddings("model.word_embeddings.weight"),
    *layer_norms(),
    *attention(
        ("attention.query_key_value",),
        "attention.dense",
        q_norm="attention.query_layernorm",
        k_norm="attention.key_layernorm",
    ),
    *dense_mlp(),
    *experts(bias="expert_bias"),
    *multi_token_prediction(norm="final_layernorm"),
)
CONFIG = ConfigTable(
    "BailingMoeV2ForCausalLM",
    "bailing_moe_v2",
    keys={
        **SIZES,
        "head_dim": "head_dim",
        "qk_norm": "use_qk_norm",
        "rotary_percent": "partial_rotary_factor",
        "tie_embeddings": "tie_word_embeddings",
        "moe.num_experts": "num_experts",
        "moe.top_k": "num_experts_per_tok",
        "moe.ffn_hidden_size": "moe_intermediate_size",
        "moe.num_shared_experts": "num_shared_experts",
        "moe.first_dense_layers": "first_k_dense_replace",
        "moe.num_groups": "n_group",
        "moe.topk_groups": "topk_group",
        "moe.routed_scaling_factor": "routed_scaling_factor",
        "moe.score_function": "score_function",
        "moe.expert_bias": "moe_router_enable_expert_bias",
    },
    optional={"num_mtp_layers": ("num_nextn_predict_layers", 0)},
    same={
        "use_bias": False,
        "use_qkv_bias": False,
        "norm_topk_prob": True,
        "norm_head": False,
        "router_dtype": "fp32",
        "embedding_dropout": 0.0,
        "output_dropout": 0.0,
        "moe_shared_expert_intermediate_size": lambda config: config["moe_intermediate_size"],
    },
)
FAMILY = Family(RULES, CONFIG.write, CONFIG.read)
