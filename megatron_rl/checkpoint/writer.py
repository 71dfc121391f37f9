"""Writes a sharded state dict in Megatron's `torch_dist` format, in this process.

Megatron's writer (dist_checkpointing/strategies/filesystem_async.py) is made for asynchronous saves: a first one costs a fresh
Python process with all its imports (the queue's Manager, :44), every one forks a worker per file, and an exception in a worker
arrives without its type. The format is torch's, so torch's own writer does; a save of a small model took 0.3 s instead of 5 s.
This can go when Megatron offers a synchronous writer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.serialization import get_default_save_common_strategy
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

Sharded = dict[str, Any]


def split(state: Sharded) -> tuple[Sharded, Sharded]:
    """The sharded part and the part that is the same on every rank."""
    return save_preprocess(state, validate_access_integrity=False)


def write_common(common: Sharded, folder: Path) -> None:
    """Rank 0's part of `dist_checkpointing.save`."""
    get_default_save_common_strategy().save_common(common, str(folder))
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))


def write_sharded(sharded: Sharded, folder: Path) -> None:
    """*Collective*: one file per rank that has anything to write, synced to disk. An error of one is CheckpointException on all."""
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    save(
        mcore_to_pyt_state_dict(by_key),
        storage_writer=FileSystemWriter(folder, thread_count=1),
        planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
    )
