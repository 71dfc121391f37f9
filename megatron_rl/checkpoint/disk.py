"""The folders of a run's checkpoints; one process works here.

    step_N/manifest.json   step, what wrote it (model, world size), every file with its size, small ones with a CRC-32
           trainer.json    what the loop wants to find again (scheduler, partial rollouts, cursors)
           *.distcp, ...   Megatron's distributed checkpoint of model, optimizer and RNG

Invariants:
- a folder named `step_N` was written by all ranks, is on disk, and is never changed: it appears by one rename, after everything
  else, and leaves by one rename before anything is deleted; what a killed run leaves is named `.tmp` or `.old`;
- a save that fails leaves the older checkpoints as they were and no other trace;
- the newest checkpoint is the one to go on from; if a file of it is missing or cut, the error names it and says what can be done.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from megatron_rl.config.errors import UserError

MANIFEST, TRAINER = "manifest.json", "trainer.json"
SHARDS = ".distcp"  # which carry checksums of their own (intact.py)


@dataclass(frozen=True)
class Found:
    """A complete checkpoint."""

    step: int
    folder: Path
    writer: dict[str, Any]
    trainer: dict[str, Any]


def newest(folder: Path) -> Found | None:
    """The checkpoint to go on from. Clears away what a killed run left; raises UserError if the newest checkpoint is torn."""
    for old in folder.glob("step_*.old"):  # replaced by one of the same step, or about to be
        if not old.with_suffix("").exists():
            old.rename(old.with_suffix(""))
    for leftover in (*folder.glob("step_*.tmp"), *folder.glob("step_*.old")):
        shutil.rmtree(leftover)
    steps = _steps(folder)
    if not steps:
        return None
    try:
        return _examine(folder / f"step_{steps[-1]}")
    except UserError as torn:
        older = next((step for step in reversed(steps[:-1]) if _is_complete(folder / f"step_{step}")), None)
        then = f"go on from step {older}" if older is not None else "start anew (there is no older complete checkpoint)"
        raise UserError(f"{torn}; remove {folder / f'step_{steps[-1]}'} to {then}", exit_code=1) from None


def _steps(folder: Path) -> list[int]:
    return sorted(int(match[1]) for path in folder.glob("step_*") if (match := re.fullmatch(r"step_(\d+)", path.name)))


def _examine(folder: Path) -> Found:
    manifest = _json(folder / MANIFEST)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict) or {"step", "writer"} - set(manifest):
        raise UserError(f"{folder / MANIFEST} is not a checkpoint's manifest", exit_code=1)
    for name, size in manifest["files"].items():
        file = folder / name
        if not file.exists():
            raise UserError(f"{file} is missing", exit_code=1)
        if file.stat().st_size != size:
            raise UserError(f"{file} has {file.stat().st_size} bytes instead of {size}", exit_code=1)
    found = Found(manifest["step"], folder, manifest["writer"], _json(folder / TRAINER))
    for name, crc in manifest.get("crc32", {}).items():
        if zlib.crc32((folder / name).read_bytes()) != crc:
            raise UserError(f"{folder / name} is damaged: its bytes are not what was written", exit_code=1)
    return found


def _is_complete(folder: Path) -> bool:
    try:
        _examine(folder)
    except UserError:
        return False
    return True


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{file} is missing", exit_code=1) from None
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}", exit_code=1) from None


def begin(building: Path, trainer: Mapping[str, Any], write_common: Callable[[Path], None]) -> None:
    """Start the checkpoint that `commit` will make one."""
    with _full_disk(building):
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        (building / TRAINER).write_text(json.dumps(trainer))
        write_common(building)


def commit(building: Path, step: int, writer: Mapping[str, Any], failure: CheckpointException | None = None) -> None:
    """All ranks have written, or failed to: the checkpoint appears, or nothing of it stays."""
    final, old = building.with_suffix(""), building.with_suffix(".old")
    with _full_disk(building):
        if failure:
            raise failure
        files = sorted(building.iterdir())
        manifest = {
            "step": step,
            "writer": writer,
            "files": {file.name: file.stat().st_size for file in files},
            "crc32": {file.name: zlib.crc32(file.read_bytes()) for file in files if file.suffix != SHARDS},
        }
        (building / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        for path in (*building.iterdir(), building):
            fsync(path)
        if final.exists():
            final.rename(old)
        building.rename(final)
        fsync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def prune(folder: Path, keep: int) -> None:
    for step in _steps(folder)[:-keep]:
        leaving = (folder / f"step_{step}").rename(folder / f"step_{step}.tmp")
        shutil.rmtree(leaving)


@contextmanager
def _full_disk(building: Path) -> Iterator[None]:
    """One clear line where writing fails, and nothing left of the attempt."""
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:  # torch's is a BaseException
        message = f"{building.with_suffix('')}: cannot write the checkpoint: {why(building, error)}; older ones are as they were"
        shutil.rmtree(building, ignore_errors=True)
        raise UserError(message, exit_code=1) from error


def why(building: Path, error: BaseException) -> str:
    """torch's writer hides the system's reason (inline_container.cc: "unexpected pos"); asking the system again tells it."""
    probe = building / "probe"
    try:
        probe.write_bytes(bytes(1 << 20))
    except OSError as reason:
        return str(reason.strerror)
    finally:
        probe.unlink(missing_ok=True)
    if isinstance(error, CheckpointException):
        rank, (first, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {first}".splitlines()[0]
    return str(error).splitlines()[0]


def fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
