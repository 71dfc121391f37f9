"""A policy's training state as Megatron's sharded state dict, and back.

Keys, shapes and offsets are global, so that a checkpoint written at one layout (TP, PP, VPP, EP, ETP, DP; distributed optimizer
or not) loads at any other. Megatron's own `optimizer.sharded_state_dict` would not: it also stores a list of optimizers and their
parameter groups, which differ with EP > 1 (optimizer/optimizer.py:1221), and its loader shares one step tensor between all
parameters (optimizer/distrib_optimizer.py:822), so that AdamW counts every parameter as a step. What a parameter group holds is
configuration; only the step count is state, and it is stored once.

Invariants:
- a restored run goes on bit for bit as the uninterrupted one at the same layout in fp32;
- every parameter owns its step.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

MOMENTS = ("exp_avg", "exp_avg_sq")


class Trainable(Protocol):
    """What a checkpoint holds of a policy."""

    chunks: list[Any]  # this rank's model chunks, wrapped in DDP or not
    optimizer: Any  # a MegatronOptimizer
    updates: int  # optimizer steps taken; the learning rate follows from it
    vocab_size: int  # without padding

    def weights(self) -> Mapping[str, torch.Tensor]: ...


def sharded_state(policy: Trainable, *, loading: bool, rng: bool = True) -> dict[str, Any]:
    """*Collective*. What a checkpoint holds, with where every part of it lies in the whole; refers to live storage."""
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    state = {f"model{i}": model.sharded_state_dict(metadata=metadata) for i, model in enumerate(_models(policy))}
    model_shards = dict(state)
    for i, part in enumerate(_optimizers(policy)):
        _ensure_state(part)
        if isinstance(part, DistributedOptimizer):
            state[f"optimizer{i}"] = part.sharded_param_state_fully_reshardable(model_shards, loading, metadata)
        else:
            state[f"optimizer{i}"] = [
                {name: make_sharded_optimizer_tensor(shard, tensor, f"optimizer.state.{name}") for name, tensor in tensors.items()}
                for shard, tensors in _plain_state(part, model_shards)
            ]
    if rng:
        state["rng"] = ShardedObject("rng", _rng_state(), (dist.get_world_size(),), (dist.get_rank(),), replica_id=0)
    if not loading:
        state |= {"updates": policy.updates, "adam_step": _adam_step(_optimizers(policy))}
        if scale := _loss_scale(policy):
            state["loss_scale"] = scale.state_dict()
    return state


def apply_state(policy: Trainable, state: dict[str, Any]) -> None:
    """Take over what `dist_checkpointing.load` made of `sharded_state(policy, loading=True)`."""
    for i, model in enumerate(_models(policy)):
        model.load_state_dict(state[f"model{i}"])
    for i, part in enumerate(_optimizers(policy)):
        loaded = state[f"optimizer{i}"]
        if isinstance(part, DistributedOptimizer):
            _without_steps(part)  # :940 expects every key of the state in what it copies from, and :2101 leaves the step out
            part.load_parameter_state_from_fully_reshardable(loaded)
        else:
            sharded = {f"model{j}": model.sharded_state_dict() for j, model in enumerate(_models(policy))}
            for (_, tensors), values in zip(_plain_state(part, sharded), loaded, strict=True):
                for name, tensor in tensors.items():
                    tensor.data.copy_(values[name])
        _set_adam_step(part, state["adam_step"])
    policy.updates = state["updates"]
    if (scale := _loss_scale(policy)) and "loss_scale" in state:  # what was written in another dtype has none
        scale.load_state_dict(state["loss_scale"])
    if "rng" in state:
        _set_rng_state(state["rng"])


def describe(policy: Trainable) -> dict[str, Any]:
    """The model's sizes. Loading would not notice another vocabulary (Megatron pads it) or fewer layers (keys not asked for)."""
    model = next(_models(policy))
    sizes = {name: getattr(model.config, name) for name in _SIZES}
    return {"vocab_size": policy.vocab_size} | sizes


_SIZES = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "ffn_hidden_size",
    "num_moe_experts",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
)


def _models(policy: Trainable) -> Iterator[Any]:
    for chunk in policy.chunks:
        while hasattr(chunk, "module"):  # DDP, Float16Module
            chunk = chunk.module
        yield chunk


def _optimizers(policy: Trainable) -> Iterator[Any]:
    """One, or with EP > 1 one for the experts and one for the rest; without those that have no parameters on this rank."""
    for part in getattr(policy.optimizer, "chained_optimizers", [policy.optimizer]):
        if not part.is_stub_optimizer:
            yield part


def _loss_scale(policy: Trainable) -> Any:
    """Of fp16 training, one for all parts; else None."""
    return next((scale for part in _optimizers(policy) if (scale := getattr(part, "grad_scaler", None))), None)


def _plain_state(part: Any, model_shards: dict[str, Any]) -> Iterator[tuple[Any, dict[str, torch.Tensor]]]:
    """Of an optimizer that is not distributed: the model's shards and the optimizer's tensors for each."""
    shards, _ = extract_sharded_tensors_and_factories(model_shards)
    for shard in nested_values(shards):
        main = getattr(shard.data, "main_param", shard.data)  # the fp32 copy of a bf16 parameter, optimizer/optimizer.py:683
        if main in part.optimizer.state:
            yield shard, {"param": main} | {name: part.optimizer.state[main][name] for name in MOMENTS}


def _ensure_state(part: Any) -> None:
    """Adam makes its state in the first step; before it, zeros are that state."""
    params = [param for group in part.optimizer.param_groups for param in group["params"]]
    new = [param for param in params if not part.optimizer.state[param]]
    for param in new:
        part.optimizer.state[param] = {name: torch.zeros_like(param, dtype=torch.float32) for name in MOMENTS}
    if new:
        _set_adam_step(part, _adam_step([part]))


def _without_steps(part: Any) -> None:
    for state in part.optimizer.state.values():
        state.pop("step", None)


def _adam_step(parts: Iterable[Any]) -> int:
    """torch keeps the step per parameter, Transformer Engine and Apex per group."""
    steps = {0}
    for part in parts:
        steps |= {int(entry["step"]) for entry in (*part.optimizer.state.values(), *part.optimizer.param_groups) if "step" in entry}
    return max(steps)


def _set_adam_step(part: Any, step: int) -> None:
    if isinstance(part.optimizer, torch.optim.Optimizer) and type(part.optimizer).__module__.startswith("torch."):
        for state in part.optimizer.state.values():
            state["step"] = torch.tensor(float(step))
    else:
        for group in part.optimizer.param_groups:
            group["step"] = step


def _rng_state() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "cpu": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    torch.set_rng_state(state["cpu"])
    torch.cuda.set_rng_state(state["device"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])
