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

from megatron_rl.config.model import ModelConfig, ParallelConfig
from megatron_rl.policy import platform_cpu

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


def dtype_of(model: ModelConfig, device: torch.device) -> torch.dtype:
    if model.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if model.dtype == "bfloat16" else torch.float32


def has_transformer_engine(device: torch.device) -> bool:
    return device.type == "cuda" and importlib.util.find_spec("transformer_engine") is not None


def build_chunks(model: ModelConfig, parallel: ParallelConfig, device: torch.device) -> list[torch.nn.Module]:
    """This rank's model chunks, one per virtual pipeline stage, with Megatron's own initial weights."""
    platform_cpu.install()
    from megatron.core import parallel_state as mpu
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.module import Float16Module

    config = transformer_config(model, parallel, dtype_of(model, device), device)
    chunks: list[torch.nn.Module] = []
    for stage in range(parallel.vpp):
        vp_stage = stage if parallel.vpp > 1 else None
        chunk: Any = GPTModel(
            config=config,
            transformer_layer_spec=_block_spec(config, device, vp_stage),
            vocab_size=model.vocab_size,
            max_sequence_length=model.max_position_embeddings,
            pre_process=mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            share_embeddings_and_output_weights=model.tie_embeddings,
            position_embedding_type="rope" if has_transformer_engine(device) else "none",
            rotary_percent=model.rotary_percent,
            rotary_base=model.rotary_base,
            vp_stage=vp_stage,
        ).to(device)
        if config.bf16:
            chunk = Float16Module(config, chunk)
        for module in chunk.modules():
            if hasattr(module, "_maintain_float32_expert_bias"):
                module._maintain_float32_expert_bias()  # Float16Module rounds every buffer; later calls would keep what is left
        for name, parameter in chunk.named_parameters():
            if ".experts." in name:
                # layers.py:921 does so under EP > 1 only. Under EP = 1 and ETP < TP it would reduce the gradients of experts, which
                # then see other tokens on every TP rank, over the replicas alone; and the optimizer's parts would depend on EP.
                parameter.allreduce = False
        chunks.append(chunk)
    return chunks


def transformer_config(model: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype, device: torch.device) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    te = has_transformer_engine(device)
    return TransformerConfig(
        num_layers=model.num_layers,
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
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_std,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
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
        use_cpu_initialization=device.type == "cpu",
        calculate_per_token_loss=True,  # gradients are sums: neither microbatches nor replicas divide them
        persist_layer_norm=te,
        bias_activation_fusion=te,
        bias_dropout_fusion=te,
        apply_rope_fusion=te,
        gradient_accumulation_fusion=False,
        **(_moe_config(model, te) if model.moe else {}),
    )


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
        "moe_router_num_groups": moe.num_groups if grouped else None,
        "moe_router_group_topk": moe.topk_groups if grouped else None,
        "moe_router_topk_scaling_factor": moe.routed_scaling_factor,
        "moe_router_enable_expert_bias": moe.expert_bias,
        "moe_router_bias_update_rate": moe.expert_bias_update_rate,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",  # no hidden loss term
        "moe_token_dispatcher_type": "alltoall",  # the only one that takes replicas of different lengths
        "moe_grouped_gemm": te,
        "moe_permute_fusion": te,
    }


def _block_spec(config: Any, device: torch.device, vp_stage: int | None) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    te = has_transformer_engine(device)
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=te, normalization="RMSNorm", vp_stage=vp_stage)
    if not te:
        from megatron_rl.policy.attention import PackedAttention

        for layer in spec.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = PackedAttention
    return spec


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
    """Norms 1, expert biases 0, every matrix N(0, init_std) as Hugging Face's implementation has it."""
    for name, tensor in _tensors(chunks):
        if tensor.dim() == 1:
            tensor.fill_(0.0 if name.endswith("expert_bias") else 1.0)
            continue
        same = EMBEDDING if model.tie_embeddings and name == OUTPUT else name
        digest = hashlib.blake2b(f"{seed} {same}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        axis, shard, shards = _shard_of(name, tensor)
        shape = [n * shards if i == axis else n for i, n in enumerate(tensor.shape)]
        full = torch.randn(shape, generator=generator).mul_(model.init_std)
        halves = 2 if "linear_fc1" in name else 1  # gate and up, each of them sharded
        tensor.copy_(torch.cat([half.chunk(shards, axis)[shard] for half in full.chunk(halves)], axis))


def _shard_of(name: str, tensor: torch.Tensor) -> tuple[int, int, int]:
    """(axis, this rank's shard, shards)"""
    from megatron.core import parallel_state as mpu

    if not getattr(tensor, "tensor_model_parallel", False):
        return 0, 0, 1
    group = mpu.get_expert_tensor_parallel_group() if ".experts." in name else mpu.get_tensor_model_parallel_group()
    return tensor.partition_dim, group.rank(), group.size()  # type: ignore[attr-defined]
