"""Delivers the policy's weights: full Hugging Face tensors, bucket after bucket, to whoever consumes them.

While a thread hands bucket i to the consumer (an engine, a file), bucket i + 1 is gathered into other memory; a rank that only
sends is one bucket ahead.

Invariants:
- memory at a destination: the policy and two buckets; beside them a tensor larger than a bucket, while it is on its way;
- a consumer that fails ends the delivery on every rank with the same error, and no rank is left waiting;
- inventories that do not make up the model are the same ValueError on every rank, before the first byte.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_rl.checksum import CHUNK, checksum, contiguous_strides
from megatron_rl.config.errors import UserError
from megatron_rl.config.model import ModelConfig, ParallelConfig
from megatron_rl.ports import Ranks
from megatron_rl.resharding.families import names_of
from megatron_rl.resharding.gather import Allocate, Carrier, Flight, RankLost, Shards, Tensors, held, plain_memory, wait_for
from megatron_rl.resharding.plan import Plan, Shard, make_plan
from megatron_rl.types import EngineLost

log = logging.getLogger(__name__)
T = TypeVar("T")
Consume = Callable[[Tensors], None]
TIMEOUT_S = 7200.0  # of a wait for another rank, which may itself be waiting for a disk


def inventory(weights: Shards, frozen: Callable[[str], bool] = lambda name: False) -> dict[str, Shard]:
    return {
        name: Shard(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), frozen(name)) for name, tensor in weights.items()
    }


class Resharder:
    """Full tensors by Hugging Face name, from shards that lie anywhere.

    `weights()` is asked anew for every delivery, since storage may move (offload); names and shapes must stay. Ranks in
    `destinations` receive; the others only send. `frozen` says of a Megatron name that no step changes it.
    """

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        weights: Callable[[], Shards],
        ranks: Ranks,
        bucket_bytes: int,
        destinations: Sequence[int] = (0,),
        *,
        frozen: Callable[[str], bool] = lambda name: False,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self.ranks, self.destinations = ranks, tuple(destinations)
        self._weights, self._timeout_s = weights, timeout_s
        inventories: list[dict[str, Shard]] = [{} for _ in range(ranks.world_size)]
        dist.all_gather_object(inventories, inventory(weights(), frozen))
        self.plan = make_plan(names_of(model), parallel, inventories, bucket_bytes, self.destinations)
        if ranks.rank == 0 and (large := self.plan.oversized):
            largest = max(large, key=lambda tensor: tensor.nbytes)
            log.info(
                "%d tensors need more than a bucket of %.4g MB and travel alone; the largest is %s with %.4g MB",
                len(large),
                bucket_bytes / 2**20,
                largest.name,
                largest.nbytes / 2**20,
            )

    def deliver(
        self,
        consumer: AbstractContextManager[Consume] | None,
        plan: Plan | None = None,
        allocate: Allocate | None = None,
    ) -> None:
        """*Collective*: all buckets of the plan into rank 0's `consumer`, which is called from a thread of its own and commits on a
        clean exit. Its error is raised on every rank. With `allocate` every tensor lies in memory from there; without, those that
        lie in a shard as they are wanted stay there."""
        error: Exception | None = None
        flights = self._flights(plan or self.plan, allocate or plain_memory, lend=allocate is None)
        if consumer is not None:
            try:
                with consumer as consume:
                    self._consume(flights, consume)
            except RankLost:  # the others cannot be told
                raise
            except Exception as raised:
                error = raised
        for _ in flights:  # what the other ranks still have to send
            pass
        shared(self.ranks, "the end of a weight delivery", None, error)

    def gather(self, plan: Plan | None = None) -> Iterator[Tensors]:
        """*Collective*: every bucket in turn, empty on ranks that are no destination. Memory is reused for the next but one."""
        return (flight.land() for flight in self._flights(plan or self.plan, plain_memory, lend=True))

    @torch.no_grad()
    def checksums(self, dtypes: Mapping[str, str]) -> dict[str, int]:
        """*Collective*: of each full tensor named, in the type named, from the shards as they lie."""
        carrier = self._carrier(lend=False)
        tensors = [tensor for bucket in self.plan.buckets for tensor in bucket.tensors if tensor.name in dtypes]
        sums = torch.zeros(len(tensors), dtype=torch.int64, device=self._device(carrier))
        for number, tensor in enumerate(tensors):
            strides, dtype = contiguous_strides(tensor.shape), getattr(torch, dtypes[tensor.name])
            for part in tensor.parts:
                if part.rank == carrier.rank:
                    rows = held(carrier.weights, part)
                    offset = part.start * strides[part.axis]
                    for piece in rows.split(max(1, CHUNK // max(1, rows[0].numel()))):
                        sums[number] += checksum(piece.to(dtype), offset, strides)
                        offset += len(piece) * strides[0]
        work = dist.all_reduce(sums, async_op=True)
        wait_for(work, time.monotonic() + self._timeout_s, carrier, "the other ranks' checksums")
        return dict(zip((tensor.name for tensor in tensors), sums.tolist(), strict=True))

    def _carrier(self, lend: bool) -> Carrier:
        return Carrier(self.ranks.rank, self.destinations, self._weights(), self._timeout_s, lend)

    def _device(self, carrier: Carrier) -> torch.device:
        return next(iter(carrier.weights.values())).device

    def _flights(self, plan: Plan, allocate: Allocate, lend: bool) -> Iterator[Flight]:
        """Every bucket in turn, arrived. When the next one is asked for, the one before must have been consumed."""
        carrier = self._carrier(lend)
        device = self._device(carrier)
        size = max((bucket.room for bucket in plan.buckets if bucket.room <= plan.bucket_bytes), default=0)
        memory: dict[int, torch.Tensor] = {}  # of even and odd buckets
        under_way: deque[Flight] = deque()
        for number, bucket in enumerate(plan.buckets):
            room = None
            if carrier.needs_memory(bucket):
                if bucket.room > plan.bucket_bytes:
                    room = allocate(bucket.room, device)
                else:
                    room = memory[number % 2] = memory[number % 2] if number % 2 in memory else allocate(size, device)
            under_way.append(carrier.start(bucket, f"bucket {number + 1} of {len(plan.buckets)}", room))
            room = None
            if carrier.receives or len(under_way) > 1:
                under_way[0].wait()
                yield under_way.popleft()
        for flight in under_way:
            flight.wait()
            yield flight

    def _consume(self, flights: Iterator[Flight], consume: Consume) -> None:
        device = self._device(self._carrier(lend=False))
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        with ThreadPoolExecutor(1) as thread:
            pending: Future[None] | None = None
            for flight in flights:
                arrived = torch.cuda.current_stream(device).record_event() if stream else None
                if pending is not None:
                    pending.result()
                pending = thread.submit(_hand_over, flight, consume, stream, arrived)
            if pending is not None:
                pending.result()


def _hand_over(flight: Flight, consume: Consume, stream: torch.cuda.Stream | None, arrived: torch.cuda.Event | None) -> None:
    if stream is None or arrived is None:
        consume(flight.land())
        return
    with torch.cuda.stream(stream):
        stream.wait_event(arrived)
        consume(flight.land())
        stream.synchronize()  # the memory is filled again from another stream


def shared(ranks: Ranks, what: str, value: T | None, error: Exception | None) -> T:
    """*Collective*: rank 0's value, or its error, raised on every rank."""
    plain = isinstance(error, (EngineLost, UserError, type(None)))
    value, told = ranks.broadcast((value, error if plain else RuntimeError(f"on rank 0: {error!r}")), what)
    if told is not None:
        raise error or told
    return value  # type: ignore[return-value]
