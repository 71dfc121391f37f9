"""Megatron's gradient buffers and optimizer around model chunks, and one step of them.

Invariant: an update with a gradient norm that is not finite changes neither weights nor optimizer state (but fp16's loss scale).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from megatron_rl.config.model import OptimizerConfig, ParallelConfig


def wrap(chunks: Sequence[Any], parallel: ParallelConfig) -> list[Any]:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        use_distributed_optimizer=parallel.distributed_optimizer,
    )
    wrapped = [
        DistributedDataParallel(chunk.config, config, chunk, disable_bucketing=number > 0) for number, chunk in enumerate(chunks)
    ]
    if parallel.overlap_grad_reduce:  # reduce once, while the last microbatch runs backwards
        no_sync = [chunk.no_sync for chunk in wrapped]
        chunks[0].config.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]
    return wrapped


def build_optimizer(chunks: Sequence[Any], optimizer: OptimizerConfig, parallel: ParallelConfig, dtype: torch.dtype) -> Any:
    from megatron.core.optimizer import OptimizerConfig as MegatronConfig
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.utils import get_model_config

    from megatron_rl.policy.loss_scale import LossScale

    config = MegatronConfig(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_eps=optimizer.eps,
        clip_grad=0.0,  # `update` clips
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        params_dtype=dtype,
        use_distributed_optimizer=parallel.distributed_optimizer,
    )
    built = get_megatron_optimizer(config, list(chunks), use_gloo_process_groups=False)
    for group in built.param_groups:
        if "fused" in group:  # torch's AdamW, which Megatron falls back to; on CPU it would go through the parameters seven times
            group["fused"] = True
    if dtype == torch.float16:
        scale = LossScale(optimizer.loss_scale_initial, optimizer.loss_scale_window)
        for part in built.chained_optimizers:
            part.grad_scaler = scale
        get_model_config(chunks[0]).grad_scale_func = built.scale_loss  # of the loss (schedules.py:478), and :284 of routers' terms
    return built


def loss_scale_of(optimizer: Any) -> Any:
    """A LossScale in fp16, else None."""
    return getattr(optimizer.chained_optimizers[0], "grad_scaler", None)


@torch.no_grad()
def update(optimizer: Any, lr: float, grad_clip: float) -> float:
    """The gradient norm before clipping. `MegatronOptimizer.step` in its parts: it clips by a norm of NaN, which spoils every
    weight, and checks for that with fp16's loss scaler only (optimizer.py:470)."""
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.prepare_grads()  # unscales them
    grad_norm: float = optimizer.get_grad_norm()
    if scale := loss_scale_of(optimizer):
        scale.after(overflow=not math.isfinite(grad_norm))
    if math.isfinite(grad_norm):
        for part in optimizer.chained_optimizers:
            if grad_clip > 0 and (parameters := part.get_parameters()):
                clip_grad_by_total_norm_fp32(parameters, grad_clip, grad_norm)
        optimizer.step_with_ready_grads()
    return grad_norm
