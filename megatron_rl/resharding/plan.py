"""Who sends which rows or columns of which tensor in which bucket, decided before the first byte moves.

Every rank knows every rank's inventory (its shards' names, shapes and types) and computes the same plan from them. A Hugging Face
tensor is never cut in two, since engines' loaders and safetensors want whole ones; gate and up, or Q, K and V, may part.

Megatron-Core's planner (megatron/core/resharding, 0.16.1) does not serve here. It moves one Megatron model into another: the target
is a module with parameters and process groups of its own (planner.py, build_centralized_reshard_plan), where engines want Hugging
Face's names, and Q, K and V apart. It sees `named_parameters`, so that the expert bias, a buffer, would stay behind; of experts it
knows Transformer Engine's grouped ones (utils.py, _detect_expert_index_from_param_name); and a rank allocates all it will receive
at once (execution.py, recv_writebacks), where an engine's device has room for a bucket or two.

Invariants:
- every element of every Hugging Face tensor of the model is delivered exactly once;
- a bucket's room at a destination, with what has to be unpacked there, is at most `bucket_bytes`; a tensor that needs more is a
  bucket of its own, and `Plan.oversized` lists it;
- the destination's own shard is preferred; other sources are chosen so that no replica sends everything;
- missing, unknown, misshapen and differently typed shards are one ValueError that names them and their ranks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from megatron_rl.config.errors import some
from megatron_rl.config.model import ParallelConfig
from megatron_rl.resharding.names import Names, Parameter, Shape, Span
from megatron_rl.types import Manifest, TensorSpec

ALIGNMENT = 64  # bytes, of every tensor in a bucket's memory: enough for any dtype and any vectorised copy
DIRECT_BYTES = 2**20  # what is smaller travels packed: on gloo and loopback 256 KiB messages are half as fast as 4 MiB ones
ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
# SGLang loads these two as one, from one bucket (deepseek_weight_loader.py:412).
TOGETHER = ("q_a_proj.weight", "kv_a_proj_with_mqa.weight")


class Shard(NamedTuple):
    shape: Shape
    dtype: str
    frozen: bool = False  # no step changes it


Inventory = Mapping[str, Shard]  # by Megatron name with global layer and expert numbers


@dataclass(frozen=True, slots=True)
class Part:
    """`length` rows (axis 0) or columns (axis 1) from `start` of a tensor, and where a rank has them."""

    rank: int
    shard: str  # its name there
    axis: int
    start: int
    local_start: int
    length: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """A Hugging Face tensor and the parts that make it up."""

    name: str
    shape: Shape
    dtype: str  # of the shards
    sent: str  # what it is delivered as
    frozen: bool
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.sent]

    def part_shape(self, part: Part) -> Shape:
        return (*self.shape[: part.axis], part.length, *self.shape[part.axis + 1 :])

    def part_bytes(self, part: Part) -> int:
        return self.nbytes // self.shape[part.axis] * part.length

    def is_whole(self, part: Part) -> bool:
        """Whether the shard has it as it is wanted."""
        return part.length == self.shape[part.axis] and self.sent == self.dtype

    def lies_in_place(self, part: Part) -> bool:
        """Whether it is one run of the tensor's bytes, and large enough to travel alone."""
        rows = part.axis == 0 or part.length == self.shape[part.axis]
        return rows and self.sent == self.dtype and self.part_bytes(part) >= DIRECT_BYTES

    def unpacked_at(self, destination: int) -> int:
        """Bytes that arrive there elsewhere than in their place."""
        return sum(
            aligned(self.part_bytes(part)) for part in self.parts if part.rank != destination and not self.lies_in_place(part)
        )


@dataclass(frozen=True, slots=True)
class Message:
    """What travels in one piece: a large part as it lies in the shard, or many small ones packed."""

    source: int
    at: int  # where it is received, in the bucket's memory
    nbytes: int
    parts: tuple[tuple[Tensor, Part], ...]
    in_place: bool


@dataclass(frozen=True, slots=True)
class Bucket:
    tensors: tuple[Tensor, ...]
    nbytes: int  # of the tensors
    room: int  # with what is unpacked
    sources: frozenset[int]

    @classmethod
    def of(cls, tensors: Iterable[Tensor], room: int) -> Bucket:
        tensors = tuple(tensors)
        sources = frozenset(part.rank for tensor in tensors for part in tensor.parts)
        return cls(tensors, sum(aligned(tensor.nbytes) for tensor in tensors), room, sources)

    def places(self) -> Iterator[tuple[Tensor, int]]:
        """Each tensor and its offset in the bucket's memory."""
        at = 0
        for tensor in self.tensors:
            yield tensor, at
            at += aligned(tensor.nbytes)

    def messages(self, destination: int) -> list[Message]:
        """All that `destination` receives for this bucket. Every rank lists them in the same order."""
        found: list[Message] = []
        small: dict[int, list[tuple[Tensor, Part]]] = {}
        at = self.nbytes
        if not self.sources - {destination}:
            return []
        for tensor, place in self.places():
            for part in tensor.parts:
                nbytes = tensor.part_bytes(part)
                if part.rank == destination:
                    continue
                if tensor.lies_in_place(part):
                    there = place + nbytes // part.length * part.start
                    found.append(Message(part.rank, there, nbytes, ((tensor, part),), True))
                elif nbytes >= DIRECT_BYTES:
                    found.append(Message(part.rank, at, nbytes, ((tensor, part),), False))
                    at += aligned(nbytes)
                else:
                    small.setdefault(part.rank, []).append((tensor, part))
        for source, parts in small.items():
            *before, last = (tensor.part_bytes(part) for tensor, part in parts)
            nbytes = sum(map(aligned, before)) + last
            found.append(Message(source, at, nbytes, tuple(parts), False))
            at += aligned(nbytes)
        return found


@dataclass(frozen=True)
class Plan:
    buckets: tuple[Bucket, ...]
    bucket_bytes: int

    @property
    def oversized(self) -> list[Tensor]:
        return [tensor for bucket in self.buckets if bucket.room > self.bucket_bytes for tensor in bucket.tensors]

    @property
    def manifest(self) -> Manifest:
        return [[TensorSpec(tensor.name, tensor.shape, tensor.dtype) for tensor in bucket.tensors] for bucket in self.buckets]

    def only(self, dtypes: Mapping[str, str], destinations: Sequence[int], *, frozen: bool) -> Plan:
        """The plan for what a destination wants: tensors in `dtypes`, with or without the frozen ones, in the type named there
        where that takes no more room, so that no bucket grows. What the whole plan delivers together stays together."""

        def wanted(tensor: Tensor) -> bool:
            return tensor.name in dtypes and (frozen or not tensor.frozen)

        units = [
            [_narrowed(tensor, dtypes[tensor.name], destinations) for tensor in bucket.tensors if wanted(tensor)]
            for bucket in self.buckets
        ]
        return Plan(tuple(_filled(units, self.bucket_bytes, destinations)), self.bucket_bytes)


def make_plan(
    names: Names,
    parallel: ParallelConfig,
    inventories: Sequence[Inventory],
    bucket_bytes: int,
    destinations: Sequence[int] = (0,),
) -> Plan:
    """`inventories[rank]` is what that rank holds; every rank in `destinations` gets everything."""
    shards = _shards_by_parameter(names, parallel, inventories)
    sent: Counter[int] = Counter()
    tensors = [
        tensor
        for parameter in names.parameters.values()
        for tensor in _tensors(parameter, shards[parameter.source], sent, destinations[0])
    ]
    units: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        units.setdefault(tensor.name.replace(TOGETHER[1], TOGETHER[0]), []).append(tensor)
    return Plan(tuple(_filled(units.values(), bucket_bytes, destinations)), bucket_bytes)


def spans_of(
    names: Names, parallel: ParallelConfig, rank: int, shapes: Mapping[str, Shape]
) -> Iterator[tuple[str, Parameter, tuple[Span, ...]]]:
    """Of every shard that `rank` holds: its name, its parameter, and where it lies in the parameter's Hugging Face tensors."""
    for name, shape in shapes.items():
        parameter = names.resolve(name)
        count = shard_count(parameter, parallel)
        yield name, parameter, names.spans(parameter, shape, rank % count, count)


def shard_count(parameter: Parameter, parallel: ParallelConfig) -> int:
    """Into how many shards, one after the other over the ranks: Megatron's rank orders start with TP, for experts with ETP
    (parallel_state.py, `order="tp-cp-ep-dp-pp"`), so that rank r holds shard r modulo this number."""
    if parameter.rule.split == "replicated":
        return 1
    return parallel.etp if parameter.rule.per_expert else parallel.tp


@dataclass(slots=True)
class _Held:
    """One shard of a parameter and who has it, perhaps under two names (a tied model's last stage)."""

    shard: Shard
    spans: tuple[Span, ...]
    holders: list[tuple[Sequence[int], str]]  # ranks, name there


def _shards_by_parameter(names: Names, parallel: ParallelConfig, inventories: Sequence[Inventory]) -> dict[str, list[_Held]]:
    """By the parameter's first Hugging Face name, its shards in order. ValueError naming everything that is wrong."""
    found: dict[str, dict[int, _Held]] = {name: {} for name, parameter in names.parameters.items() if parameter.source == name}
    problems: dict[str, list[int]] = {}  # with their ranks
    for inventory, ranks in _alike(inventories):
        by_index = {count: _by_index(ranks, count) for count in {1, parallel.tp, parallel.etp}}
        for name, shard in inventory.items():
            try:
                parameter = names.resolve(name)
                count = shard_count(parameter, parallel)
                for index, holders in by_index[count].items():
                    held = found[parameter.hf[0]].get(index)
                    if held is None:
                        spans = names.spans(parameter, shard.shape, index, count)
                        found[parameter.hf[0]][index] = _Held(shard, spans, [(holders, name)])
                    elif held.shard == shard:
                        held.holders.append((holders, name))
                    else:
                        raise ValueError(f"{name} is {_said(shard)}, on rank {held.holders[0][0][0]} {_said(held.shard)}")
            except ValueError as error:
                problems.setdefault(str(error), []).extend(ranks)
    for name, shards in found.items():
        parameter = names.parameters[name]
        count = shard_count(parameter, parallel)
        if lacking := [f"{index}" for index in range(count) if index not in shards]:
            problems.setdefault(f"no rank holds shard {', '.join(lacking)} of {count} of {' + '.join(parameter.hf)}", [])
        elif len({held.shard.dtype for held in shards.values()}) > 1:
            problems[f"the shards of {name} differ in type"] = [held.holders[0][0][0] for held in shards.values()]
    if problems:
        raise ValueError(some([problem + _on(ranks) for problem, ranks in problems.items()]))
    return {name: [shards[index] for index in range(len(shards))] for name, shards in found.items()}


def _alike(inventories: Sequence[Inventory]) -> Iterator[tuple[Inventory, list[int]]]:
    """Ranks that hold the same names: all of a stage and EP place, which differ in nothing but their shards' values."""
    ranks: dict[tuple[tuple[str, Shard], ...], list[int]] = {}
    for rank, inventory in enumerate(inventories):
        ranks.setdefault(tuple(inventory.items()), []).append(rank)
    return ((inventories[alike[0]], alike) for alike in ranks.values())


def _by_index(ranks: Sequence[int], count: int) -> dict[int, list[int]]:
    return {index: [rank for rank in ranks if rank % count == index] for index in sorted({rank % count for rank in ranks})}


def _said(shard: Shard) -> str:
    return f"{shard.dtype} {list(shard.shape)}" + " (frozen)" * shard.frozen


def _on(ranks: Sequence[int]) -> str:
    if not ranks:
        return ""
    more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
    return f" (rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:4]))}{more})"


def _tensors(parameter: Parameter, shards: Sequence[_Held], sent: Counter[int], destination: int) -> list[Tensor]:
    parts: list[list[Part]] = [[] for _ in parameter.hf]
    dtype = shards[0].shard.dtype
    for held in shards:
        candidates = ((rank, name) for ranks, name in held.holders for rank in ranks)
        rank, name = min(candidates, key=lambda holder: (holder[0] != destination, sent[holder[0]], holder[0]))
        for span in held.spans:
            parts[span.tensor].append(Part(rank, name, span.axis, span.hf_start, span.local_start, span.length))
        sent[rank] += math.prod(held.shard.shape) * ITEM_BYTES[dtype]
    frozen = all(held.shard.frozen for held in shards)
    return [
        Tensor(name, shape, dtype, dtype, frozen, tuple(of_tensor))
        for name, shape, of_tensor in zip(parameter.hf, parameter.shapes, parts, strict=True)
    ]


def _filled(units: Iterable[Sequence[Tensor]], bucket_bytes: int, destinations: Sequence[int]) -> Iterator[Bucket]:
    """Buckets of units that stay together, in their order."""
    pending: list[Tensor] = []
    used = 0
    for unit in units:
        room = sum(_room(tensor, destinations) for tensor in unit)
        if pending and used + room > bucket_bytes:
            yield Bucket.of(pending, used)
            pending, used = [], 0
        pending += unit
        used += room
    if pending:
        yield Bucket.of(pending, used)


def _room(tensor: Tensor, destinations: Sequence[int]) -> int:
    return aligned(tensor.nbytes) + max(tensor.unpacked_at(destination) for destination in destinations)


def _narrowed(tensor: Tensor, dtype: str, destinations: Sequence[int]) -> Tensor:
    """In that type where it takes no more room: what is converted has to be unpacked, and small tensors are mostly alignment."""
    narrow = replace(tensor, sent=dtype)
    smaller = ITEM_BYTES[dtype] < ITEM_BYTES[tensor.dtype] and _room(narrow, destinations) <= _room(tensor, destinations)
    return narrow if smaller else tensor


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
