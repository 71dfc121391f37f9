"""The weights in a Megatron-Core distributed checkpoint (`torch_dist`), written and read box by box.

`dist_checkpointing.save` has every process hold what it writes, and `load` what it reads. Here a bucket takes the part that a rank
has in torch's distributed checkpoint: all buckets are planned first; each is then one file, written by any process at any time; the
metadata is made of what the buckets recorded. The result is what `dist_checkpointing.load` reads at any layout.

Invariants:
- keys, shapes and offsets are those of Megatron's own `sharded_state_dict`;
- memory: one bucket while writing; while reading what is read and one chunk of the checkpoint;
- a missing or short file, a key that is missing or misshapen, and one that nobody asked for are errors that name it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_rl.checkpoint.intact import read_metadata
from megatron_rl.checkpoint.weights import sharded_weights
from megatron_rl.config.errors import UserError, some

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """A part of a tensor of the checkpoint. `dims`: of the parameter that it belongs to; axes before those are of the layer or
    expert."""

    key: str
    whole: Shape
    offset: Shape
    size: Shape
    dims: int
    padded: bool = False  # the checkpoint may have more rows: a vocabulary's

    @property
    def shape(self) -> Shape:
        """As the parameter sees it."""
        return self.size[len(self.size) - self.dims :]

    def split(self, axis: int, count: int) -> Iterator[tuple[int, Box]]:
        """Into parts along one of the parameter's axes as even as `count` shards are, each with where it begins."""
        axis += len(self.size) - self.dims
        step = -(-self.size[axis] // count)
        for first in range(0, self.size[axis], step):
            offset, size = list(self.offset), list(self.size)
            offset[axis] += first
            size[axis] = min(step, self.size[axis] - first)
            yield first, replace(self, offset=tuple(offset), size=tuple(size))


def boxes_of(chunk: Any) -> tuple[dict[str, tuple[Box, ...]], dict[str, Any]]:
    """Of a whole model (on the meta device, say): where each parameter lies, by Megatron name, rows of one box after those of
    another (gate and up are two); and the objects that Megatron's layers want to find beside them."""
    boxes, objects = {}, {}
    for name, value in sharded_weights([chunk])["model0"].items():
        if isinstance(value, ShardedObject):
            objects[value.unique_key] = value.data
            continue
        parts = nested_values(value.build()) if isinstance(value, ShardedTensorFactory) else [value]
        boxes[name] = tuple(
            Box(
                part.key,
                tuple(part.global_shape),
                tuple(part.global_offset),
                (1,) * part.prepend_axis_num + tuple(part.local_shape),
                len(part.local_shape),
                part.allow_shape_mismatch,
            )
            for part in parts
        )
    return boxes, objects


class BoxWriter:
    """`buckets[i]`: the boxes of file i with their data types; `objects` go with the last."""

    def __init__(self, folder: Path, buckets: Sequence[Sequence[tuple[Box, torch.dtype]]], objects: Mapping[str, Any]) -> None:
        self._folder, self._objects = folder, objects
        plans = [SavePlan([_write_item(*entry) for entry in bucket]) for bucket in buckets]
        plans[-1].items.extend(WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in objects)
        plans, self._metadata = DefaultSavePlanner(flatten_state_dict=False).create_global_plan(plans)
        self._writer = FileSystemWriter(folder, thread_count=1)
        self._writer.set_up_storage_writer(is_coordinator=True)
        self._plans = self._writer.prepare_global_plan(plans)

    def write(self, bucket: int, tensor: Callable[[str, Shape], torch.Tensor]) -> Any:
        """One file, on disk on return; what `finish` wants to know of it. `tensor(key, offset)` is asked for each box."""

        def resolve(item: WriteItem) -> torch.Tensor | io.BytesIO:
            if item.type == WriteItemType.BYTE_IO:
                buffer = io.BytesIO()
                torch.save([self._objects[item.index.fqn]], buffer)
                return buffer
            assert item.tensor_data and item.index.offset is not None
            found = tensor(item.index.fqn, tuple(item.index.offset))
            return found.view(item.tensor_data.chunk.sizes)

        return self._writer.write_data(self._plans[bucket], _Resolve(resolve)).value()

    def finish(self, results: Sequence[Any]) -> None:
        """`results` of all buckets; to be called once, by one process."""
        self._writer.finish(self._metadata, list(results))


class _Resolve(DefaultSavePlanner):
    def __init__(self, resolve: Callable[[WriteItem], torch.Tensor | io.BytesIO]) -> None:
        super().__init__(flatten_state_dict=False)
        self._resolve = resolve

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        return self._resolve(write_item)


def _write_item(box: Box, dtype: torch.dtype) -> WriteItem:
    data = TensorWriteData(_chunk(box), TensorProperties(dtype), torch.Size(box.whole))
    return WriteItem(MetadataIndex(box.key, box.offset), WriteItemType.SHARD, tensor_data=data)


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.size))


class BoxReader:
    """Of a checkpoint with weights and whatever else."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._reader = FileSystemReader(folder)
        self.metadata = read_metadata(folder)
        self._reader.set_up_storage_reader(self.metadata, is_coordinator=True)

    def dtype(self, box: Box) -> torch.dtype:
        return self._tensor(box.key).properties.dtype

    def check(self, boxes: Sequence[Box]) -> None:
        """That the checkpoint holds these boxes, and no other weights."""
        stored = {key for key, value in self.metadata.state_dict_metadata.items() if isinstance(value, TensorStorageMetadata)}
        keys = {box.key: box for box in boxes}
        problems = []
        if missing := sorted(keys.keys() - stored):
            problems.append(f"missing {some(missing)}")
        if unused := sorted(key for key in stored - keys.keys() if not key.startswith("optimizer.")):
            problems.append(f"not part of the model: {some(unused)}")
        wrong = []
        for key in keys.keys() & stored:
            size, whole = tuple(self._tensor(key).size), keys[key].whole
            rows = size[0] >= whole[0] if keys[key].padded else size[0] == whole[0]
            if not rows or size[1:] != whole[1:]:
                wrong.append(f"{key} {list(size)} instead of {list(whole)}")
        if wrong:
            problems.append(f"wrong shapes: {some(sorted(wrong))}")
        if problems:
            raise UserError(f"{self._folder}: {'; '.join(problems)}", exit_code=1)

    def read(self, box: Box, out: torch.Tensor) -> None:
        items = create_read_items_for_chunk_list(box.key, self._tensor(box.key), [_chunk(box)])
        try:
            self._reader.read_data(LoadPlan(items), _Into(out.view(box.size))).wait()
        except Exception as error:  # torch.load raises many kinds for bytes that are not what they should be
            raise UserError(f"{self._folder}: cannot read {box.key}: {_line(error)}", exit_code=1) from error
        if sum(item.lengths.numel() for item in items) != out.numel():
            raise UserError(f"{self._folder}: {box.key} is not all there", exit_code=1)

    def _tensor(self, key: str) -> TensorStorageMetadata:
        found = self.metadata.state_dict_metadata[key]
        assert isinstance(found, TensorStorageMetadata)
        return found


class _Into(DefaultLoadPlanner):
    def __init__(self, out: torch.Tensor) -> None:
        super().__init__()
        self._out = out

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        place = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self._out[tuple(slice(at, at + length) for at, length in place)]

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None: ...


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
