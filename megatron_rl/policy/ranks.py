"""Where this process stands among the policy's ranks: torch.distributed, Megatron's process groups, and three collectives.

Invariants: a wait beyond `parallel.timeout_s` raises and says for what; a rank that waits sleeps (gloo blocks on a condition, it
does not spin), so that the engines have the cores; the ranks of one replica (CP, TP and PP) share a dp_rank, and expert-parallel
ranks are data-parallel ones.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_rl.config.model import ModelConfig, ParallelConfig
from megatron_rl.policy import platform_cpu

T = TypeVar("T")


class MegatronRanks:
    """`ports.Ranks`, in the process group that it finds; without one, in one that it makes: as torchrun's environment says, or
    of this process alone."""

    def __init__(self, parallel: ParallelConfig, model: ModelConfig, seed: int = 0) -> None:
        platform_cpu.install()
        self.timeout_s = parallel.timeout_s
        self.device = _device()
        timeout = timedelta(seconds=parallel.timeout_s)
        self._made_group = not dist.is_initialized()
        if self._made_group:
            _init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        parallel.check(self.world_size, model)
        _init_megatron(parallel, seed)
        from megatron.core import parallel_state as mpu

        self._replicas = mpu.get_data_parallel_group()
        self.dp_rank, self.dp_size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
        # Objects and barriers go over gloo on any device: NCCL's waits occupy the device that the engines are using.
        self._gloo = dist.new_group(backend="gloo", timeout=timeout)

    def broadcast(self, value: T | None, what: str) -> T:
        box: list[Any] = [value]
        try:
            dist.broadcast_object_list(box, src=0, group=self._gloo)
        except RuntimeError as error:
            raise self._lost(what, error) from error
        return box[0]

    def barrier(self, what: str) -> None:
        try:
            dist.barrier(group=self._gloo)
        except RuntimeError as error:
            raise self._lost(what, error) from error

    def sum_over_replicas(self, values: torch.Tensor, what: str) -> torch.Tensor:
        summed = values.clone()
        try:
            dist.all_reduce(summed, group=self._replicas)
        except RuntimeError as error:
            raise self._lost(what, error) from error
        return summed

    def close(self) -> None:
        from megatron.core import parallel_state as mpu

        mpu.destroy_model_parallel()
        dist.destroy_process_group(None if self._made_group else self._gloo)

    def _lost(self, what: str, error: RuntimeError) -> RuntimeError:
        return RuntimeError(f"rank {self.rank} waited for {what} (at most {self.timeout_s:g} s) and got: {error}")


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return platform_cpu.CPU
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def _init_process_group(backend: str, timeout: timedelta) -> None:
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        store = torch._C._distributed_c10d.HashStore()
        dist.init_process_group(backend, timeout=timeout, store=store, rank=0, world_size=1)


def _init_megatron(parallel: ParallelConfig, seed: int) -> None:
    from megatron.core import parallel_state as mpu
    from megatron.core import tensor_parallel

    mpu.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=parallel.etp,
        distributed_timeout_minutes=parallel.timeout_s / 60,
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
