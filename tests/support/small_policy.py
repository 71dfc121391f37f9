"""Policies small enough for a test: their sizes, and one that starts from a Hugging Face checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_rl.config.model import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_rl.policy import MegatronPolicy, MegatronRanks, weights
from megatron_rl.resharding.hf import load_hf

SMALL: dict[str, Any] = {  # one dense layer and one with experts
    "vocab_size": 32,
    "hidden_size": 32,
    "num_layers": 2,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "ffn_hidden_size": 48,
    "moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 16, "num_groups": 2, "topk_groups": 1},
    "init_std": 0.1,
}
DIVISIBLE: dict[str, Any] = {  # by every layout of four ranks
    "vocab_size": 48,
    "hidden_size": 32,
    "num_layers": 4,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "ffn_hidden_size": 64,
    "moe": {"num_experts": 8, "top_k": 4, "ffn_hidden_size": 32, "num_groups": 4, "topk_groups": 2},
    "init_std": 0.1,
}


def loaded_policy(hf: Path, model: ModelConfig, parallel: ParallelConfig, ranks: MegatronRanks, **options: Any) -> MegatronPolicy:
    return MegatronPolicy(
        model,
        parallel,
        OptimizerConfig(lr=1e-3),
        total_steps=1,
        seed=0,
        ranks=ranks,
        load=lambda chunks: load_hf(hf, weights(chunks), model, parallel, ranks.rank),
        **options,
    )
