"""A small Hugging Face checkpoint of every model family, with seeded random weights and no tokenizer.

    path = write_family(tmp_path / "hf", "deepseek_v3", seed=0)             # TINY["deepseek_v3"]'s shapes
    path = write_family(tmp_path / "hf", "qwen3", seed=0, vocab_size=67)    # keys of config.json replaced

Every size can be split over TP2, EP2, ETP2 and PP2 x VPP2. Invariants: the same seed gives the same bytes; a tensor is a function
of the seed and its name; the copies in a multi-token-prediction layer equal what they copy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_rl.config.model import ModelConfig
from megatron_rl.resharding.families import model_values, names_of

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
GROUPS = {"n_group": 4, "topk_group": 1, "routed_scaling_factor": 2.5}
QWEN = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32, "attention_bias": False}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
DEEPSEEK = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "attention_bias": False,
    **GROUPS,
}
YARN = {
    "type": "yarn",
    "factor": 4,
    "original_max_position_embeddings": 128,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}

TINY: dict[str, dict[str, Any]] = {
    "bailing_moe_v2": SIZES
    | EXPERTS
    | GROUPS
    | {
        "architectures": ["BailingMoeV2ForCausalLM"],
        "model_type": "bailing_moe_v2",
        "head_dim": 32,
        "first_k_dense_replace": 1,
        "num_experts": 8,
        "num_shared_experts": 1,
        "score_function": "sigmoid",
        "router_dtype": "fp32",
        "moe_router_enable_expert_bias": True,
        "use_qk_norm": True,
        "use_qkv_bias": False,
        "use_bias": False,
        "partial_rotary_factor": 0.5,
        "embedding_dropout": 0.0,
        "output_dropout": 0.0,
        "num_nextn_predict_layers": 1,
    },
    "bailing_moe": SIZES
    | EXPERTS
    | {
        "architectures": ["BailingMoeForCausalLM"],
        "model_type": "bailing_moe",
        "first_k_dense_replace": 0,
        "num_experts": 8,
        "num_shared_experts": 2,
        "norm_head": True,
        "norm_softmax": False,
        "use_bias": False,
        "use_qkv_bias": False,
        "embedding_dropout": 0.0,
        "output_dropout": 0.0,
    },
    "qwen3_moe": SIZES
    | EXPERTS
    | QWEN
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "qwen3": SIZES | QWEN,
    "qwen3_tied": SIZES | QWEN | {"tie_word_embeddings": True},
    "qwen2": SIZES | QWEN2,
    "qwen2_tied": SIZES | QWEN2 | {"tie_word_embeddings": True},
    "deepseek_v3": SIZES | EXPERTS | DEEPSEEK | {"rope_scaling": None},
    "deepseek_v3_yarn": SIZES | EXPERTS | DEEPSEEK | {"rope_scaling": YARN},
    "deepseek_v3_direct": SIZES | EXPERTS | DEEPSEEK | {"rope_scaling": None, "q_lora_rank": None},
}


def tiny_model(family: str, **overrides: Any) -> ModelConfig:
    return model_of(TINY[family] | overrides)


def model_of(config: Mapping[str, Any]) -> ModelConfig:
    return ModelConfig.model_validate(model_values(config) | {"init_std": config["initializer_range"]})


def random_tensors(model: ModelConfig, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Norms around 1, small biases (so that an expert bias changes routing), everything else N(0, init_std), fp32."""
    for parameter in names_of(model).parameters.values():
        for name, shape in zip(parameter.hf, parameter.shapes, strict=True):
            source = parameter.source if parameter.rule.copy else name
            digest = hashlib.blake2b(f"{seed} {source}".encode(), digest_size=7).digest()
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(digest, "little")))
            if name.endswith("bias"):
                yield name, 0.1 * noise
            elif len(shape) == 1:
                yield name, 1 + 0.1 * noise
            else:
                yield name, model.init_std * noise


def write_family(path: Path, family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """Write config.json and model.safetensors; expert biases stay fp32 in every dtype. `overrides` replace keys of config.json."""
    config = TINY[family] | overrides | {"torch_dtype": str(dtype).removeprefix("torch.")}
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    tensors = {
        name: tensor if name.endswith(("expert_bias", "e_score_correction_bias")) else tensor.to(dtype)
        for name, tensor in random_tensors(model_of(config), seed)
    }
    save_file(tensors, str(path / "model.safetensors"), metadata={"format": "pt"})
    return path
