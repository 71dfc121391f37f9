"""One file per model family: its table of names and the meaning of its config.json."""

from megatron_rl.config.model import ModelConfig
from megatron_rl.resharding.families import bailing_moe_v2
from megatron_rl.resharding.names import Family, Names

FAMILIES: dict[str, Family] = {"bailing_moe_v2": bailing_moe_v2.FAMILY}


def family_of(model: ModelConfig) -> Family:
    return FAMILIES[model.family]


def names_of(model: ModelConfig) -> Names:
    return Names(family_of(model).rules, model)
