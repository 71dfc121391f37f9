"""The engines' side of a weight push: tensors go from the trainer's memory into every running server, between begin and end.

To servers on this machine each bucket lies in one piece of memory that they map: on a CPU shared memory whose file descriptor
travels over multiprocessing's own authenticated socket, on CUDA memory whose IPC handle stands in the request. No file, and no copy
per server. To servers elsewhere it goes by a process group (group.py).
Requires that nothing is being generated (everything was aborted or has ended before).

Invariants:
- a server that would not take the manifest's tensors, or would be left with something unwritten, says so before its first byte;
- a push that returned from `end` is in every server: every tensor since the server started, caches flushed, and the server says
  it is on `version`; with checksums, each tensor is held bit for bit;
- a server that did not confirm is lost, and the EngineLost names it; it waited for no longer than `timeout_s` a step;
- the caller's tensors may be reused when `send` returns.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any, Literal, TypeVar
from weakref import WeakValueDictionary

import torch
import torch.multiprocessing  # its import teaches ForkingPickler tensors

from megatron_rl.config.errors import UserError
from megatron_rl.engine.client import SglangEngine
from megatron_rl.engine.group import EngineGroup, is_on_this_machine
from megatron_rl.engine.intake import CHECK, VERIFY
from megatron_rl.engine.launcher import SglangEngines
from megatron_rl.types import Intake, Manifest

T = TypeVar("T")
Transport = Literal["auto", "shared_memory", "group"]
ALIGN = 16  # bytes; a tensor is viewed in its own type at its place in the buffer
FLUSH_TIMEOUT_S = 30.0  # for the last aborted requests to drain
NAMED = 10  # problems in a message


class EngineWeights:
    """Implements `ports.WeightSink`."""

    def __init__(self, engines: SglangEngines, tp: int = 1, timeout_s: float = 600.0, transport: Transport = "auto") -> None:
        self._engines, self._tp, self._timeout_s, self._transport = engines, tp, timeout_s, transport
        self._group: EngineGroup | None = None
        self._taking: list[SglangEngine] = []
        self._sent: set[str] = set()
        self._handed_out: WeakValueDictionary[int, torch.Tensor] = WeakValueDictionary()  # by address
        self._kept: list[torch.Tensor] = []  # the last push's: new shared memory costs more than what is written into it
        self._used: list[torch.Tensor] = []  # this push's

    def begin(self, manifest: Manifest) -> Intake:
        self._taking, self._sent = list(self._engines.alive), set()
        self._kept, self._used = self._kept + self._used, []
        refusals = self._each(lambda engine: self._begin(engine, manifest))
        for engine, problems in zip(self._taking, refusals, strict=True):
            if problems:
                raise UserError(f"{engine.name} would not take the policy's weights: {_listed(problems)}", exit_code=1)
        dtypes = {name: dtype for engine in self._taking for name, dtype in engine.held.dtypes.items()}
        return Intake(dtypes, has_all=all(engine.held.whole for engine in self._taking))

    def memory(self, nbytes: int, device: torch.device) -> torch.Tensor:
        fitting = [number for number, kept in enumerate(self._kept) if kept.numel() == nbytes]
        memory = self._kept.pop(fitting[0]) if fitting else self._new_memory(nbytes, device)
        if memory.is_shared() and device.type == "cpu":
            self._used.append(memory)
        self._handed_out[memory.data_ptr()] = memory
        return memory

    def send(self, bucket: Sequence[tuple[str, torch.Tensor]]) -> None:
        device = bucket[0][1].device
        if self._by_group:
            self._group_on(device).load(bucket)
        else:
            flat, metadata = self._flatten(bucket)
            self._each(lambda engine: self._load(engine, {"flattened_tensor": flat, "metadata": metadata}, "flattened_bucket"))
        self._sent |= {name for name, _ in bucket}

    def end(self, version: int, checksums: Mapping[str, int] | None = None) -> None:
        for engine in self._taking:
            missing = [] if engine.held.whole else [name for name in engine.held.dtypes if name not in self._sent]
            if missing:
                raise RuntimeError(f"{engine.name} is new and was not sent {_listed(missing)}")
        if checksums is not None:
            self._verify(checksums)
        self._each(lambda engine: self._end(engine, version))
        self._kept = []

    def _new_memory(self, nbytes: int, device: torch.device) -> torch.Tensor:
        memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        return memory if device.type != "cpu" or self._by_group else memory.share_memory_()

    @property
    def _by_group(self) -> bool:
        if self._transport == "auto":
            return not all(is_on_this_machine(engine.host) for engine in self._taking)
        return self._transport == "group"

    def _group_on(self, device: torch.device) -> EngineGroup:
        """The group of just these servers, kept from push to push."""
        group = self._group
        if group is None or group.broken or group.engines != self._taking or group.device != device:
            if group is not None and not group.broken:
                group.close()
            self._group = None  # a failure to join leaves none
            self._group = group = EngineGroup(self._taking, self._tp, device, self._timeout_s)
        return group

    def _begin(self, engine: SglangEngine, manifest: Manifest) -> list[str]:
        """The reasons why it takes nothing."""
        held = engine.held
        if held.updating:  # a push that an error ended
            self._ask(engine, "/end_weight_update", {})
            held.whole = False
        self._ask(engine, "/begin_weight_update", {}, engine.stall_timeout_s)  # it has nothing else to do
        held.updating = True
        if held.manifest == manifest:
            return []
        answer = self._question(engine, CHECK, [[(spec.name, spec.shape, spec.dtype) for spec in bucket] for bucket in manifest])
        if not answer["problems"]:
            held.manifest, held.dtypes = manifest, answer["dtypes"]
        else:
            self._ask(engine, "/end_weight_update", {})
            held.updating, held.manifest = False, None  # the server remembers the last one it was asked about
        return list(answer["problems"])

    def _verify(self, checksums: Mapping[str, int]) -> None:
        def problems(engine: SglangEngine) -> list[str]:
            return list(self._question(engine, VERIFY, {n: c for n, c in checksums.items() if n in engine.held.dtypes})["problems"])

        for engine, differing in zip(self._taking, self._each(problems), strict=True):
            if differing:
                raise RuntimeError(f"{engine.name} does not hold what it was sent: {_listed(differing)}")

    def _end(self, engine: SglangEngine, version: int) -> None:
        self._ask(engine, "/end_weight_update", {})
        engine.held.updating, engine.held.whole = False, True
        # Keys and values of the old weights must go, or continued rollouts attend to them.
        engine.call(f"/flush_cache?timeout={FLUSH_TIMEOUT_S:g}", {}, self._timeout_s)
        self._ask(engine, "/update_weight_version", {"new_version": str(version), "abort_all_requests": False})
        said = engine.call("/model_info", timeout_s=self._timeout_s).get("weight_version")
        if said != str(version):
            engine.lose(f"says it is on weights {said!r} after a push of {version}")

    def _question(self, engine: SglangEngine, kind: str, content: Any) -> dict[str, Any]:
        """To intake.py in the server's processes."""
        message = self._load(engine, content, kind)["message"]
        try:
            answer: dict[str, Any] = json.loads(message)
        except json.JSONDecodeError:
            engine.lose(f"{kind} was answered with {message!r}")
        return answer

    def _load(self, engine: SglangEngine, content: Any, load_format: str) -> dict[str, Any]:
        # One payload for each of the server's processes: a file descriptor can be fetched once.
        payloads = [_serialized(content) for _ in range(self._tp)]
        body = {"serialized_named_tensors": payloads, "load_format": load_format, "flush_cache": False}
        return self._ask(engine, "/update_weights_from_tensor", body)

    def _ask(self, engine: SglangEngine, path: str, body: dict[str, Any], timeout_s: float | None = None) -> dict[str, Any]:
        answer: dict[str, Any] = engine.call(path, body, timeout_s or self._timeout_s)
        if not answer.get("success"):
            engine.lose(f"{path}: {answer.get('message', answer)}")
        return answer

    def _each(self, work: Callable[[SglangEngine], T]) -> list[T]:
        """On all servers at once. All have answered when it returns or raises."""
        with ThreadPoolExecutor(max(1, len(self._taking))) as pool:
            futures = [pool.submit(work, engine) for engine in self._taking]
        return [future.result() for future in futures]

    def _flatten(self, bucket: Sequence[tuple[str, torch.Tensor]]) -> tuple[torch.Tensor, list[SimpleNamespace]]:
        """SGLang's FlattenedTensorBucket (srt/weight_sync/tensor_bucket.py), by attribute, without importing SGLang here."""
        device = bucket[0][1].device
        storages = {tensor.untyped_storage().data_ptr() for _, tensor in bucket}
        flat = self._handed_out.get(storages.pop()) if len(storages) == 1 else None
        if flat is None:
            sizes = [math.ceil(tensor.nbytes / ALIGN) * ALIGN for _, tensor in bucket]
            flat = self._new_memory(sum(sizes), device)
            views = []
            for (name, tensor), place in zip(bucket, flat.split(sizes), strict=True):
                views.append((name, place[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)))
                views[-1][1].copy_(tensor)
            bucket = views
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # the servers read it from other processes
        return flat, [_metadata(name, tensor) for name, tensor in bucket]


def _metadata(name: str, tensor: torch.Tensor) -> SimpleNamespace:
    start = tensor.storage_offset() * tensor.element_size()
    size = tensor.nbytes
    return SimpleNamespace(name=name, shape=tensor.shape, dtype=tensor.dtype, start_idx=start, end_idx=start + size, numel=size)


def _listed(problems: Sequence[str]) -> str:
    more = f" and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
    return "; ".join(problems[:NAMED]) + more


def _serialized(payload: Any) -> str:
    """What SGLang's MultiprocessingSerializer makes of it (srt/utils/common.py:2999)."""
    data = io.BytesIO()
    ForkingPickler(data).dump(payload)
    return base64.b64encode(data.getvalue()).decode()
