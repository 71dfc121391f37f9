"""Moves the policy's weights: gathers bucket after bucket of full Hugging Face tensors, and pushes them into the engines.

A rank sends all it has for a bucket as one packet, since per-tensor messages cost more than their bytes. Tensors handed out are
views into one buffer, each at a multiple of 64 bytes.

Invariants:
- a full tensor is the concatenation of its shards, bit for bit, at any layout;
- memory at a destination: the policy, one bucket, and the packets of one bucket;
- a consumer that fails ends the delivery on every rank with the same error, and no rank is left waiting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.distributed as dist

from megatron_rl.config.errors import UserError
from megatron_rl.config.model import ModelConfig, ParallelConfig
from megatron_rl.ports import Ranks, WeightSink
from megatron_rl.resharding.families import names_of
from megatron_rl.resharding.names import Shape
from megatron_rl.resharding.plan import ITEM_BYTES, Bucket, Shard, make_plan
from megatron_rl.types import EngineLost, TensorSpec

Tensors = Sequence[tuple[str, torch.Tensor]]
Shards = Mapping[str, torch.Tensor]  # by Megatron name
Consume = Callable[[Tensors], None]


def inventory(weights: Shards) -> dict[str, Shard]:
    return {name: Shard(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for name, tensor in weights.items()}


class Resharder:
    """Full tensors by Hugging Face name, from shards that lie anywhere.

    `weights()` is asked anew for every gather, since storage may move (offload); names and shapes must stay. Ranks in
    `destinations` receive; the others only send.
    """

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        weights: Callable[[], Shards],
        ranks: Ranks,
        bucket_bytes: int,
        destinations: Sequence[int] = (0,),
    ) -> None:
        self._weights, self._ranks, self._destinations = weights, ranks, tuple(destinations)
        inventories: list[dict[str, Shard]] = [{} for _ in range(ranks.world_size)]
        dist.all_gather_object(inventories, inventory(weights()))
        self.buckets = make_plan(names_of(model), parallel, inventories, bucket_bytes, self._destinations[0])

    def gather(self) -> Iterator[Tensors]:
        """*Collective*: every bucket in turn, empty on ranks that are no destination. The memory is reused for the next one."""
        weights = self._weights()
        device = next(iter(weights.values())).device
        room = max(bucket.nbytes for bucket in self.buckets) if self._ranks.rank in self._destinations else 0
        buffer = torch.empty(room, dtype=torch.uint8, device=device)
        for bucket in self.buckets:
            shards = self._exchange(bucket, weights, device)
            yield _assemble(bucket, shards, buffer) if room else []

    def deliver(self, consumer: AbstractContextManager[Consume] | None) -> None:
        """*Collective*: all buckets into rank 0's `consumer`; it commits on a clean exit. Its error is raised on every rank."""
        error: Exception | None = None
        buckets = self.gather()
        if consumer is not None:
            try:
                with consumer as consume:
                    for tensors in buckets:
                        consume(tensors)
            except Exception as raised:
                error = raised
        for _ in buckets:  # what the other ranks still have to send
            pass
        for_others = error if isinstance(error, (EngineLost, UserError, type(None))) else RuntimeError(f"on rank 0: {error!r}")
        told: Exception | None = self._ranks.broadcast(for_others, "the end of a weight delivery")
        if told is not None:
            raise error or told

    @torch.no_grad()
    def _exchange(self, bucket: Bucket, weights: Shards, device: torch.device) -> dict[int, Shards]:
        """By source rank, the shards of the bucket by Megatron name; all of them at a destination."""
        me = self._ranks.rank
        shards: dict[int, Shards] = {me: weights}
        operations = []
        for source in bucket.sources():
            receivers = [rank for rank in self._destinations if rank != source]
            if source == me and receivers:
                packet, views = _packet(bucket, source, device)
                for name, view in views.items():
                    view.copy_(weights[name])
                operations += [dist.P2POp(dist.isend, packet, rank) for rank in receivers]
            elif me in receivers:
                packet, shards[source] = _packet(bucket, source, device)
                operations.append(dist.P2POp(dist.irecv, packet, source))
        for work in dist.batch_isend_irecv(operations) if operations else []:
            work.wait()
        return shards


class PushToEngines:
    """`ports.WeightSync`; the sink exists on rank 0 only."""

    def __init__(self, resharder: Resharder, sink: WeightSink | None) -> None:
        self._resharder, self._sink = resharder, sink

    def push(self, version: int) -> None:
        self._resharder.deliver(_bracket(self._sink, self._resharder.buckets, version) if self._sink else None)


@contextmanager
def _bracket(sink: WeightSink, buckets: Sequence[Bucket], version: int) -> Iterator[Consume]:
    sink.begin(
        [[TensorSpec(*named, item.dtype) for item in b.items for named in zip(item.hf, item.shapes, strict=True)] for b in buckets]
    )
    yield sink.send
    sink.end(version)


def _packet(bucket: Bucket, source: int, device: torch.device) -> tuple[torch.Tensor, Shards]:
    layout, nbytes = bucket.sent_by(source)
    packet = torch.empty(nbytes, dtype=torch.uint8, device=device)
    return packet, {name: _view(packet, at, shard.shape, shard.dtype) for name, (shard, at) in layout.items()}


@torch.no_grad()
def _assemble(bucket: Bucket, shards: Mapping[int, Shards], buffer: torch.Tensor) -> Tensors:
    tensors, at = [], 0
    for item in bucket.items:
        places = zip(item.offsets, item.shapes, strict=False)
        views = [_view(buffer, at + offset, shape, item.dtype) for offset, shape in places]
        at += item.nbytes
        for piece in item.pieces:
            shard = shards[piece.rank][piece.name]
            for span in piece.spans:
                part = shard.narrow(span.axis, span.local_start, span.length)
                views[span.tensor].narrow(span.axis, span.hf_start, span.length).copy_(part)
        tensors += list(zip(item.hf, views, strict=True))
    return tensors


def _view(buffer: torch.Tensor, at: int, shape: Shape, dtype: str) -> torch.Tensor:
    nbytes = math.prod(shape) * ITEM_BYTES[dtype]
    return buffer[at : at + nbytes].view(getattr(torch, dtype)).view(shape)
