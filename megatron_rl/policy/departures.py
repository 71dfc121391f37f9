"""Where a model of ours departs from what Megatron-Core builds; applied once, to a chunk that has just been built.

Invariants: gradients of every parameter are those of one process, at any layout; the padding of a vocabulary is 0 and stays 0;
multi-token-prediction layers are part of the weights and of nothing that is computed; with `fp32_lm_head` logits are products of
fp32, whatever the model's dtype.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist

from megatron_rl.config.model import ModelConfig

SMALLEST_NORM = 1e-7  # of a column of the output layer; SGLang's models/bailing_moe.py has it, too


def apply(chunk: Any, model: ModelConfig) -> None:
    """`chunk`: a GPTModel, not yet wrapped."""
    _reduce_experts_over_their_own_replicas(chunk)
    _zero_padding(chunk, model)
    if model.mla:
        _replicate_down_projections(chunk)
    if model.norm_head and chunk.post_process:
        chunk.output_layer.register_forward_pre_hook(_with_normalised_columns, with_kwargs=True)
    if model.fp32_lm_head and chunk.post_process:
        chunk.output_layer.register_forward_pre_hook(_in_fp32, with_kwargs=True)
    if model.num_mtp_layers:
        _set_prediction_aside(chunk)


def _reduce_experts_over_their_own_replicas(chunk: Any) -> None:
    """layers.py:921 does so under EP > 1 only. Under EP = 1 and ETP < TP it would reduce the gradients of experts, which then see
    other tokens on every TP rank, over the replicas alone; and the optimizer's parts would depend on EP."""
    for name, parameter in chunk.named_parameters():
        if ".experts." in name:
            parameter.allreduce = False


@torch.no_grad()
def _zero_padding(chunk: Any, model: ModelConfig) -> None:
    """Padding has no gradient, so that what it holds stays; the norms of `norm_head` count it."""
    for name, parameter in chunk.named_parameters():
        if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            rank = chunk.pg_collection.tp.rank()
            parameter[max(0, model.vocab_size - rank * len(parameter)) :] = 0.0


class _ReplicatedLinear(torch.nn.Module):
    def __init__(self, config: Any, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(outputs, inputs, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # its gradient is summed over TP

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.nn.functional.linear(x, self.weight), None


def _replicate_down_projections(chunk: Any) -> None:
    """The local spec splits them over TP and gathers their output, but does not sum the gradients of the rotary keys over TP
    (multi_latent_attention.py:552). Transformer Engine's spec replicates them, and so do we."""
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention

    for attention in [module for module in chunk.modules() if isinstance(module, MLASelfAttention)]:
        for name in ("linear_q_down_proj", "linear_kv_down_proj"):
            split = getattr(attention, name, None)
            if isinstance(split, ColumnParallelLinear):
                with split.weight.device:
                    setattr(attention, name, _ReplicatedLinear(attention.config, split.input_size, split.output_size))


def _with_normalised_columns(layer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Columns of length 1 over the whole vocabulary; the length is no function of the weight to the gradient, as in the
    reference implementation of Ling-lite (inclusionAI/Ling, modeling_bailing_moe.py, `compute_logit`)."""
    squares_H = layer.weight.detach().float().square().sum(0)
    if layer.tp_group.size() > 1:
        dist.all_reduce(squares_H, group=layer.tp_group)
    weight = layer.weight / squares_H.sqrt().clamp_(min=SMALLEST_NORM).to(layer.weight.dtype)
    return args, kwargs | {"weight": weight}


def _in_fp32(layer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """As SGLang's logits_processor.py:969 does. `weight`: of a tied model the embedding, of `norm_head` the normalised."""
    hidden, *others = args
    weight = kwargs["weight"] if kwargs.get("weight") is not None else layer.weight
    return (hidden.float(), *others), kwargs | {"weight": weight.float()}


def _set_prediction_aside(chunk: Any) -> None:
    """RL has no loss for these layers: they are frozen, and the forward pass does not know them. Megatron would compute them
    whenever it has them (gpt_model.py:592, :611), from an embedding of their own on the last stage."""
    chunk.config = copy.copy(chunk.config)
    chunk.config.mtp_num_layers = None
    if not chunk.mtp_process:
        return
    chunk.mtp_process = False
    chunk.mtp.requires_grad_(False)
    if not chunk.pre_process:
        del chunk.embedding
