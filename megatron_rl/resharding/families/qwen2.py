"""Qwen2 and Qwen2.5, dense (arXiv 2412.15115): what DeepSeek-R1's small distilled models are."""

from __future__ import annotations

from megatron_rl.resharding.families import qwen3
from megatron_rl.resharding.families.parts import SIZES, TIED, ConfigTable, head_dim
from megatron_rl.resharding.names import Family

CONFIG = ConfigTable(
    "Qwen2ForCausalLM",
    "qwen2",
    keys=SIZES,
    optional={**TIED, "head_dim": ("head_dim", head_dim)},
    same={"use_sliding_window": False},
    implied={"qk_norm": False, "qkv_bias": True, "rotary_percent": 1.0},
)
FAMILY = Family(qwen3.RULES, CONFIG.write, CONFIG.read)
