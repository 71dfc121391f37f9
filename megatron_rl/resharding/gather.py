"""One bucket on its way, out of the shards that lie anywhere and into a destination's memory.

A large part goes from the live shard straight to its place, with no copy at either end. What is small, or sent in another type than
the shard's, is packed; packed parts and columns arrive behind the bucket's tensors and are unpacked from there.

Invariants:
- a full tensor is the concatenation of its parts, bit for bit, at any layout; in a smaller type, each element rounded once;
- an element that the destination holds itself is copied once, or not at all where live shards may be lent;
- a wait for another rank ends after `limit_s`, with an error that says which rank waited for which, and for what.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_rl.resharding.names import Shape
from megatron_rl.resharding.plan import ITEM_BYTES, Bucket, Message, Part, Tensor, aligned

Tensors = Sequence[tuple[str, torch.Tensor]]
Shards = Mapping[str, torch.Tensor]  # by Megatron name
Allocate = Callable[[int, torch.device], torch.Tensor]  # uint8


class RankLost(RuntimeError):
    """Another rank did not do its part in time, or is gone."""


def plain_memory(nbytes: int, device: torch.device) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


@dataclass(frozen=True)
class Carrier:
    """What all buckets of a delivery have in common. `lend`: a tensor that lies in a shard as it is wanted is handed out there."""

    rank: int
    destinations: Sequence[int]
    weights: Shards
    limit_s: float
    lend: bool = False

    @property
    def receives(self) -> bool:
        return self.rank in self.destinations

    def needs_memory(self, bucket: Bucket) -> bool:
        return self.receives and not all(self._lent(tensor) for tensor in bucket.tensors)

    @torch.no_grad()
    def start(self, bucket: Bucket, called: str, memory: torch.Tensor | None) -> Flight:
        """Sends and receives begin, and the destination's own parts are in place when it returns."""
        flight = Flight(called, self, memory)
        operations = []
        for destination in self.destinations:
            if destination != self.rank and self.rank not in bucket.sources:
                continue
            for tag, message in enumerate(bucket.messages(destination)):
                if destination == self.rank:
                    assert memory is not None
                    into = memory[message.at : message.at + message.nbytes]
                    operations.append(dist.P2POp(dist.irecv, into, message.source, tag=tag))
                    flight.peers.append(f"rank {message.source} to send {_named(message)}")
                    flight.arriving += [] if message.in_place else [message]
                elif message.source == self.rank:
                    operations.append(dist.P2POp(dist.isend, packed(message, self.weights), destination, tag=tag))
                    flight.peers.append(f"rank {destination} to take {_named(message)}")
        flight.works = dist.batch_isend_irecv(operations) if operations else []
        if self.receives:
            self._place(bucket, flight)
        return flight

    def _place(self, bucket: Bucket, flight: Flight) -> None:
        there, here = [], []
        for tensor, at in bucket.places():
            if self._lent(tensor):
                flight.tensors[tensor.name] = held(self.weights, tensor.parts[0])
                continue
            assert flight.memory is not None
            flight.tensors[tensor.name] = full = view(flight.memory, at, tensor.shape, tensor.sent)
            for part in tensor.parts:
                if part.rank == self.rank:
                    there.append(full.narrow(part.axis, part.start, part.length))
                    here.append(held(self.weights, part))
        if there:
            torch._foreach_copy_(there, here)  # on CUDA a launch for many instead of one each

    def _lent(self, tensor: Tensor) -> bool:
        return self.lend and tensor.parts[0].rank == self.rank and tensor.is_whole(tensor.parts[0])


@dataclass
class Flight:
    called: str  # "bucket 3 of 40"
    carrier: Carrier
    memory: torch.Tensor | None
    works: list[Any] = field(default_factory=list)
    peers: list[str] = field(default_factory=list)
    arriving: list[Message] = field(default_factory=list)  # to be unpacked
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def wait(self) -> None:
        deadline = time.monotonic() + self.carrier.limit_s
        # NCCL has one work for all.
        whom = self.peers if len(self.works) == len(self.peers) else ["; ".join(dict.fromkeys(self.peers))]
        for work, peer in zip(self.works, whom, strict=True):
            wait_for(work, deadline, self.carrier, f"{peer} of {self.called}")

    @torch.no_grad()
    def land(self) -> Tensors:
        """The full tensors, after `wait`; none on a rank that only sends."""
        for message in self.arriving:
            assert self.memory is not None
            unpack(message, self.memory, self.tensors)
        return list(self.tensors.items())


def wait_for(work: Any, deadline: float, carrier: Carrier, whom: str) -> None:
    try:
        work.wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise RankLost(f"rank {carrier.rank} waited (at most {carrier.limit_s:g} s) for {whom}: {reason}") from error


def held(weights: Shards, part: Part) -> torch.Tensor:
    return weights[part.shard].narrow(part.axis, part.local_start, part.length)


def packed(message: Message, weights: Shards) -> torch.Tensor:
    """The message's bytes: the shard's own where that is possible."""
    (tensor, part), *more = message.parts
    if not more and tensor.sent == tensor.dtype:
        return held(weights, part).contiguous().view(-1).view(torch.uint8)
    packet = plain_memory(message.nbytes, weights[part.shard].device)
    places = [(view(packet, at, tensor.part_shape(part), tensor.sent), part) for tensor, part, at in _laid_out(message)]
    torch._foreach_copy_([place for place, _ in places], [held(weights, part) for _, part in places])
    return packet


def unpack(message: Message, memory: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> None:
    there, here = [], []
    for tensor, part, at in _laid_out(message):
        there.append(tensors[tensor.name].narrow(part.axis, part.start, part.length))
        here.append(view(memory, message.at + at, tensor.part_shape(part), tensor.sent))
    torch._foreach_copy_(there, here)


def view(memory: torch.Tensor, at: int, shape: Shape, dtype: str) -> torch.Tensor:
    return memory[at : at + math.prod(shape) * ITEM_BYTES[dtype]].view(getattr(torch, dtype)).view(shape)


def _laid_out(message: Message) -> Iterator[tuple[Tensor, Part, int]]:
    at = 0
    for tensor, part in message.parts:
        yield tensor, part, at
        at += aligned(tensor.part_bytes(part))


def _named(message: Message) -> str:
    first = message.parts[0][0].name
    return first if len(message.parts) == 1 else f"{first} and {len(message.parts) - 1} more"
