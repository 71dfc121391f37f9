"""The engines' side of a weight push: tensors go from the trainer's memory into every running server, between begin and end.

Each bucket is flattened into one buffer that the servers map: on a CPU shared memory whose file descriptor travels over
multiprocessing's own authenticated socket, on CUDA memory whose IPC handle stands in the request. No file, and no copy per server.
Requires that nothing is being generated (everything was aborted or has ended before).

Invariants: a push that returned from `end` is in every server: weights loaded, caches flushed, and the server says it is on
`version`; a server that did not confirm is lost, and the EngineLost names it; the caller's tensors may be reused when `send`
returns.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any

import torch
import torch.multiprocessing  # its import teaches ForkingPickler tensors

from megatron_rl.engine.client import SglangEngine
from megatron_rl.engine.launcher import SglangEngines

ALIGN = 16  # bytes; a tensor is viewed in its own type at its place in the buffer
FLUSH_TIMEOUT_S = 30.0  # for the last aborted requests to drain


class EngineWeights:
    """Implements `ports.WeightSink`."""

    def __init__(self, engines: SglangEngines, tp: int = 1, timeout_s: float = 600.0) -> None:
        self._engines, self._tp, self._timeout_s = engines, tp, timeout_s
        self._taking: list[SglangEngine] = []
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def begin(self) -> None:
        self._taking = list(self._engines.alive)
        self._each(self._begin)

    def send(self, bucket: Sequence[tuple[str, torch.Tensor]]) -> None:
        metadata = self._flatten(bucket)
        self._each(lambda engine: self._update(engine, metadata))

    def end(self, version: int) -> None:
        self._each(lambda engine: self._end(engine, version))

    def _begin(self, engine: SglangEngine) -> None:
        if engine.updating:  # a push that another engine's death ended
            self._ask(engine, "/end_weight_update", {})
        self._ask(engine, "/begin_weight_update", {})
        engine.updating = True

    def _update(self, engine: SglangEngine, metadata: list[SimpleNamespace]) -> None:
        # One payload for each of the server's processes: a file descriptor can be fetched once.
        payloads = [_serialized({"flattened_tensor": self._buffer, "metadata": metadata}) for _ in range(self._tp)]
        body = {"serialized_named_tensors": payloads, "load_format": "flattened_bucket", "flush_cache": False}
        self._ask(engine, "/update_weights_from_tensor", body)

    def _end(self, engine: SglangEngine, version: int) -> None:
        self._ask(engine, "/end_weight_update", {})
        engine.updating = False
        # Keys and values of the old weights must go, or continued rollouts attend to them.
        engine.call(f"/flush_cache?timeout={FLUSH_TIMEOUT_S:g}", {}, self._timeout_s)
        self._ask(engine, "/update_weight_version", {"new_version": str(version), "abort_all_requests": False})
        said = engine.call("/model_info", timeout_s=self._timeout_s).get("weight_version")
        if said != str(version):
            engine.lose(f"says it is on weights {said!r} after a push of {version}")

    def _ask(self, engine: SglangEngine, path: str, body: dict[str, Any]) -> None:
        answer = engine.call(path, body, self._timeout_s)
        if not answer.get("success"):
            engine.lose(f"{path}: {answer.get('message', answer)}")

    def _each(self, work: Callable[[SglangEngine], None]) -> None:
        """On all servers at once. All have answered when it returns or raises."""
        with ThreadPoolExecutor(max(1, len(self._taking))) as pool:
            errors = [future.exception() for future in [pool.submit(work, engine) for engine in self._taking]]
        for error in errors:
            if error is not None:
                raise error

    def _flatten(self, bucket: Sequence[tuple[str, torch.Tensor]]) -> list[SimpleNamespace]:
        """SGLang's FlattenedTensorBucket (srt/weight_sync/tensor_bucket.py), by attribute, without importing SGLang here."""
        metadata, at = [], 0
        for name, tensor in bucket:
            size = tensor.numel() * tensor.element_size()
            metadata.append(
                SimpleNamespace(name=name, shape=tensor.shape, dtype=tensor.dtype, start_idx=at, end_idx=at + size, numel=size)
            )
            at = math.ceil((at + size) / ALIGN) * ALIGN
        device = bucket[0][1].device
        if self._buffer.numel() < at or self._buffer.device != device:
            self._buffer = torch.empty(at, dtype=torch.uint8, device=device)
            if device.type == "cpu":
                self._buffer.share_memory_()
        for meta, (_, tensor) in zip(metadata, bucket, strict=True):
            self._buffer[meta.start_idx : meta.end_idx].view(meta.dtype).view(meta.shape).copy_(tensor)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # the servers read it from other processes
        return metadata


def _serialized(payload: dict[str, Any]) -> str:
    """What SGLang's MultiprocessingSerializer makes of it (srt/utils/common.py:2999)."""
    data = io.BytesIO()
    ForkingPickler(data).dump(payload)
    return base64.b64encode(data.getvalue()).decode()
