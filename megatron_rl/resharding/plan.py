"""Who sends which shard of which parameter in which bucket, decided before the first byte moves.

Every rank knows every rank's inventory (its shards' names, shapes and dtypes) and computes the same plan from them. A parameter
(gate and up together are one) is never split over buckets. Megatron-Core's own planner (core/resharding) moves Megatron
parameters between two Megatron layouts; its target would have to be a Megatron model, and it knows neither Hugging Face names,
nor buffers such as the expert bias, nor bounded buckets.

Invariants:
- every element of every Hugging Face tensor of the model is delivered exactly once;
- a bucket is at most `bucket_bytes` long, or holds a single parameter;
- the destination's own shard is preferred; other sources are chosen so that no replica sends everything;
- a missing, unknown or misshapen shard is a ValueError that names it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from megatron_rl.config.model import ParallelConfig
from megatron_rl.resharding.names import Names, Parameter, Shape, Span

ALIGNMENT = 64  # bytes, of every tensor in a buffer: enough for any dtype and any vectorised copy
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


@dataclass(frozen=True, slots=True)
class Shard:
    shape: Shape
    dtype: str

    @property
    def nbytes(self) -> int:
        return _bytes(self.shape, self.dtype)


Inventory = Mapping[str, Shard]  # by Megatron name with global layer and expert numbers


@dataclass(frozen=True, slots=True)
class Piece:
    """One rank's shard of a parameter and where it goes."""

    rank: int
    name: str
    shard: Shard
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Item:
    """One parameter: the Hugging Face tensors it becomes and the shards that hold it."""

    hf: tuple[str, ...]
    shapes: tuple[Shape, ...]
    dtype: str
    pieces: tuple[Piece, ...]

    @property
    def offsets(self) -> tuple[int, ...]:
        """Of each tensor from the item's place in a buffer, and of the end."""
        return tuple(accumulate((aligned(_bytes(shape, self.dtype)) for shape in self.shapes), initial=0))

    @property
    def nbytes(self) -> int:
        return self.offsets[-1]


@dataclass(frozen=True, slots=True)
class Bucket:
    items: tuple[Item, ...]

    @property
    def nbytes(self) -> int:
        return sum(item.nbytes for item in self.items)

    def sources(self) -> list[int]:
        return sorted({piece.rank for item in self.items for piece in item.pieces})

    def sent_by(self, rank: int) -> tuple[dict[str, tuple[Shard, int]], int]:
        """What `rank` packs for this bucket, by name with its offset in the packet, and the packet's length in bytes."""
        layout, at = {}, 0
        for item in self.items:
            for piece in item.pieces:
                if piece.rank == rank:
                    layout[piece.name] = (piece.shard, at)
                    at += aligned(piece.shard.nbytes)
        return layout, at


def make_plan(
    names: Names, parallel: ParallelConfig, inventories: Sequence[Inventory], bucket_bytes: int, destination: int = 0
) -> list[Bucket]:
    """`inventories[rank]` is what that rank holds."""
    holders = _holders(names, parallel, inventories)
    sent: Counter[int] = Counter()
    buckets: list[list[Item]] = []
    room = 0
    for parameter in names.parameters.values():
        item = _item(names, parameter, holders.get(parameter.source, {}), _shards(parameter, parallel), sent, destination)
        if item.nbytes > room:
            buckets.append([])
            room = bucket_bytes
        buckets[-1].append(item)
        room -= item.nbytes
    return [Bucket(tuple(items)) for items in buckets]


def spans_of(
    names: Names, parallel: ParallelConfig, rank: int, shapes: Mapping[str, Shape]
) -> Iterator[tuple[str, Parameter, tuple[Span, ...]]]:
    """Of every shard that `rank` holds: its name, its parameter, and where it lies in the parameter's Hugging Face tensors."""
    for name, shape in shapes.items():
        parameter = names.resolve(name)
        count = _shards(parameter, parallel)
        yield name, parameter, names.spans(parameter, shape, rank % count, count)


def _shards(parameter: Parameter, parallel: ParallelConfig) -> int:
    """Into how many shards, one after the other over the ranks: Megatron's rank orders start with TP, for experts with ETP
    (parallel_state.py, `order="tp-cp-ep-dp-pp"`), so that rank r holds shard r modulo this number."""
    if parameter.rule.split == "replicated":
        return 1
    return parallel.etp if parameter.rule.per_expert else parallel.tp


Holders = dict[int, list[tuple[int, str, Shard]]]  # by index of the shard: rank, name there, shard


def _holders(names: Names, parallel: ParallelConfig, inventories: Sequence[Inventory]) -> dict[str, Holders]:
    found: dict[str, Holders] = {}
    for rank, inventory in enumerate(inventories):
        for name, shard in inventory.items():
            parameter = names.resolve(name)
            index = rank % _shards(parameter, parallel)
            found.setdefault(parameter.hf[0], {}).setdefault(index, []).append((rank, name, shard))
    return found


def _item(names: Names, parameter: Parameter, holders: Holders, shards: int, sent: Counter[int], destination: int) -> Item:
    pieces = []
    for index in range(shards):
        if index not in holders:
            raise ValueError(f"no rank holds shard {index} of {shards} of {' + '.join(parameter.hf)}")
        rank, name, shard = min(holders[index], key=lambda holder: (holder[0] != destination, sent[holder[0]], holder[0]))
        pieces.append(Piece(rank, name, shard, names.spans(parameter, shard.shape, index, shards)))
        sent[rank] += shard.nbytes
    return Item(parameter.hf, parameter.shapes, pieces[0].shard.dtype, tuple(pieces))


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _bytes(shape: Shape, dtype: str) -> int:
    return math.prod(shape) * ITEM_BYTES[dtype]
