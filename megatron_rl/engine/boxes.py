"""Index boxes: which part of a tensor a view of it is, and whether parts make up the whole."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

Box = tuple[tuple[int, int], ...]  # start and stop along each axis


class Geometry(NamedTuple):
    """A strided view: element (i, j, ...) lies `offset + i * stride[0] + j * stride[1] + ...` elements from the start."""

    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def box_of(view: Geometry, shape: Sequence[int], strides: Sequence[int]) -> Box | None:
    """The box of a dense tensor of this shape that the view shows, in whatever order and cut into whatever axes; None if it shows
    something that is no box."""
    if 0 in view.size:
        return tuple((0, 0) for _ in shape)
    axes = sorted((axis for axis in range(len(shape)) if shape[axis] > 1), key=lambda axis: -strides[axis])
    start, extent, rest = [0] * len(shape), [1] * len(shape), view.offset
    for axis in axes:
        start[axis], rest = divmod(rest, strides[axis])
    for length, stride in _coalesced(view):
        at = next((i for i, axis in enumerate(axes) if strides[axis] == stride), None)
        if at is None:
            return None
        while at > 0 and length > shape[axes[at]]:  # several axes in one
            length, remainder = divmod(length, shape[axes[at]])
            if remainder:
                return None
            extent[axes[at]], at = shape[axes[at]], at - 1
        extent[axes[at]] = length
    box = tuple((first, first + count) for first, count in zip(start, extent, strict=True))
    return box if not rest and all(stop <= size for (_, stop), size in zip(box, shape, strict=True)) else None


def volume(box: Box) -> int:
    return math.prod(stop - start for start, stop in box)


def disjoint(one: Box, other: Box) -> bool:
    return any(a_stop <= b_start or b_stop <= a_start for (a_start, a_stop), (b_start, b_stop) in zip(one, other, strict=True))


def gap(boxes: Sequence[Box], shape: Sequence[int]) -> Box | None:
    """Some part of the tensor that lies in no box. None: there is none."""
    return next((cell for cell, holders in _cells(boxes, shape) if not holders), None)


def overlap(boxes: Sequence[Box], shape: Sequence[int]) -> tuple[int, int] | None:
    """Two boxes that share an element, by their numbers."""
    return next(((holders[0], holders[1]) for _, holders in _cells(boxes, shape) if len(holders) > 1), None)


def _cells(boxes: Sequence[Box], shape: Sequence[int]) -> list[tuple[Box, list[int]]]:
    """The tensor cut at every box's bounds, and which boxes hold each cell."""
    cuts = [sorted({0, size, *itertools.chain(*(box[axis] for box in boxes))}) for axis, size in enumerate(shape)]
    index = [{cut: i for i, cut in enumerate(axis_cuts)} for axis_cuts in cuts]
    holders: dict[tuple[int, ...], list[int]] = {}
    for number, box in enumerate(boxes):
        for cell in itertools.product(*(range(index[axis][start], index[axis][stop]) for axis, (start, stop) in enumerate(box))):
            holders.setdefault(cell, []).append(number)
    return [
        (tuple((axis_cuts[i], axis_cuts[i + 1]) for axis_cuts, i in zip(cuts, cell, strict=True)), holders.get(cell, []))
        for cell in itertools.product(*(range(len(axis_cuts) - 1) for axis_cuts in cuts))
    ]


def _coalesced(view: Geometry) -> list[tuple[int, int]]:
    """(length, stride) of its axes, longest stride first; axes that continue each other are one."""
    axes: list[tuple[int, int]] = []
    for length, stride in sorted(zip(view.size, view.stride, strict=True), key=lambda axis: -axis[1]):
        if length == 1:
            continue
        if axes and axes[-1][1] == length * stride:
            axes[-1] = (axes[-1][0] * length, stride)
        else:
            axes.append((length, stride))
    return axes
