"""Qwen3-MoE (arXiv 2505.09388): 30B-A3B, 235B-A22B."""

from __future__ import annotations

from megatron_rl.resharding.families import qwen3
from megatron_rl.resharding.families.parts import SIZES, TIED, ConfigTable, experts, head_dim
from megatron_rl.resharding.names import Family

RULES = (*qwen3.RULES, *experts(shared=False))
CONFIG = ConfigTable(
    "Qwen3MoeForCausalLM",
    "qwen3_moe",
    keys={
        **SIZES,
        "moe.num_experts": "num_experts",
        "moe.top_k": "num_experts_per_tok",
        "moe.ffn_hidden_size": "moe_intermediate_size",
        "moe.norm_topk_prob": "norm_topk_prob",
    },
    optional={**TIED, "head_dim": ("head_dim", head_dim)},
    same={"attention_bias": False, "use_sliding_window": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
    implied={
        **qwen3.CONFIG.implied,
        "moe.num_shared_experts": 0,
        "moe.first_dense_layers": 0,
        "moe.score_function": "softmax",
        "moe.expert_bias": False,
    },
)
FAMILY = Family(RULES, CONFIG.write, CONFIG.read)
