"""Bytes on one GPU by kind, in each of the three phases that share it.

A run in bfloat16 holds weights (2 bytes a parameter), gradients in fp32 (4), and as optimizer state the fp32 weights and Adam's two
moments (12, over the data-parallel ranks with `parallel.distributed_optimizer`); in float32 the weights are their own main copy, so
the state is 8. Frozen parameters have weights only.

    train      weights, gradients, optimizer, activations
    sync       weights, engine weights, buckets
    generate   engine weights, KV cache, and what an offloaded policy cannot give back

Invariant: weights, gradients and optimizer are those of a real run, but for alignment (64 elements a parameter).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from megatron_rl.config.model import ModelConfig, ParallelConfig
from megatron_rl.config.plan import PlanRun
from megatron_rl.planning.parameters import Census, Held

Phase = Literal["train", "sync", "generate"]
FP8 = 1 + 4 / 128**2  # bytes of an element, with its share of a block's fp32 scale


@dataclass(frozen=True)
class PolicyBytes:
    weights: float
    gradients: float
    optimizer: float
    fixed: float  # of the weights, what stays on the device when the policy is offloaded


def item_bytes(model: ModelConfig) -> int:
    return 4 if model.dtype == "float32" else 2  # auto: planned for CUDA


def policy_bytes(held: Held, parallel: ParallelConfig, world_size: int, item: int) -> PolicyBytes:
    """`item`: bytes of a weight."""
    state = 12 if item == 2 else 8
    replicas, expert_replicas = 1, 1
    if parallel.distributed_optimizer:
        replicas = world_size // (parallel.tp * parallel.pp)  # with CP: its ranks hold the same weights
        expert_replicas = world_size // (parallel.etp * parallel.ep * parallel.pp)
    unmoved = held.frozen if parallel.distributed_optimizer else held.parameters  # Megatron moves the buffers it made itself
    return PolicyBytes(
        weights=item * held.parameters + 4 * held.buffers,
        gradients=4 * held.trained,
        optimizer=state * (held.dense / replicas + held.experts / expert_replicas),
        fixed=item * unmoved + 4 * held.buffers,
    )


@dataclass(frozen=True)
class Engine:
    """One SGLang server's rank, and a weight sync to it."""

    tp: int
    weights: float
    kv_per_token: float


def engine_of(run: PlanRun, census: Census, tp: int) -> Engine:
    """SGLang splits vocabulary, attention and every MLP over TP; norms, routers and latents it repeats."""
    model = run.model
    item = 4 if run.engine.dtype == "float32" else 2
    linear = FP8 if run.engine.sync.quantize == "fp8" else item
    tensors = census.layers + census.mtp
    vocabulary = (2 - model.tie_embeddings) * model.padded_vocab_size(tp) / tp * model.hidden_size
    latents = _latent_linears(model)
    weights = linear * ((tensors.tp + tensors.experts) / tp + latents) + item * (vocabulary + tensors.replicated - latents)
    if model.mla:  # one latent for all heads, on every rank
        kv = model.mla.kv_lora_rank + model.mla.qk_rope_head_dim
    else:
        kv = 2 * math.ceil(model.num_kv_heads / tp) * model.head_dim
    return Engine(tp, weights + 4 * tensors.buffers, 2 * kv * (model.num_layers))


def _latent_linears(model: ModelConfig) -> int:
    if model.mla is None:
        return 0
    rank = model.mla.kv_lora_rank + model.mla.qk_rope_head_dim + (model.mla.q_lora_rank or 0)
    return model.num_layers * model.hidden_size * rank


@dataclass(frozen=True)
class Usage:
    """Of the fullest rank in a phase, bytes by kind."""

    phase: Phase
    pipeline_rank: int
    kinds: dict[str, float] = field(hash=False)

    @property
    def total(self) -> float:
        return sum(self.kinds.values())

    def largest(self) -> list[str]:
        return sorted(self.kinds, key=lambda kind: -self.kinds[kind])
