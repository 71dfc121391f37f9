"""Whether the files of a Megatron-Core distributed checkpoint are as they were written.

torch's writer keeps a CRC-32 with everything it saves (a tensor's chunk is a zip archive), but torch reads without looking at it:
a flipped bit of a weight would go unnoticed, one of a header ends in a traceback from deep inside. Looking costs a second reading
of the files, shared by the ranks; saving costs nothing.

Invariants: a missing, short or damaged file is an error that names it, and the tensor; memory is one chunk.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections import defaultdict
from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from megatron_rl.config.errors import UserError, some


def read_metadata(folder: Path) -> Metadata:
    try:
        metadata = FileSystemReader(folder).read_metadata()
    except Exception as error:  # a torn pickle raises what it likes
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{folder}: not a Megatron distributed checkpoint: .metadata: {reason}", exit_code=1) from None
    return metadata


def check_files(folder: Path, share: int = 0, shares: int = 1) -> None:
    """This one of several shares of the checkpoint's chunks."""
    chunks: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for index, place in read_metadata(folder).storage_data.items():
        chunks[place.relative_path].append((place.offset, place.length, index.fqn))
    sizes = {name: max(offset + length for offset, length, _ in inside) for name, inside in chunks.items()}
    short = []
    for name, size in sizes.items():
        if not (folder / name).exists():
            short.append(f"{name} is missing")
        elif (there := (folder / name).stat().st_size) < size:
            short.append(f"{name} has {there} bytes instead of {size}")
    if short:
        raise UserError(f"{folder}: {some(sorted(short))}", exit_code=1)
    for name, inside in chunks.items():
        with (folder / name).open("rb") as file:
            for offset, length, key in sorted(inside)[share::shares]:
                file.seek(offset)
                if not _is_intact(file.read(length)):
                    raise UserError(f"{folder / name}: {key} is damaged: its bytes are not what was written", exit_code=1)


def check_files_together(folder: Path) -> None:
    """*Collective*"""
    error = None
    try:
        check_files(folder, dist.get_rank(), dist.get_world_size())
    except UserError as wrong:
        error = wrong
    errors: list[UserError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    if first := next(filter(None, errors), None):
        raise first


def _is_intact(archive: bytes) -> bool:
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as records:
            return records.testzip() is None
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, ValueError):  # by where the wrong bit lies
        return False
