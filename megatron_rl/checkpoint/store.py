"""Saves and restores a run: the policy's state by Megatron's distributed checkpointing, the loop's as JSON beside it.

Invariants:
- a step is committed by rank 0 after every rank has written its part;
- weights that are not finite are not saved: the older checkpoints are what a run can go on from;
- a file that is not what was written is named before anything of it is loaded;
- an error on one rank is raised on all, none is left waiting;
- a checkpoint restores at any layout of the same model; at its own world size with the random states, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_rl.checkpoint import disk, writer
from megatron_rl.checkpoint.intact import check_files_together
from megatron_rl.checkpoint.megatron_state import Trainable, apply_state, describe, sharded_state
from megatron_rl.checkpoint.weights import load
from megatron_rl.config.errors import UserError
from megatron_rl.ports import Ranks


class CheckpointStore:
    """`ports.Store`. `export` is handed in: the resharding room knows Hugging Face checkpoints."""

    def __init__(self, folder: Path, policy: Trainable, ranks: Ranks, keep: int, export: Callable[[Path], None]) -> None:
        self._folder, self._policy, self._ranks, self._keep, self._export = folder, policy, ranks, keep, export

    def save(self, step: int, trainer: Mapping[str, Any]) -> Path:
        final = self._folder / f"step_{step}"
        building = final.with_suffix(".tmp")
        self._refuse_what_is_not_finite(final)
        sharded, common = writer.split(sharded_state(self._policy, loading=False))
        self._on_rank_0(lambda: disk.begin(building, trainer, partial(writer.write_common, common)), f"beginning {final}")
        failure: CheckpointException | None = None
        try:
            writer.write_sharded(sharded, building)
        except CheckpointException as raised:  # on all ranks, if on one
            failure = raised
        self._on_rank_0(lambda: disk.commit(building, step, self._writer(), failure), f"committing {final}")
        self._on_rank_0(lambda: disk.prune(self._folder, self._keep), f"removing old checkpoints from {self._folder}")
        return final

    def restore(self) -> tuple[int, dict[str, Any]] | None:
        found: disk.Found | None = self._on_rank_0(lambda: disk.newest(self._folder), f"looking for a checkpoint in {self._folder}")
        if found is None:
            return None
        now, then = self._writer(), found.writer
        ours, theirs = now["model"], then["model"]
        if wrong := [f"{key}={ours[key]} (there: {theirs[key]})" for key in theirs if ours[key] != theirs[key]]:
            raise UserError(f"{found.folder} is of another model: {', '.join(wrong)}", exit_code=1)
        check_files_together(found.folder)
        state = sharded_state(self._policy, loading=True, rng=then["world_size"] == now["world_size"])
        apply_state(self._policy, load(state, found.folder))
        return found.step, found.trainer

    def export_hf(self, path: Path) -> None:
        self._export(path)

    def _writer(self) -> dict[str, Any]:
        return {"world_size": self._ranks.world_size, "model": describe(self._policy)}

    def _refuse_what_is_not_finite(self, final: Path) -> None:
        """*Collective*"""
        weights = self._policy.weights()
        finite = torch.stack([tensor.isfinite().all() for tensor in weights.values()]).tolist()
        mine = next((name for name, is_finite in zip(weights, finite, strict=True) if not is_finite), None)
        names: list[str | None] = [None] * self._ranks.world_size
        dist.all_gather_object(names, mine)
        for rank, name in enumerate(names):
            if name:
                wrong = f"{name} is not finite on rank {rank}"
                raise UserError(f"{final}: not saved: {wrong}; older checkpoints are as they were", exit_code=1)

    def _on_rank_0(self, act: Callable[[], Any], what: str) -> Any:
        """*Collective*: rank 0 works on the disk; every rank gets its result or raises its error."""
        result, error, told = None, None, None
        if self._ranks.rank == 0:
            try:
                result = act()
            except Exception as raised:
                error = raised
                told = raised if isinstance(raised, UserError) else RuntimeError(f"rank 0, {what}: {raised!r}")
        result, told = self._ranks.broadcast((result, told), what)
        if told is not None:
            raise error or told
        return result
