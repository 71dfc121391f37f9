"""The files of a Hugging Face checkpoint, written.

Invariants: a file is on disk when its function returns; a checkpoint written by `write_hf` is there completely or not at all,
whatever happens meanwhile.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from megatron_rl.config.errors import UserError
from megatron_rl.resharding.execute import Consume
from megatron_rl.resharding.gather import Tensors
from megatron_rl.resharding.hf_source import INDEX, SINGLE


def shard_name(number: int, count: int) -> str:
    """What Hugging Face readers expect: one file, or numbered ones with an index."""
    return SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def write_shard(file: Path, tensors: Tensors) -> None:
    save_file(dict(tensors), file, metadata={"format": "pt"})
    file.chmod(0o666 & ~_umask())  # safetensors makes its files readable by their owner alone
    fsync(file)


def write_facts(
    folder: Path, config: Mapping[str, Any], files: Sequence[Path], shards: Sequence[Sequence[str]], nbytes: int
) -> None:
    """config.json, the index of `shards` (names of tensors) where there are several, and copies of `files`."""
    written = [folder / "config.json", *(folder / file.name for file in files)]
    for file in files:
        shutil.copyfile(file, folder / file.name)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    if len(shards) > 1:
        where = {name: shard_name(number, len(shards)) for number, names in enumerate(shards) for name in names}
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": nbytes}, "weight_map": where}, indent=1) + "\n")
        written.append(folder / INDEX)
    for path in (*written, folder):
        fsync(path)


@contextmanager
def write_hf(path: Path, config: Mapping[str, Any], files: Sequence[Path] = ()) -> Iterator[Consume]:
    """Yields a function that writes its tensors as the next shard. A clean exit replaces `path`, an error leaves it alone."""
    building = path.with_name(f"{path.name}.tmp")
    shards: list[list[str]] = []
    total = 0

    def write(tensors: Tensors) -> None:
        nonlocal total
        write_shard(building / f"{len(shards)}", tensors)
        shards.append([name for name, _ in tensors])
        total += sum(tensor.nbytes for _, tensor in tensors)

    try:
        shutil.rmtree(building, ignore_errors=True)  # what a killed export left
        building.mkdir(parents=True)
        yield write
        for number in range(len(shards)):
            (building / f"{number}").rename(building / shard_name(number, len(shards)))
        write_facts(building, config, files, shards, total)
        _replace(building, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot write the checkpoint: {error}", exit_code=1) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _replace(new: Path, path: Path) -> None:
    """Two renames where `path` exists: a folder cannot be renamed onto a full one."""
    old = path.with_name(f"{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    new.rename(path)
    fsync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
