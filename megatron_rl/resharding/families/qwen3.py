"""Qwen3, dense (arXiv 2505.09388)."""

from __future__ import annotations

from megatron_rl.resharding.families.parts import (
    SIZES,
    TIED,
    ConfigTable,
    attention,
    dense_mlp,
    embeddings,
    head_dim,
    layer_norms,
)
from megatron_rl.resharding.names import Family

RULES = (
    *embeddings("model.embed_tokens.weight"),
    *layer_norms(),
    *attention(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.o_proj",
        q_norm="self_attn.q_norm",
        k_norm="self_attn.k_norm",
    ),
    *dense_mlp(),
)
CONFIG = ConfigTable(
    "Qwen3ForCausalLM",
    "qwen3",
    keys=SIZES,
    optional={**TIED, "head_dim": ("head_dim", head_dim)},
    same={"attention_bias": False, "use_sliding_window": False},
    implied={"qk_norm": True, "qkv_bias": False, "rotary_percent": 1.0},
)
FAMILY = Family(RULES, CONFIG.write, CONFIG.read)
