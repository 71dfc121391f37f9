"""A plan on paper: which model, on which cluster, and what the planner takes for granted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from megatron_rl.config.base import Config
from megatron_rl.config.model import ModelConfig, ParallelConfig
from megatron_rl.config.rollout import EngineConfig

LONGEST = 32_768  # tokens of a sequence where plan.yaml leaves it open


@dataclass(frozen=True, slots=True)
class Gpu:
    """Peak rates of the SXM part, dense, one direction. Its memory in GiB is a little less than the GB of its data sheet."""

    memory_gib: float  # what CUDA reports as total
    bf16_tflops: float
    nvlink_gb_s: float  # to the other GPUs of its node
    host_gb_s: float  # PCIe
    network_gb_s: float  # one adapter per GPU, as in NVIDIA's DGX of its time


# NVIDIA's data sheets: A100 (1758950-r4), H100 (2287922), H200 (3002446), and the DGX A100 / H100 / B200 ones for adapters (8 x HDR
# 200 Gb/s, 8 x NDR 400 Gb/s) and for B200 (1,440 GB, 72 PFLOPS FP8 sparse and 14.4 TB/s NVLink by eight). H800: NVLink at 400 GB/s.
GPUS = {
    "a100_40": Gpu(39.4, 312, 300, 32, 25),
    "a100_80": Gpu(79.1, 312, 300, 32, 25),
    "h800": Gpu(79.1, 989, 200, 64, 50),
    "h100": Gpu(79.1, 989, 450, 64, 50),
    "h200": Gpu(139.8, 989, 450, 64, 50),
    "b200": Gpu(178.3, 2250, 900, 64, 50),
}


class ClusterConfig(Config):
    gpus: PositiveInt
    gpu: str = "h100"
    gpus_per_node: PositiveInt = 8
    network_gb_s: PositiveFloat | None = None  # bytes per second, GPU and direction, between nodes; null: the GPU's usual adapter
    reserve_gib: float = Field(default=8.0, ge=0.0)  # of every GPU: CUDA contexts of trainer and engine, NCCL, graphs, fragments

    @field_validator("gpu")
    @classmethod
    def _known(cls, gpu: str) -> str:
        if gpu not in GPUS:
            raise ValueError(f"{gpu!r} is none of {', '.join(GPUS)}")
        return gpu

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            raise ValueError(f"gpus={self.gpus} are no whole nodes of gpus_per_node={self.gpus_per_node}")
        if self.reserve_gib >= GPUS[self.gpu].memory_gib:
            raise ValueError(f"reserve_gib={self.reserve_gib:g} leaves nothing of the {GPUS[self.gpu].memory_gib:g} GiB")
        return self

    @property
    def specs(self) -> Gpu:
        return GPUS[self.gpu]

    @property
    def usable_bytes(self) -> float:
        """Of one GPU, without the reserve."""
        return (self.specs.memory_gib - self.reserve_gib) * 2**30

    @property
    def network(self) -> float:
        """Bytes per second of one GPU to and from other nodes."""
        return (self.network_gb_s or self.specs.network_gb_s) * 1e9

    @property
    def node_size(self) -> int:
        return min(self.gpus, self.gpus_per_node)


class PlanRun(Config):
    model: ModelConfig
    cluster: ClusterConfig
    parallel: ParallelConfig = ParallelConfig()
    engine: EngineConfig = EngineConfig()
    sequence_tokens: PositiveInt | None = None  # the longest prompt and response; null: what the model takes, at most 32,768
    step_tokens: PositiveInt = 8_388_608  # trained per optimizer step, over all replicas
    expert_imbalance: float = Field(default=1.25, ge=1.0)  # tokens of the busiest expert rank over the mean
    kv_sequences: PositiveInt = 8  # of the longest length: what an engine's KV cache has to hold at least
    show: PositiveInt = 5  # layouts

    @model_validator(mode="after")
    def _length(self) -> Self:
        if self.longest > self.model.max_position_embeddings:
            raise ValueError(
                f"sequence_tokens={self.longest} is beyond model.max_position_embeddings={self.model.max_position_embeddings}"
            )
        return self

    @property
    def longest(self) -> int:
        return self.sequence_tokens or min(LONGEST, self.model.max_position_embeddings)

    @property
    def microbatch_tokens(self) -> int:
        """Of the largest microbatch: a sequence longer than parallel.microbatch_tokens gets one of its own."""
        return max(self.longest, self.parallel.microbatch_tokens)
