"""BailingMoe, the first Ling (arXiv 2503.05139): a softmax router, shared experts fused into one, and a normalised output layer."""

from __future__ import annotations

from megatron_rl.resharding.families.parts import (
    SIZES,
    TIED,
    ConfigTable,
    attention,
    dense_mlp,
    embeddings,
    experts,
    head_dim,
    layer_norms,
)
from megatron_rl.resharding.names import Family

RULES = (
    *embeddings("model.word_embeddings.weight"),
    *layer_norms(),
    *attention(("attention.query_key_value",), "attention.dense"),
    *dense_mlp(),
    *experts(),
)
CONFIG = ConfigTable(
    "BailingMoeForCausalLM",
    "bailing_moe",
    keys={
        **SIZES,
        "moe.num_experts": "num_experts",
        "moe.top_k": "num_experts_per_tok",
        "moe.ffn_hidden_size": "moe_intermediate_size",
        "moe.num_shared_experts": "num_shared_experts",
        "moe.first_dense_layers": "first_k_dense_replace",
    },
    optional={
        **TIED,
        "head_dim": ("head_dim", head_dim),
        "qkv_bias": ("use_qkv_bias", False),
        "norm_head": ("norm_head", False),
        "moe.norm_topk_prob": ("norm_topk_prob", True),
    },
    same={
        "use_bias": False,
        "norm_softmax": False,
        "use_qk_norm": False,
        "router_dtype": "fp32",
        "embedding_dropout": 0.0,
        "output_dropout": 0.0,
    },
    implied={"qk_norm": False, "rotary_percent": 1.0, "moe.score_function": "softmax", "moe.expert_bias": False},
)
FAMILY = Family(RULES, CONFIG.write, CONFIG.read)
