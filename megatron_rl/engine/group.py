"""A process group of the trainer (rank 0) and every process of some servers, for weights that cannot travel by shared memory.

SGLang joins with `init_custom_process_group` (srt/utils/common.py:2797) on a TCP store of ours. Its group is one backend behind the
store prefixes of torch's `_new_process_group_helper` (distributed_c10d.py); here that backend is built directly, so that it is no
part of the trainer's own torch.distributed, and can be given up alone.

Invariants: nothing waits longer than `timeout_s`, and what was waited for is named; a server that dies during a broadcast ends it
for all, and only that server is lost (with NCCL the others are too: they cannot leave a broadcast); a group that broke is built
anew by the next push.
"""

from __future__ import annotations

import itertools
import socket
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from megatron_rl.engine.client import SglangEngine
from megatron_rl.types import EngineLost

POLL_S = 0.002
GRACE_S = 10.0  # for servers to answer once the trainer has given a broadcast up
_serial = itertools.count()


class EngineGroup:
    def __init__(self, engines: Sequence[SglangEngine], tp: int, device: torch.device, timeout_s: float) -> None:
        self.engines, self.device, self._timeout_s = list(engines), device, timeout_s
        self._name = f"weights_{next(_serial)}"
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)
        self._pool = ThreadPoolExecutor(len(self.engines), thread_name_prefix=self._name)
        limit = timedelta(seconds=timeout_s)
        size = 1 + tp * len(self.engines)
        store = TCPStore("localhost", 0, size, is_master=True, timeout=limit, wait_for_workers=False)
        joining = []
        for index, engine in enumerate(self.engines):
            body = {
                "master_address": _address_towards(engine.host),
                "master_port": store.port,
                "rank_offset": 1 + tp * index,
                "world_size": size,
                "group_name": self._name,
                "backend": "nccl" if device.type == "cuda" else "gloo",
            }
            joining.append(self._pool.submit(self._ask, engine, "/init_weights_update_group", body))
        prefixed = PrefixStore(f"{device.type}/", PrefixStore(f"{self._name}/", PrefixStore(self._name, store)))
        self._backend: Any = None
        error = None
        try:
            self._backend = _backend(prefixed, size, device, limit)
        except RuntimeError as raised:
            error = f"no group with the trainer after {timeout_s:g} s ({str(raised).splitlines()[0]})"
        del store, prefixed  # where joining failed, the end of the store tells the servers
        self._settle(joining, error)

    def load(self, bucket: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Broadcast the tensors, and wait until all servers have loaded them."""
        # SGLang cuts the buffer without gaps (weight_sync/tensor_bucket.py): longer types first keeps every tensor aligned.
        bucket = sorted(bucket, key=lambda named: -named[1].element_size())
        buffer = self._packed([tensor for _, tensor in bucket])
        body = {
            "names": [name for name, _ in bucket],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
            "shapes": [list(tensor.shape) for _, tensor in bucket],
            "group_name": self._name,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        loading = [self._pool.submit(self._ask, e, "/update_weights_from_distributed", body) for e in self.engines]
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self._settle(loading, self._wait(self._backend.broadcast([buffer], options), loading))

    def close(self) -> None:
        for engine in self.engines:
            if engine.lost is None:
                engine.call("/destroy_weights_update_group", {"group_name": self._name}, self._timeout_s, refusable=True)
        self._give_up()

    def _packed(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if self._buffer.numel() < nbytes:
            self._buffer = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        at = 0
        for tensor in tensors:
            end = at + tensor.numel() * tensor.element_size()
            self._buffer[at:end].view(tensor.dtype).view(tensor.shape).copy_(tensor)
            at = end
        return self._buffer[:nbytes]

    def _wait(self, work: Any, asked: Sequence[Future[dict[str, Any]]]) -> str | None:
        """For the broadcast; why it came to nothing."""
        deadline = time.monotonic() + self._timeout_s
        while not work.is_completed():
            if any(_failed(future) for future in asked):
                return "a broadcast that one of them left was given up"
            if time.monotonic() > deadline:
                return f"not received after engine.sync.timeout_s={self._timeout_s:g}"
            time.sleep(POLL_S)
        try:
            work.wait()
        except RuntimeError as error:
            return str(error).splitlines()[0]
        return None

    def _settle(self, asked: Sequence[Future[dict[str, Any]]], error: str | None) -> None:
        """All servers' answers. The dead are the cause: those that only could not go on without them are kept."""
        if error is not None:
            self._give_up()
        results = [future.exception() or future.result() for future in asked]
        lost = [result for result in results if isinstance(result, BaseException)]
        refused = [(e, r) for e, r in zip(self.engines, results, strict=True) if isinstance(r, dict) and not r.get("success")]
        if lost or refused or error is not None:
            self._give_up()
        if lost:
            raise lost[0]
        if refused:
            refused[0][0].lose(str(refused[0][1].get("message")))
        if error is not None:
            raise EngineLost(f"{', '.join(engine.name for engine in self.engines)}: {error}")

    def _ask(self, engine: SglangEngine, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = engine.call(path, body, self._timeout_s + GRACE_S, refusable=True)
        return answer

    @property
    def broken(self) -> bool:
        return self._backend is None

    def _give_up(self) -> None:
        if self._backend is not None:
            self._backend.abort()
        self._backend = None
        self._pool.shutdown(wait=False)


def is_on_this_machine(host: str) -> bool:
    """Whether its address is one of ours: what is sent there never leaves."""
    address = socket.gethostbyname(host)
    return _address_towards(address) == address


def _address_towards(host: str) -> str:
    """Ours, as the server sees it: no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        address: str = probe.getsockname()[0]
        return address


def _backend(store: Any, size: int, device: torch.device, limit: timedelta) -> Any:
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = limit
        return dist.ProcessGroupNCCL(store, 0, size, options)
    return dist.ProcessGroupGloo(store, 0, size, limit)


def _failed(future: Future[dict[str, Any]]) -> bool:
    return future.done() and (future.exception() is not None or not future.result().get("success"))
