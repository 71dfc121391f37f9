"""Follows a model's `load_weights` without moving a byte: which part of which tensor would land where.

The loader gets meta tensors, and every operation on them passes through here. A write into the model is recorded instead of done.
Views keep their place in the tensor they come from; copies and concatenations (DeepSeek's fused down-projections) keep their
parts'; anything else (BailingMoE's normalised head) is known to come from its tensors, but not from where in them.

Invariants: nothing of the model changes; every tensor a bucket offers is recorded with all it writes, or is a problem that names
it; buckets are loaded one by one, as they will be sent, since some loaders wait for tensors that must come together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_rl.checksum import contiguous_strides
from megatron_rl.engine.boxes import Box, Geometry, box_of, gap, overlap

Load = Callable[[Iterable[tuple[str, torch.Tensor]]], Any]
Spec = tuple[str, Sequence[int], str]  # name, shape, dtype
aten = torch.ops.aten
_COPIES = {aten.clone.default, aten._to_copy.default, aten.cat.default}
_FILLS = {aten.fill_.Scalar, aten.fill_.Tensor, aten.zero_.default}


class Write(NamedTuple):
    place: str  # the parameter or buffer, by the model's name
    there: Geometry  # in the storage of the place, from the place's beginning
    tensor: str | None  # the one it comes from; None: a constant
    taken: Geometry | None  # which part of it; None: computed from it


@dataclass(slots=True)
class Followed:
    writes: list[Write] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)  # by tensor


class CannotFollow(RuntimeError):
    """The loader does something this module has no account for."""


def places_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint has to fill: parameters and persistent buffers, tied ones once."""
    places: dict[tuple[int, int], tuple[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor):
            places.setdefault((_storage(tensor), int(tensor.storage_offset())), (name, tensor))
    return dict(places.values())


def follow(load: Load, places: dict[str, torch.Tensor], buckets: Sequence[Sequence[Spec]]) -> Followed:
    followed = Followed()
    for bucket in buckets:
        try:
            followed.writes += _writes_of(load, places, bucket)
        except Exception as together:
            alone = {spec[0]: error for spec in bucket if (error := _error_of(load, places, spec)) is not None}
            followed.problems |= alone or {bucket[-1][0]: f"or another one of its bucket: {_line(together)}"}
            rest = [spec for spec in bucket if spec[0] not in followed.problems]
            if alone and rest:
                others = follow(load, places, [rest])
                followed.writes += others.writes
                followed.problems |= others.problems
    return followed


def incomplete(places: dict[str, torch.Tensor], writes: Iterable[Write]) -> list[str]:
    """What is wrong with what is written, one line each: every element exactly once, constants beside them."""
    into: dict[str, list[Write]] = {name: [] for name in places}
    for write in writes:
        into[write.place].append(write)
    problems = []
    for name, tensor in places.items():
        boxes = [box_of(write.there, tensor.shape, tensor.stride()) for write in into[name]]
        known = [box for box in boxes if box is not None]
        values = [(box, w.tensor) for box, w in zip(boxes, into[name], strict=True) if box is not None and w.tensor is not None]
        if len(known) < len(boxes):
            problems.append(f"{name} is written in a way that cannot be followed")
        elif not known and tensor.numel():
            problems.append(f"nothing writes {name}")
        elif hole := gap(known, tensor.shape):
            problems.append(f"nothing writes {name}{_subscript(hole, tensor.shape)}")
        elif twice := overlap([box for box, _ in values], tensor.shape):
            problems.append(f"{name} is written twice, from {values[twice[0]][1]} and {values[twice[1]][1]}")
    return problems


def part(taken: Geometry, shape: Sequence[int]) -> Box | None:
    return box_of(taken, shape, contiguous_strides(shape))


def _writes_of(load: Load, places: dict[str, torch.Tensor], bucket: Sequence[Spec]) -> list[Write]:
    tensors = {name: torch.empty(tuple(shape), dtype=getattr(torch, dtype), device="meta") for name, shape, dtype in bucket}
    with torch.no_grad(), _Recorder(places, tensors) as recorder:
        load(iter(tensors.items()))
    return recorder.writes


def _error_of(load: Load, places: dict[str, torch.Tensor], spec: Spec) -> str | None:
    try:
        _writes_of(load, places, [spec])
    except Exception as error:
        return _line(error)
    return None


class _Origin(NamedTuple):
    """What a meta tensor's storage holds: parts of tensors, each at its place; or no more than the names is known."""

    tensors: tuple[str, ...]
    whole: Geometry | None = None
    parts: tuple[tuple[Geometry, str, Geometry], ...] = ()


class _Recorder(TorchDispatchMode):
    def __init__(self, places: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.writes: list[Write] = []
        self._places = {_storage(tensor): (name, int(tensor.storage_offset())) for name, tensor in places.items()}
        self._sources = {_storage(tensor): name for name, tensor in tensors.items()}
        self._made: dict[int, _Origin] = {}
        self._scalars: dict[float, torch.Tensor] = {}
        self._alive: list[torch.Tensor] = []  # so that no storage's address is used again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        written = _written(func, args, kwargs or {})
        if any(tensor.device.type != "meta" and _storage(tensor) in self._places for tensor in written):
            self._write(func, args)
            return args[0]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        names = tuple(dict.fromkeys(name for tensor in tensors for name in self._names(tensor)))
        if not names:
            return func(*args, **(kwargs or {}))
        if func is aten._local_scalar_dense.default:
            # SGLang's default loader fills a parameter of one element with a number (model_loader/weight_utils.py:1483).
            mark = 2.0**60 + 1024.0 * len(self._scalars)
            self._scalars[mark] = args[0]
            return mark
        result = func(*args, **(kwargs or {}))
        for tensor in written:
            self._made[_storage(tensor)] = _Origin(names)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and _storage(tensor) not in self._sources and _storage(tensor) not in self._made:
                self._made[_storage(tensor)] = self._copied(func, args, tensor) or _Origin(names)
                self._alive.append(tensor)
        return result

    def _write(self, func: Any, args: Any) -> None:
        to = args[0]
        if func is aten.copy_.default:
            if args[1].shape != to.shape:
                raise CannotFollow(f"{list(args[1].shape)} is broadcast into {list(to.shape)} of {self._place(to)[0]}")
            self._copy(to, args[1])
        elif func is aten.fill_.Scalar and args[1] in self._scalars:
            self._copy(to, self._scalars[args[1]].view(to.shape))
        elif func in _FILLS:
            self.writes.append(Write(*self._place(to), None, None))
        else:
            raise CannotFollow(f"{func} on {self._place(to)[0]}")

    def _copy(self, to: torch.Tensor, tensor: torch.Tensor) -> None:
        if to.numel() == 0:
            return
        if not self._names(tensor):
            self.writes.append(Write(*self._place(to), None, None))
        for where, name, taken in self._parts(tensor):
            there = to if where is None else to.as_strided(where.size, *_through(where, tensor, to))
            self.writes.append(Write(*self._place(there), name, taken))

    def _parts(self, tensor: torch.Tensor) -> Iterator[tuple[Geometry | None, str, Geometry | None]]:
        """What the tensor consists of: where in it (None: all of it), whose part, which part (None: computed)."""
        if (name := self._sources.get(_storage(tensor))) is not None:
            yield None, name, _geometry(tensor)
        elif (origin := self._made.get(_storage(tensor))) is not None:
            if origin.whole == _geometry(tensor):
                yield from origin.parts
            else:
                yield from ((None, name, None) for name in origin.tensors)

    def _copied(self, func: Any, args: Any, result: torch.Tensor) -> _Origin | None:
        if func not in _COPIES or not result.is_contiguous():
            return None
        inputs = args[0] if func is aten.cat.default else [args[0]]
        axis = (args[1] if len(args) > 1 else 0) if func is aten.cat.default else 0
        parts, at = [], 0
        for tensor in inputs:
            view = result.narrow(axis, at, tensor.shape[axis]) if tensor.dim() else result
            at += tensor.shape[axis] if tensor.dim() else 0
            for where, name, taken in self._parts(tensor):
                if where is not None or taken is None:
                    return None  # a copy of a copy
                parts.append((_geometry(view), name, taken))
        return _Origin(tuple(name for _, name, _ in parts), _geometry(result), tuple(parts))

    def _names(self, tensor: torch.Tensor) -> tuple[str, ...]:
        key = _storage(tensor)
        return (self._sources[key],) if key in self._sources else self._made[key].tensors if key in self._made else ()

    def _place(self, view: torch.Tensor) -> tuple[str, Geometry]:
        name, start = self._places[_storage(view)]
        offset, size, stride = _geometry(view)
        return name, Geometry(offset - start, size, stride)


def _through(where: Geometry, tensor: torch.Tensor, to: torch.Tensor) -> tuple[tuple[int, ...], int]:
    """Stride and offset in `to` of the part of `tensor` (contiguous, of the same shape) that `where` shows."""
    rest, offset = where.offset, int(to.storage_offset())
    for size, stride, step in zip(tensor.shape, tensor.stride(), to.stride(), strict=True):
        index, rest = divmod(rest, stride) if size > 1 else (0, rest)
        offset += index * step
    return to.stride(), offset


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    arguments = [
        args[i] if i < len(args) else kwargs.get(argument.name)
        for i, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _geometry(tensor: torch.Tensor) -> Geometry:
    return Geometry(int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride())


def _subscript(box: Box, shape: Sequence[int]) -> str:
    if all(bounds == (0, size) for bounds, size in zip(box, shape, strict=True)):
        return ""
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in box) + "]"


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
