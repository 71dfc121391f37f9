"""One file per model family: its table of names and the meaning of its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_rl.config.model import ModelConfig
from megatron_rl.resharding.families import bailing_moe, bailing_moe_v2, deepseek_v3, qwen2, qwen3, qwen3_moe
from megatron_rl.resharding.names import Family, Names

FAMILIES: dict[str, Family] = {
    "bailing_moe_v2": bailing_moe_v2.FAMILY,
    "bailing_moe": bailing_moe.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
    "qwen3": qwen3.FAMILY,
    "qwen2": qwen2.FAMILY,
    "deepseek_v3": deepseek_v3.FAMILY,
}
_ARCHITECTURES = {
    module.CONFIG.architecture: family
    for family, module in zip(FAMILIES, (bailing_moe_v2, bailing_moe, qwen3_moe, qwen3, qwen2, deepseek_v3), strict=True)
}


FP32_LM_HEAD = "enable_lm_head_fp32"  # a key of config.json that SGLang looks for (layers/logits_processor.py:454)


def family_of(model: ModelConfig) -> Family:
    return FAMILIES[model.family]


def names_of(model: ModelConfig) -> Names:
    return Names(family_of(model).rules, model)


def model_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """ModelConfig's values for a config.json of any family; ValueError naming what is wrong with it."""
    for architecture in config.get("architectures") or ():
        if architecture in _ARCHITECTURES:
            family = _ARCHITECTURES[architecture]
            head = {"fp32_lm_head": True} if config.get(FP32_LM_HEAD) else {}
            return {"family": family} | head | FAMILIES[family].from_hf_config(config)
    raise ValueError(f"architectures={config.get('architectures')}: not one of {', '.join(_ARCHITECTURES)}")
