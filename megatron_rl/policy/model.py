"""A ModelConfig as Megatron-Core model chunks, and their weights by global name.

On CUDA with Transformer Engine the layers are Transformer Engine's; elsewhere they are Megatron's local ones around our attention,
which also applies the rotary embedding.

Invariants: seeded initial weights are a function of (seed, global name) alone, whatever the layout; `weights` names every parameter
and persistent buffer that this rank holds, once, with global layer and expert numbers, and gives live storage; the expert bias is
fp32 in every dtype.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from megatron_rl.config.errors import UserError
from megatron_rl.config.model import ModelConfig, ParallelConfig
from megatron_rl.policy import departures, platform_cpu

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


def dtype_of(model: ModelConfig, device: torch.device) -> torch.dtype:
    if model.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, model.dtype)
    return dtype


def has_transformer_engine(device: torch.device) -> bool:
    return device.type == "cuda" and importlib.util.find_spec("transformer_engine") is not None


def build_chunks(model: ModelConfig, parallel: ParallelConfig, device: torch.device) -> list[torch.nn.Module]:
    """This rank's model chunks, one per virtual pipeline stage, with Megatron's own initial weights (none on the meta device)."""
    platform_cpu.install()
    from megatron.core import parallel_state as mpu
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.module import Float16Module

    config = transformer_config(model, parallel, dtype_of(model, device), device)
    chunks: list[torch.nn.Module] = []
    for stage in range(parallel.vpp):
        vp_stage = stage if parallel.vpp > 1 else None
        layers, prediction = _block_specs(config, device, vp_stage)
        with device:
            chunk: Any = GPTModel(
                config=config,
                transformer_layer_spec=layers,
                mtp_block_spec=prediction,
                vocab_size=model.padded_vocab_size(parallel.tp),
                max_sequence_length=model.max_position_embeddings,
                pre_process=mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
                post_process=mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
                share_embeddings_and_output_weights=model.tie_embeddings,
                position_embedding_type="rope" if has_transformer_engine(device) else "none",
                rotary_percent=model.rotary_percent,
                rotary_base=model.rotary_base,
                vp_stage=vp_stage,
            )
        departures.apply(chunk, model)
        if config.bf16 or config.fp16:
            chunk = Float16Module(config, chunk)
        for module in chunk.modules():
            if hasattr(module, "_maintain_float32_expert_bias"):
                module._maintain_float32_expert_bias()  # Float16Module rounds every buffer; later calls would keep what is left
        chunks.append(chunk)
    return chunks


def transformer_config(model: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype, device: torch.device) -> Any:
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    te = has_transformer_engine(device)
    return (MLATransformerConfig if model.mla else TransformerConfig)(
        num_layers=model.num_layers,
        mtp_num_layers=model.num_mtp_layers or None,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=model.rms_norm_eps,
        qk_layernorm=model.qk_norm,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        pipeline_model_parallel_layout=_layout(model, parallel),
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=parallel.etp,
        sequence_parallel=parallel.sequence_parallel and parallel.tp > 1,
        variable_seq_lengths=True,  # packed microbatches differ in length: pipeline stages exchange shapes first
        overlap_p2p_comm=parallel.vpp > 1,
        batch_p2p_comm=parallel.vpp == 1,  # batched and interleaved, two gloo stages exchange the wrong activations, silently
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu_initialization=device.type != "cuda",
        calculate_per_token_loss=True,  # gradients are sums: neither microbatches nor replicas divide them
        persist_layer_norm=te,
        bias_activation_fusion=te,
        bias_dropout_fusion=te,
        apply_rope_fusion=te and not (model.mla and not model.rope_scaling),  # transformer_config.py:2068
        gradient_accumulation_fusion=False,
        moe_token_dispatcher_type="alltoall",  # the only one that takes variable lengths (Megatron asks dense models, too)
        **(_moe_config(model, te) if model.moe else {}),
        **(_mla_config(model) if model.mla else {}),
        **_recompute(model, parallel, te),
    )


def _recompute(model: ModelConfig, parallel: ParallelConfig, te: bool) -> dict[str, Any]:
    kind = parallel.recompute
    if kind == "none":
        return {}
    if kind == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if kind == "selective" and not te:
        raise UserError("parallel.recompute=selective needs Transformer Engine on CUDA (tensor_parallel/random.py:589)")
    modules = (["layernorm"] + ["mla_up_proj"] * (model.mla is not None)) * te
    if kind == "selective":
        modules += ["moe_act"] * (model.moe is not None)
    else:
        modules += ["mlp"] + ["moe"] * (model.moe is not None)
    return {"recompute_granularity": "selective", "recompute_modules": modules}


def _layout(model: ModelConfig, parallel: ParallelConfig) -> list[list[str]] | None:
    """Of uneven stages, in Megatron's words (pipeline_parallel_layer_layout.py)."""
    if parallel.layers_per_stage is None or parallel.pp == 1:
        return None
    stages = [["decoder"] * layers for layers in parallel.layers_per_stage]
    stages[0].insert(0, "embedding")
    stages[-1] += ["mtp"] * model.num_mtp_layers + ["loss"]
    return stages


def _moe_config(model: ModelConfig, te: bool) -> dict[str, Any]:
    moe = model.moe
    assert moe
    grouped = moe.num_groups > 1
    return {
        "num_moe_experts": moe.num_experts,
        "moe_ffn_hidden_size": moe.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": moe.num_shared_experts * moe.ffn_hidden_size or None,
        "moe_layer_freq": [int(layer >= moe.first_dense_layers) for layer in range(model.num_layers)],
        "moe_router_topk": moe.top_k,
        "moe_router_score_function": moe.score_function,
        "moe_router_pre_softmax": moe.score_function == "softmax" and not moe.norm_topk_prob,
        "moe_router_num_groups": moe.num_groups if grouped else None,
        "moe_router_group_topk": moe.topk_groups if grouped else None,
        "moe_router_topk_scaling_factor": moe.routed_scaling_factor if moe.routed_scaling_factor != 1.0 else None,
        "moe_router_enable_expert_bias": moe.expert_bias,
        "moe_router_bias_update_rate": moe.expert_bias_update_rate,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",  # no hidden loss term
        "moe_grouped_gemm": te,
        "moe_permute_fusion": te,
    }


def _mla_config(model: ModelConfig) -> dict[str, Any]:
    mla, yarn = model.mla, model.rope_scaling
    assert mla
    scaling = yarn.model_dump() | {"rotary_scaling_factor": yarn.factor} if yarn else {"rotary_scaling_factor": 1.0}
    scaling.pop("factor", None)
    return {
        "q_lora_rank": mla.q_lora_rank,
        "kv_lora_rank": mla.kv_lora_rank,
        "qk_head_dim": mla.qk_nope_head_dim,
        "qk_pos_emb_head_dim": mla.qk_rope_head_dim,
        "v_head_dim": mla.v_head_dim,
        "rope_type": "yarn" if yarn else "rope",
        "rotary_base": model.rotary_base,
    } | scaling


def _block_specs(config: Any, device: torch.device, vp_stage: int | None) -> tuple[Any, Any]:
    """Of the decoder layers, and of the multi-token-prediction layers (None where this chunk has none)."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec

    te = has_transformer_engine(device)
    layers = get_gpt_decoder_block_spec(config, use_transformer_engine=te, normalization="RMSNorm", vp_stage=vp_stage)
    if not te:
        from megatron_rl.policy.attention import PackedAttention

        for layer in layers.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = PackedAttention
    return layers, get_gpt_mtp_block_spec(config, layers, te, vp_stage) if config.mtp_num_layers else None


def weights(chunks: Sequence[torch.nn.Module]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in _tensors(chunks)}


def _tensors(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    from megatron.core import parallel_state as mpu
    from megatron.core.utils import unwrap_model

    for chunk in chunks:
        model: Any = unwrap_model(chunk)
        layers = [layer.layer_number - 1 for layer in model.decoder.layers]
        experts = (model.config.num_moe_experts or 0) // model.config.expert_model_parallel_size
        numbers = _Numbers(layers, experts * mpu.get_expert_model_parallel_rank())
        buffers = ((name, tensor) for name, tensor in model.named_buffers() if name.endswith("expert_bias"))
        for name, tensor in (*model.named_parameters(), *buffers):
            yield numbers.globally(name), tensor


class _Numbers:
    """Megatron numbers a chunk's layers and a rank's experts from 0."""

    def __init__(self, layers: Sequence[int], first_expert: int) -> None:
        self._layers, self._first_expert = layers, first_expert

    def globally(self, name: str) -> str:
        name = _LAYER.sub(lambda match: f"{match[1]}{self._layers[int(match[2])]}.", name)
        return _EXPERT.sub(lambda match: f"{match[1]}{int(match[2]) + self._first_expert}", name)


_LAYER = re.compile(r"^(decoder\.layers\.)(\d+)\.")
_EXPERT = re.compile(r"(\.experts\.local_experts\.|\.experts\.linear_fc[12]\.weight)(\d+)")


@torch.no_grad()
def initialise(chunks: Sequence[torch.nn.Module], model: ModelConfig, seed: int) -> None:
    """Norms 1, biases and the padding of a vocabulary 0, every matrix N(0, init_std) as Hugging Face's implementations have it."""
    for name, tensor in _tensors(chunks):
        if tensor.dim() == 1:
            tensor.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        same = EMBEDDING if model.tie_embeddings and name == OUTPUT else name
        digest = hashlib.blake2b(f"{seed} {same}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        axis, shard, shards = _shard_of(name, tensor)
        shape = [n * shards if i == axis else n for i, n in enumerate(tensor.shape)]
        full = torch.randn(shape, generator=generator).mul_(model.init_std)
        if name in (EMBEDDING, OUTPUT):
            full[model.vocab_size :] = 0.0
        halves = 2 if "linear_fc1" in name else 1  # gate and up, each of them sharded
        tensor.copy_(torch.cat([half.chunk(shards, axis)[shard] for half in full.chunk(halves)], axis))


def _shard_of(name: str, tensor: torch.Tensor) -> tuple[int, int, int]:
    """(axis, this rank's shard, shards)"""
    from megatron.core import parallel_state as mpu

    if not getattr(tensor, "tensor_model_parallel", False):
        return 0, 0, 1
    group = mpu.get_expert_tensor_parallel_group() if ".experts." in name else mpu.get_tensor_model_parallel_group()
    return tensor.partition_dim, group.rank(), group.size()  # type: ignore[attr-defined]
