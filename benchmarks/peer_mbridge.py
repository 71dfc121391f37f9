"""The conversions of benchmarks/convert.py by mbridge (github.com/ISEEKYAN/mbridge), for Qwen3 on one rank.

To Megatron: `load_weights` into a model, `dist_checkpointing.save` of it. Back: `dist_checkpointing.load`, `save_weights`.

mbridge builds layers of Transformer Engine only. Here it is given Megatron's local ones, which need no GPU, and where those keep
the two norms, and `rope_theta` where transformers 4 had it; it is not changed otherwise. It does not ask for an fsync: one of every
file is added, so that it ends where ours does.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

from mbridge import AutoBridge
from mbridge.models.qwen3 import Qwen3Bridge
from megatron.core import dist_checkpointing
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

UNFUSED = (
    "apply_rope_fusion",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "gradient_accumulation_fusion",
    "masked_softmax_fusion",
    "perform_initialization",
    "persist_layer_norm",
)
LAYER = "model.layers.{layer_number}."


class LocalQwen3Bridge(Qwen3Bridge):
    _OTHER_MAPPING: ClassVar = {"input_layernorm.weight": [LAYER + "input_layernorm.weight"]}
    _MLP_MAPPING: ClassVar = {"pre_mlp_layernorm.weight": [LAYER + "post_attention_layernorm.weight"]} | Qwen3Bridge._MLP_MAPPING

    def _get_transformer_layer_spec(self, vp_stage: int | None = None) -> Any:
        self.has_vp_stage = True
        return get_gpt_decoder_block_spec(self.config, False, normalization="RMSNorm", vp_stage=vp_stage)


def start(hf: Path) -> None:
    """Megatron's process groups, of one rank."""
    from megatron_rl.config.model import ModelConfig, ParallelConfig
    from megatron_rl.policy import MegatronRanks
    from megatron_rl.resharding.families import model_values
    from megatron_rl.resharding.hf_source import read_json

    MegatronRanks(ParallelConfig(), ModelConfig.model_validate(model_values(read_json(hf / "config.json"))))


def to_megatron(src: Path, dst: Path, _: int) -> None:
    bridge, model = _empty(src)
    bridge.load_weights(model, str(src))
    dst.mkdir()
    dist_checkpointing.save(_state(model), str(dst))
    _fsync(dst)


def to_hf(src: Path, dst: Path, _: int) -> None:
    hf = src.with_name("hf")
    bridge, model = _empty(hf)
    model[0].load_state_dict(dist_checkpointing.load(_state(model), str(src)))
    bridge.safetensor_io = bridge._get_safetensor_io(str(hf))
    bridge.save_weights(model, str(dst))
    _fsync(dst)


def _empty(hf: Path) -> tuple[Any, Any]:
    import mbridge.core.bridge as registry

    registry._MODEL_REGISTRY["qwen3"] = LocalQwen3Bridge
    bridge = AutoBridge.from_pretrained(str(hf))
    bridge.hf_config.rope_theta = bridge.hf_config.rope_parameters["rope_theta"]
    bridge.set_extra_args(use_cpu_initialization=True, **dict.fromkeys(UNFUSED, False))
    return bridge, bridge.get_model(use_cpu_initialization=True)


def _state(model: Any) -> Any:
    return model[0].module.sharded_state_dict()


def _fsync(folder: Path) -> None:
    for file in folder.iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
