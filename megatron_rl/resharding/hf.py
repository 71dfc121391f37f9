"""Hugging Face checkpoints: into a sharded policy, and out of one.

Replicas share the reading: each tensor is read by one of the ranks that hold the same of it and broadcast to the others, so that a
start of many replicas asks a file system for every byte once. (What all tensor-parallel ranks hold whole, norms and routers, each
of them reads.)

Invariants:
- a rank reads ranges that it holds and nothing else; ranks of one data-parallel group read none twice;
- nothing changes before the whole checkpoint is found to be right (hf_source.py), and a wrong one is the same error on all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_rl.config.errors import UserError
from megatron_rl.config.model import ModelConfig, ParallelConfig
from megatron_rl.ports import Ranks
from megatron_rl.resharding.execute import Resharder
from megatron_rl.resharding.families import FP32_LM_HEAD, family_of, names_of
from megatron_rl.resharding.hf_source import HfSource
from megatron_rl.resharding.hf_target import write_hf
from megatron_rl.resharding.plan import spans_of


def hf_config(model: ModelConfig, *, dtype: str, eos_token_id: int, pad_token_id: int) -> dict[str, Any]:
    """What the model's config.json says."""
    tokens = {"eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    numerics = {"dtype": dtype} | ({FP32_LM_HEAD: True} if model.fp32_lm_head else {})
    return family_of(model).to_hf_config(model) | tokens | numerics


@torch.no_grad()
def load_hf(
    path: Path,
    weights: Mapping[str, torch.Tensor],
    model: ModelConfig,
    parallel: ParallelConfig,
    rank: int,
    ranks: Ranks | None = None,
) -> None:
    """Copy a checkpoint into this rank's shards (live storage), converting to their dtype. *Collective* where `ranks` are given."""
    source = _checked_on_rank_0(path, model, ranks) if ranks else HfSource(path, model)
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    sent = []
    for number, (name, parameter, spans) in enumerate(spans_of(names_of(model), parallel, rank, shapes)):
        group = _replicas(name) if ranks else None
        reader = number % group.size() if group else 0
        if group is None or group.rank() == reader:
            source.fill(weights[name], parameter, spans)
        if group is not None and group.size() > 1:
            sent.append(dist.broadcast(weights[name], group=group, group_src=reader, async_op=True))
    for work in sent:
        work.wait()
    source.close()


def export_hf(resharder: Resharder, path: Path, rank: int, config: Mapping[str, Any], files: Sequence[Path] = ()) -> None:
    """*Collective*: the policy's present weights as a checkpoint, one file per bucket, with `files` (the tokenizer's) beside it."""
    resharder.deliver(write_hf(path, config, files) if rank == 0 else None)


def _replicas(name: str) -> dist.ProcessGroup:
    """The ranks that hold the same shard of a parameter, under the same name."""
    from megatron.core import parallel_state as mpu

    if ".experts." in name:
        return mpu.get_expert_data_parallel_group()
    return mpu.get_data_parallel_group(with_context_parallel=True)


def _checked_on_rank_0(path: Path, model: ModelConfig, ranks: Ranks) -> HfSource:
    source, error = None, None
    if ranks.rank == 0:
        try:
            source = HfSource(path, model)
        except UserError as wrong:
            error = wrong
    source, error = ranks.broadcast((source, error), f"a look at {path}")
    if error:
        raise error
    assert source
    return source
