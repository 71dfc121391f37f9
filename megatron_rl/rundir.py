"""The run directory: one owner at a time, its configuration and its outcome on record."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from megatron_rl.config import RlRun, SftRun, UserError


def make(key: str, path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{key}={path}: {error.strerror}", exit_code=1) from None


@contextmanager
def owned(key: str, path: Path) -> Iterator[None]:
    """Hold the directory until the process ends, however it ends. Raises UserError while another process holds it."""
    make(key, path)
    try:
        lock = (path / ".lock").open("a+")
    except OSError as error:
        raise UserError(f"{key}={path}: {error.strerror}", exit_code=1) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UserError(f"{key}={path}: in use by process {lock.read().strip() or '?'}", exit_code=1) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def record(path: Path, config: RlRun | SftRun) -> None:
    """Write config.yaml. Raises UserError if the directory holds a run of another model, or `resume` does not fit its state."""
    steps = sorted((path / "checkpoints").glob("step_*[0-9]"))
    if config.resume is True and not steps:
        raise UserError(f"resume=true: no checkpoint in {path / 'checkpoints'}", exit_code=1)
    if config.resume is False and steps:
        raise UserError(f"resume=false: {path} already holds {len(steps)} checkpoints; give run.dir a new name", exit_code=1)
    values = config.model_dump(mode="json", exclude={"engine": {"api_key"}})
    file = path / "config.yaml"
    if file.exists() and steps:
        try:
            before = yaml.safe_load(file.read_text())["model"]
        except (yaml.YAMLError, TypeError, KeyError):
            raise UserError(f"{file}: not a run's configuration; remove it to go on with the one given", exit_code=1) from None
        changed = [key for key, value in values["model"].items() if key != "init_from" and before.get(key) != value]
        if changed:
            raise UserError(f"model.{changed[0]}: differs from that of the run in {path}; give run.dir a new name")
    partial = file.with_suffix(".yaml.tmp")
    partial.write_text(yaml.safe_dump(values, sort_keys=False))
    partial.replace(file)


def write_summary(folder: Path, values: dict[str, Any]) -> None:
    partial = folder / "summary.json.tmp"
    partial.write_text(json.dumps(values, indent=2) + "\n")
    partial.replace(folder / "summary.json")
