"""The part of a weight push that runs inside SGLang's scheduler processes, on every tensor-parallel rank.

SGLang's own `/update_weights_from_tensor` carries two more questions, told apart by `load_format` through a hook on
`WeightUpdater.update_weights_from_tensor` (model_runner_components/weight_updater.py:339): CHECK takes a manifest and answers what
the model would do with it (dry_run.py), VERIFY takes checksums and answers which tensors are held otherwise. Ranks meet in an
all-gather, and the answer is the HTTP response's message.

Invariants: a question never ends the server and never changes the model; the answer speaks for all ranks; a tensor counts as held
if the ranks' different parts of it make up the whole, and all ranks with the same part hold the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch

from megatron_rl.checksum import checksum
from megatron_rl.engine.boxes import Box, disjoint, volume
from megatron_rl.engine.dry_run import Spec, Write, follow, incomplete, part, places_of

CHECK, VERIFY = "megatron_rl.check", "megatron_rl.verify"
_UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
T = TypeVar("T")
_LAYER = re.compile(r"\blayers\.(\d+)\.")


@dataclass(slots=True)
class Answer:
    """One rank's, or after `agreed` all ranks'."""

    problems: list[str] = field(default_factory=list)
    dtypes: dict[str, str] = field(default_factory=dict)  # of each tensor's place
    parts: dict[str, list[Box]] = field(default_factory=dict)  # of each tensor; none if it is computed with


@dataclass(slots=True)
class _Memory:
    """What a model's check left behind for its pushes to be verified."""

    writes: list[Write]
    shapes: dict[str, Sequence[int]]
    computed_with: set[str]  # tensors that are not held as they are (BailingMoE normalises its head)
    arrived: dict[str, int] = field(default_factory=dict)  # their checksums


_memories: WeakKeyDictionary[torch.nn.Module, _Memory] = WeakKeyDictionary()


def register() -> None:
    from megatron_rl.engine.hooks import hook

    hook(f"{_UPDATER}.update_weights_from_tensor", "AROUND", answer)
    hook(f"{_UPDATER}.load_weights_from_distributed", "AROUND", load_received)


def answer(
    load: Callable[..., tuple[bool, str]], updater: Any, named_tensors: Any, load_format: str | None = None
) -> tuple[bool, str]:
    model = updater.get_model()
    if load_format == CHECK:
        layers = model.config.num_hidden_layers
        return True, _answered(lambda: check(model, named_tensors), lambda ranks: asdict(agreed(ranks, named_tensors, layers)))
    if load_format == VERIFY:
        return True, _answered(lambda: verify(model, named_tensors), lambda ranks: {"problems": differences(named_tensors, ranks)})
    if load_format == "flattened_bucket":
        flat = named_tensors["flattened_tensor"]
        note_arrivals(
            model, ((m.name, flat[m.start_idx : m.end_idx].view(m.dtype).view(m.shape)) for m in named_tensors["metadata"])
        )
    return load(updater, named_tensors=named_tensors, load_format=load_format)


def load_received(
    load: Callable[..., tuple[bool, str]], updater: Any, named_tensors: list[tuple[str, torch.Tensor]]
) -> tuple[bool, str]:
    note_arrivals(updater.get_model(), named_tensors)
    return load(updater, named_tensors)


def check(model: Any, manifest: Sequence[Sequence[Spec]]) -> Answer:
    """This rank's part of the manifest."""
    places = places_of(model)
    followed = follow(model.load_weights, places, manifest)
    shapes = {name: shape for bucket in manifest for name, shape, _ in bucket}
    computed_with = {write.tensor for write in followed.writes if write.tensor is not None and write.taken is None}
    _memories[model] = _Memory(followed.writes, shapes, computed_with)
    mine = Answer([f"{name}: {problem}" for name, problem in followed.problems.items()])
    if not mine.problems:  # else they would be named a second time
        mine.problems = incomplete(places, followed.writes)
    for write in followed.writes:
        if write.tensor is None:
            continue
        mine.dtypes[write.tensor] = str(places[write.place].dtype).removeprefix("torch.")
        parts = mine.parts.setdefault(write.tensor, [])
        if write.taken is not None:
            box = part(write.taken, shapes[write.tensor])
            if box is None:
                mine.problems.append(f"{write.tensor} is taken apart in a way that cannot be followed")
            elif box not in parts:
                parts.append(box)
    return mine


def agreed(ranks: Sequence[Answer], manifest: Sequence[Sequence[Spec]], layers: int) -> Answer:
    everyone = Answer(list(dict.fromkeys(problem for rank in ranks for problem in rank.problems)))
    if everyone.problems:
        return everyone
    for name, shape, _ in (spec for bucket in manifest for spec in bucket):
        holders = [rank for rank in ranks if name in rank.dtypes]
        boxes = list(dict.fromkeys(box for rank in holders for box in rank.parts[name]))
        if not holders:
            number = _LAYER.search(name)
            if number is None or int(number[1]) < layers:  # a layer beyond the last predicts further tokens: only a draft needs it
                everyone.problems.append(f"{name} is unknown to the model")
            continue
        everyone.dtypes[name] = holders[0].dtypes[name]
        if boxes and sum(map(volume, boxes)) != volume(tuple((0, size) for size in shape)):
            everyone.problems.append(f"{name} {list(shape)} is not used as a whole, each element once, but as {boxes}")
        elif any(not disjoint(a, b) for i, a in enumerate(boxes) for b in boxes[:i]):
            everyone.problems.append(f"{name} {list(shape)} is cut into parts that overlap: {boxes}")
    return everyone


def verify(model: torch.nn.Module, expected: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """This rank's checksum of each part of each tensor, read where the dry run saw it go."""
    memory, places = _memories[model], places_of(model)
    found: list[tuple[str, str, torch.Tensor]] = []
    for write in memory.writes:
        if write.tensor is not None and write.taken is not None and write.tensor in expected:
            place = places[write.place]
            offset, size, stride = write.there
            held = place.detach().as_strided(size, stride, place.storage_offset() + offset)
            box = part(write.taken, memory.shapes[write.tensor])
            found.append((write.tensor, f"{box}", checksum(held, write.taken.offset, write.taken.stride)))
    sums: dict[str, dict[str, int]] = {name: {"all": memory.arrived[name]} for name in memory.computed_with & memory.arrived.keys()}
    values = torch.stack([value for *_, value in found]).tolist() if found else []
    for (name, where, _), value in zip(found, values, strict=True):
        # Two places of the same part that differ give a part that no other rank has, and the sum is wrong.
        of_tensor = sums.setdefault(name, {})
        of_tensor[where if of_tensor.get(where, value) == value else f"{where} again"] = value
    return sums


def differences(expected: Mapping[str, int], ranks: Sequence[Mapping[str, Mapping[str, int]]]) -> list[str]:
    wrong = []
    for name, wanted in expected.items():
        parts: dict[str, set[int]] = {}
        for rank in ranks:
            for box, value in rank.get(name, {}).items():
                parts.setdefault(box, set()).add(value)
        one_each = all(len(values) == 1 for values in parts.values())
        if not (parts and one_each and (sum(min(values) for values in parts.values()) - wanted) % 2**64 == 0):
            wrong.append(name)
    return wrong


def note_arrivals(model: torch.nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """The loader keeps a function of some tensors: they are verified as they came."""
    if (memory := _memories.get(model)) is not None and memory.computed_with:
        memory.arrived |= {name: int(checksum(tensor)) for name, tensor in tensors if name in memory.computed_with}


def _answered(question: Callable[[], T], together: Callable[[list[T]], dict[str, Any]]) -> str:
    """An exception here would end the server, and leave the other ranks waiting for this one."""
    from sglang.srt.distributed import get_tp_group

    mine: T | None = None
    error = None
    try:
        mine = question()
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    ranks = get_tp_group().all_gather_object((mine, error))
    errors = list(dict.fromkeys(error for _, error in ranks if error is not None))
    return json.dumps({"problems": errors} if errors else together([answer for answer, _ in ranks]))
