"""A simulated rollout schedule: prompts and their lengths, the schedulers to compare, and what engines are like."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from megatron_rl.config.base import Config

Scheduler = Literal["c3po_pp", "synchronous", "count"]


class LengthsConfig(Config):
    path: str | None = None  # a CSV: a response a row, or client,window_s,output_tokens,prob; null: long reasoning as of Ring-1T
    column: str | None = None  # of a trace: the one with the lengths; null: output_tokens or the like
    scale: PositiveFloat = 1.0
    max_tokens: PositiveInt = 65_536  # longer ones end here
    members: Literal["independent", "client"] = "independent"  # of a group: of any client, or all of the same one
    again: Literal["redraw", "repeat"] = "redraw"  # a restarted or dropped rollout's next attempt: another length, or the same
    seed: NonNegativeInt = 0


class EnginesConfig(Config):
    count: PositiveInt = 64
    slots: PositiveInt = 256  # rollouts that run at once
    step_s: PositiveFloat = 0.02  # a decode step of b rollouts takes step_s + step_s_per_rollout x b
    step_s_per_rollout: NonNegativeFloat = 0.00005
    prefill_tokens_per_s: PositiveFloat | None = 30_000.0  # null: prefill is free
    kv_tokens: PositiveInt | None = None  # of one engine; null: as many as it takes, and the report says how many
    prompt_tokens: NonNegativeInt = 256
    stream_interval: PositiveInt = 8  # tokens between two messages of a rollout


class CountConfig(Config):
    """The baseline that over-samples and stops at a number of complete groups."""

    over_sample: float = Field(default=2.0, ge=1.0)  # prompts in the pool over prompts that end a phase
    unfinished: Literal["carry", "discard"] = "carry"


class TableConfig(Config):
    """Every combination is run for the table. Of token budgets and pools: multiples of the run's own."""

    budgets: tuple[PositiveFloat, ...] = (0.5, 1.0, 2.0)
    pools: tuple[PositiveFloat, ...] = (1.0, 2.0)
    sigmas: tuple[NonNegativeInt | None, ...] = (None, 3, 1)  # null: from the formula


class SimulationRun(Config):
    scheduler: Scheduler = "c3po_pp"
    against: tuple[Scheduler, ...] = ("synchronous", "count")
    prompts: PositiveInt = 480  # of a synchronous step
    group_size: PositiveInt = 8
    pool_capacity: PositiveInt | None = None  # Omega; null: prompts x group_size
    token_budget: PositiveInt | None = None  # Phi; null: the mean tokens of prompts x group_size responses
    budget_counts: Literal["generated", "finished"] = "generated"
    retention_bound: NonNegativeInt | None = None  # sigma; null: max_tokens x pool / budget, so that none is stale
    on_stale: Literal["finish", "restart", "drop_group"] = "finish"
    group_release: Literal["complete", "early"] = "complete"
    warm_start: bool = False  # the first phase waits for the groups it began with
    count: CountConfig = CountConfig()
    lengths: LengthsConfig = LengthsConfig()
    engines: EnginesConfig = EnginesConfig()
    sync_s: NonNegativeFloat = 10.0
    train_s: NonNegativeFloat | None = None  # on a synchronous step's tokens; null: by train_share
    train_share: float = Field(default=0.375, ge=0.0, lt=1.0)  # of a synchronous step's seconds
    steps: PositiveInt = 40  # that are measured
    warm_up: NonNegativeInt | None = None  # steps before them; null: 1.5 x max_tokens x pool / budget, and 2
    table: TableConfig = TableConfig()
    jobs: PositiveInt | None = None  # processes; null: one per core

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        if self.pool < self.group_size:
            raise ValueError(f"pool_capacity={self.pool} holds no group of group_size={self.group_size}")
        longest = self.engines.prompt_tokens + self.lengths.max_tokens
        if self.engines.kv_tokens is not None and self.engines.kv_tokens < longest:
            raise ValueError(f"engines.kv_tokens={self.engines.kv_tokens} does not hold the longest prompt and response, {longest}")
        if self.scheduler == "count" or "count" in self.against:
            self.groups_to_count()
        return self

    @property
    def step_rollouts(self) -> int:
        return self.prompts * self.group_size

    @property
    def pool(self) -> int:
        return self.pool_capacity or self.step_rollouts

    def groups_to_count(self) -> int:
        """That end a phase of the baseline."""
        groups = int(self.pool // self.group_size / self.count.over_sample)
        if groups < 1:
            raise ValueError(f"count.over_sample={self.count.over_sample:g}: the pool of {self.pool} is too small for it")
        return groups
