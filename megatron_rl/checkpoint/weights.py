"""A model's weights from a Megatron-Core distributed checkpoint, at any layout.

Invariants: nothing of an optimizer is read; an unreadable checkpoint is one error on all ranks. The `_extra_state` of Transformer
Engine's layers stays as it is: it is empty without FP8 training, and the layers of another build do not have it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.api import CheckpointException

from megatron_rl.config.errors import UserError


def sharded_weights(chunks: Iterable[Any]) -> dict[str, dict[str, Any]]:
    """By chunk and name, where this rank's weights lie in a checkpoint, and they themselves. Chunks may be wrapped."""
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    models = (unwrap_model(chunk) for chunk in chunks)
    return {f"model{i}": model.sharded_state_dict(metadata=metadata) for i, model in enumerate(models)}


def load_weights(chunks: Iterable[Any], folder: Path) -> None:
    """*Collective*: what `convert.hf_to_megatron` or a run's checkpoint holds, into live storage."""
    chunks = list(chunks)
    wanted = sharded_weights(chunks)
    kept: dict[str, dict[str, Any]] = {chunk: {} for chunk in wanted}
    for chunk, values in wanted.items():
        for name in [name for name, value in values.items() if isinstance(value, ShardedObject)]:
            kept[chunk][name] = values.pop(name).data
    loaded = load(wanted, folder)
    for i, chunk in enumerate(chunks):
        unwrap_model(chunk).load_state_dict(loaded[f"model{i}"] | kept[f"model{i}"])


def load(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """*Collective*"""
    try:
        return dist_checkpointing.load(state, str(folder))
    except (CheckpointingException, CheckpointException, KeyError, OSError, RuntimeError) as error:  # torch's is a BaseException
        raise UserError(f"{folder}: cannot load it: {_line(error)}", exit_code=1) from error


def _line(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        rank, (first, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {first}".splitlines()[0]
    return str(error).splitlines()[0]
