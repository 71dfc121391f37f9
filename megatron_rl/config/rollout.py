"""Generation: the engines, the scheduler's budget, sampling, and the reward workers."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from megatron_rl.config.base import Config


class SyncConfig(Config):
    """A push of the policy's weights into the engines."""

    bucket_mb: PositiveFloat = 256.0
    timeout_s: PositiveFloat = 600.0  # of each step of a push: joining, a bucket, the commit
    verify: bool = False  # after each push, compare a checksum of every tensor with what the engines hold
    transport: Literal["auto", "shared_memory", "group"] = "auto"  # shared memory (on CUDA: IPC), or a process group
    quantize: Literal["none", "fp8"] = "none"  # fp8: float8_e4m3fn in blocks of 128 x 128, for engines that serve such checkpoints


class EngineConfig(Config):
    """SGLang servers. `server_args` reaches any flag of `sglang.launch_server` that has no key here."""

    count: PositiveInt = 1
    tp: PositiveInt = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # auto: as model.dtype; where that is auto, too, or in an evaluation: bfloat16 on CUDA, float32 on a CPU
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    deterministic: bool = False  # a request's seed decides its samples (SGLang's deterministic inference)
    host: str = "127.0.0.1"
    port: int = Field(default=0, ge=0, le=65_535)  # engine i listens on port + i; 0: any free port
    api_key: str | None = None  # null: a fresh random key per run
    max_running_requests: PositiveInt = 256
    max_total_tokens: PositiveInt | None = None  # KV cache, in tokens; null: SGLang decides from memory
    mem_fraction_static: float = Field(default=0.5, gt=0.0, lt=1.0)
    threads: PositiveInt = 1  # OpenMP threads of a CPU engine
    stream_interval: PositiveInt = 8  # tokens between two streamed messages of a request
    startup_timeout_s: PositiveFloat = 300.0
    stall_timeout_s: PositiveFloat = 60.0  # of silence, until the engine is asked whether it is well; and to answer that
    request_timeout_s: PositiveFloat = 600.0  # without any message from an engine that says it is well
    max_restarts: NonNegativeInt = 100  # over the run
    server_args: dict[str, Any] = Field(default_factory=dict)
    sync: SyncConfig = SyncConfig()


class RolloutConfig(Config):
    """C3PO++ (arXiv 2510.18855, Algorithm 1)."""

    scheduler: Literal["c3po_pp", "synchronous", "count"] = "c3po_pp"
    groups_per_phase: PositiveInt | None = None  # of scheduler=count, and needed there: finished groups that end a phase
    unfinished: Literal["carry", "discard"] = "carry"  # of scheduler=count: what becomes of the others
    token_budget: PositiveInt  # Phi: generated tokens per rollout phase
    budget_counts: Literal["generated", "finished"] = "generated"
    pool_capacity: PositiveInt  # Omega: unfinished rollouts, running or carried
    group_size: PositiveInt
    retention_bound: NonNegativeInt | None = None  # sigma, in steps; null: from the formula of the banner, so that none is stale
    on_stale: Literal["finish", "restart", "drop_group"] = "finish"
    warm_start: bool = False  # the first phase also waits for the groups it began with, the long ones among them
    group_release: Literal["complete", "early"] = (
        "complete"  # early: what has ended of a group by a phase's end trains before the rest
    )
    temperature: float = Field(default=1.0, ge=0.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=-1, ge=-1)
    keep_sampling_mask: bool = False  # all log-probs are of the softmax over what top_p and top_k left of the vocabulary
    max_prompt_tokens: PositiveInt = 1024
    max_response_tokens: PositiveInt = 4096
    timeout_s: PositiveFloat = 3600.0  # of one phase

    @model_validator(mode="after")
    def _pool(self) -> Self:
        if self.pool_capacity < self.group_size:
            raise ValueError(f"pool_capacity={self.pool_capacity} holds no group of group_size={self.group_size}")
        if self.scheduler == "count" and not 1 <= (self.groups_per_phase or 0) <= self.pool_capacity // self.group_size:
            raise ValueError(
                f"groups_per_phase={self.groups_per_phase}: scheduler=count needs a number of groups that the pool holds, "
                f"at most pool_capacity // group_size = {self.pool_capacity // self.group_size}"
            )
        if self.group_release == "early" and (self.scheduler != "c3po_pp" or self.on_stale == "drop_group"):
            raise ValueError("group_release=early needs scheduler=c3po_pp, and on_stale=finish or restart")
        if self.top_k == 0:
            raise ValueError("top_k=0 leaves no token to sample; -1 means the whole vocabulary")
        if self.keep_sampling_mask and (self.temperature == 0 or self.top_k < 2):  # SGLang reports no set that has no limit
            raise ValueError(
                f"keep_sampling_mask=true needs temperature > 0 and top_k of 2 or more (beside any top_p), "
                f"not temperature={self.temperature:g} and top_k={self.top_k}"
            )
        return self

    @property
    def sigma(self) -> int:
        """A rollout grows by about budget / pool tokens a step: with sigma >= L_max Omega / Phi none outgrows its age bound."""
        if self.retention_bound is not None:
            return self.retention_bound
        return -(-self.max_response_tokens * self.pool_capacity // self.token_budget)


class LengthConfig(Config):
    """What a response's length adds to its value; lengths are tokens, clamped at `max_tokens`."""

    method: Literal["none", "cosine", "soft_overlong"] = "none"
    max_tokens: PositiveInt | None = None  # null: the longest response of the run
    correct: tuple[float, float] = (0.5, -0.5)  # cosine: of a correct answer of no length, and of the greatest
    correct_cap: float = 0.25  # and at most
    wrong: tuple[float, float] = (-0.5, 0.0)  # the same of any other
    cache_tokens: PositiveInt = 4096  # soft_overlong: the last so many before max_tokens cost up to 1

    @model_validator(mode="after")
    def _order(self) -> Self:
        worst, best = 1.0 + min(*self.correct, self.correct_cap), max(self.wrong)
        if self.method == "cosine" and worst <= best:
            raise ValueError(f"a correct answer could be worth {worst:g} and a wrong one {best:g}: correct must be worth more")
        if self.method == "soft_overlong" and self.max_tokens and self.cache_tokens > self.max_tokens:
            raise ValueError(f"cache_tokens={self.cache_tokens} is more than max_tokens={self.max_tokens}")
        return self


class CodeConfig(Config):
    """Programs of responses, in sandboxes."""

    marks: Literal["all", "fraction"] = "all"  # all: 1 if every test passes, else 0; fraction: the share that passes
    timeout_s: PositiveFloat = 5.0  # of wall time a response, and of processor time a process
    memory_mb: int = Field(default=512, ge=64)  # of resident memory a sandbox, and of address space a process
    processes: int = Field(default=16, ge=2)  # of a sandbox, threads included
    output_kb: int = Field(default=1024, gt=0, le=1024)  # that a program may write per test
    unsafe: bool = False  # where no sandbox can be made: run programs without one


class RewardConfig(Config):
    workers: PositiveInt = 1
    timeout_s: PositiveFloat = 10.0  # of wall time a response
    cpu_s: PositiveFloat = 5.0  # of the worker's processor time a response
    memory_mb: int = Field(default=4096, ge=256)  # of address space a worker
    exclude_failed: bool = True  # a timeout or error leaves the group instead of counting as zero
    # where a prompt's metadata do not say it
    math_mode: Literal["lenient", "strict"] = "lenient"
    format: tuple[Literal["think", "answer", "boxed"], ...] = Field(default=("think", "boxed"), min_length=1)
    mixture: dict[str, PositiveFloat] = Field(default_factory=dict)  # verifier -> weight; "own": the one that the prompt names
    length: LengthConfig = LengthConfig()
    code: CodeConfig = CodeConfig()
