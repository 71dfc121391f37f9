"""A small BailingMoeV2 checkpoint in Hugging Face's layout, with seeded random weights and no tokenizer.

    path = write_checkpoint(tmp_path / "hf", seed=0)          # conf/model/tiny_ling.yaml's shapes
    weights = random_weights(dict(TINY_CONFIG), seed=1)       # other weights for the same model, by Hugging Face name

Invariants: the same seed gives the same bytes; names and shapes are those of Ling-mini-2.0's checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_rl.types import Manifest, TensorSpec

TINY_CONFIG: dict[str, Any] = {
    "architectures": ["BailingMoeV2ForCausalLM"],
    "model_type": "bailing_moe_v2",
    "vocab_size": 64,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 384,
    "first_k_dense_replace": 1,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "num_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "score_function": "sigmoid",
    "router_dtype": "fp32",
    "moe_router_enable_expert_bias": True,
    "use_qk_norm": True,
    "use_qkv_bias": False,
    "use_bias": False,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "partial_rotary_factor": 0.5,
    "rope_theta": 600000.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 600000.0, "partial_rotary_factor": 0.5},
    "embedding_dropout": 0.0,
    "attention_dropout": 0.0,
    "output_dropout": 0.0,
    "num_nextn_predict_layers": 0,
    "tie_word_embeddings": False,
    "initializer_range": 0.05,
    "dtype": "float32",
    "pad_token_id": 0,
    "eos_token_id": 1,
}


def weight_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint, in its order."""
    hidden, heads, kv, dim = (config[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"))
    shapes: dict[str, tuple[int, ...]] = {"model.word_embeddings.weight": (config["vocab_size"], hidden)}

    def mlp(prefix: str, width: int) -> None:
        shapes[f"{prefix}.gate_proj.weight"] = (width, hidden)
        shapes[f"{prefix}.up_proj.weight"] = (width, hidden)
        shapes[f"{prefix}.down_proj.weight"] = (hidden, width)

    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.attention.query_key_value.weight"] = ((heads + 2 * kv) * dim, hidden)
        shapes[f"{layer}.attention.query_layernorm.weight"] = (dim,)
        shapes[f"{layer}.attention.key_layernorm.weight"] = (dim,)
        shapes[f"{layer}.attention.dense.weight"] = (hidden, heads * dim)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        if i < config["first_k_dense_replace"]:
            mlp(f"{layer}.mlp", config["intermediate_size"])
            continue
        shapes[f"{layer}.mlp.gate.weight"] = (config["num_experts"], hidden)
        shapes[f"{layer}.mlp.gate.expert_bias"] = (config["num_experts"],)
        for expert in range(config["num_experts"]):
            mlp(f"{layer}.mlp.experts.{expert}", config["moe_intermediate_size"])
        mlp(f"{layer}.mlp.shared_experts", config["moe_intermediate_size"] * config["num_shared_experts"])
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def random_weights(config: Mapping[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Norms around 1, a small expert bias (so that it changes routing), everything else N(0, initializer_range), fp32."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in weight_shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            weights[name] = 1 + 0.1 * noise
        elif name.endswith("expert_bias"):
            weights[name] = 0.1 * noise
        else:
            weights[name] = config["initializer_range"] * noise
    return weights


def manifest_of(*buckets: Sequence[tuple[str, torch.Tensor]]) -> Manifest:
    """What a push of these tensors announces."""
    return [[TensorSpec(name, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in bucket] for bucket in buckets]


def write_checkpoint(path: Path, seed: int = 0, **overrides: Any) -> Path:
    """Write config.json and model.safetensors; `overrides` replace keys of TINY_CONFIG."""
    config = TINY_CONFIG | overrides
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file(random_weights(config, seed), str(path / "model.safetensors"), metadata={"format": "pt"})
    return path
