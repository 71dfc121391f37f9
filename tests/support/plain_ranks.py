"""`ports.Ranks` over a gloo world, without Megatron."""

from __future__ import annotations

import atexit
from typing import Any

import torch
import torch.distributed as dist


class PlainRanks:
    def __init__(self) -> None:
        dist.init_process_group("gloo")
        atexit.register(dist.destroy_process_group)  # gloo's threads must have ended before the interpreter does
        self.rank = self.dp_rank = dist.get_rank()
        self.world_size = self.dp_size = dist.get_world_size()

    def broadcast(self, value: Any, what: str) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self, what: str) -> None:
        dist.barrier()

    def sum_over_replicas(self, values: torch.Tensor, what: str) -> torch.Tensor:
        summed = values.clone()
        dist.all_reduce(summed)
        return summed
