"""Schedulers on the same prompts, lengths and engines."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_rl.config.simulate import CountConfig, Scheduler, SimulationRun
from megatron_rl.scheduler.c3po_pp import Settings
from megatron_rl.simulation import lengths as length_files
from megatron_rl.simulation.cluster import Cluster, Phase, Workload
from megatron_rl.simulation.engine import EngineModel
from megatron_rl.simulation.lengths import Lengths
from megatron_rl.simulation.results import Result, summarise

PICTURED = 6  # phases


def read_lengths(run: SimulationRun) -> Lengths:
    config = run.lengths
    if config.path is None:
        return length_files.scaled(length_files.built_in(), config.scale, config.max_tokens)
    return length_files.scaled(length_files.read(Path(config.path), config.column), config.scale, config.max_tokens)


@dataclass(frozen=True)
class Job:
    """One scheduler's run. Picklable, for a process of its own."""

    run: SimulationRun
    scheduler: Scheduler
    lengths: Lengths

    @property
    def key(self) -> tuple[SimulationRun, Scheduler]:
        """Jobs of one key have one outcome."""
        others: dict[str, Any] = {"against": (), "pool_capacity": self.run.pool, "jobs": None}
        if self.scheduler != "count":
            others["count"] = CountConfig()
        return self.run.model_copy(update=others), self.scheduler

    @property
    def settings(self) -> Settings:
        run, pool = self.run, self.run.pool
        budget = run.token_budget or max(1, round(run.step_rollouts * self.lengths.all.mean))
        sigma = -(-run.lengths.max_tokens * pool // budget)
        return Settings(
            token_budget=budget,
            pool_capacity=pool,
            group_size=run.group_size,
            retention_bound=sigma if run.retention_bound is None else run.retention_bound,
            budget_counts=run.budget_counts,
            on_stale=run.on_stale,
            warm_start=run.warm_start,
            policy=self.scheduler,
            group_release=run.group_release if self.scheduler == "c3po_pp" else "complete",
            groups_per_phase=run.groups_to_count() if self.scheduler == "count" else 0,
            unfinished=run.count.unfinished,
        )

    @property
    def model(self) -> EngineModel:
        engines = self.run.engines
        return EngineModel(
            slots=engines.slots,
            step_s=engines.step_s,
            step_s_per_rollout=engines.step_s_per_rollout,
            prefill_tokens_per_s=engines.prefill_tokens_per_s or math.inf,
            kv_tokens=engines.kv_tokens or math.inf,
            prompt_tokens=engines.prompt_tokens,
        )

    @property
    def warm_up(self) -> int:
        """A long rollout that is young when the run begins must have ended before anything is measured."""
        if self.scheduler == "synchronous":
            return 0  # nothing is carried
        if self.run.warm_up is not None:
            return self.run.warm_up
        return 2 + math.ceil(1.5 * self.run.lengths.max_tokens * self.run.pool / self.settings.token_budget)

    @property
    def phases(self) -> int:
        return self.warm_up + self.run.steps

    def simulate(self, progress: Callable[[], None], sample_every_s: float = math.inf) -> list[Phase]:
        """`progress` is called after every phase. The last phases are sampled, for a picture."""
        run = self.run
        workload = Workload(self.lengths, run.lengths.seed, run.lengths.members, run.lengths.again)
        cluster = Cluster(self.settings, self.model, run.engines.count, workload, run.engines.stream_interval)
        phases = []
        for number in range(self.phases):
            if number >= self.phases - PICTURED:
                cluster.sample_every_s = sample_every_s
            phases.append(cluster.run_phase())
            progress()
        return phases

    def result(self, phases: Sequence[Phase], train_s_per_token: float) -> Result:
        settings, run = self.settings, self.run
        budget = (settings.token_budget, settings.pool_capacity, settings.retention_bound)
        return summarise(
            self.scheduler,
            phases,
            self.warm_up,
            self.lengths.all,
            self.model,
            run.engines.count,
            budget,
            run.sync_s,
            train_s_per_token,
        )


def reference(run: SimulationRun, lengths: Lengths) -> Job:
    """The synchronous step that gives training its seconds: prompts x group_size responses, all waited for."""
    return Job(run.model_copy(update={"pool_capacity": run.step_rollouts}), "synchronous", lengths)


def train_s_per_token(run: SimulationRun, phases: Sequence[Phase]) -> float:
    """From the phases of the reference."""
    trained = sum(phase.trained for phase in phases)
    if run.train_s is not None:
        return run.train_s * len(phases) / trained
    others_s = math.fsum(phase.rollout_s for phase in phases) + run.sync_s * len(phases)
    return others_s * run.train_share / (1 - run.train_share) / trained


def against(result: Result, baseline: Result) -> dict[str, float]:
    """At equal trained tokens."""
    return {
        "rollout_speedup": result.rollout_tokens_per_s / baseline.rollout_tokens_per_s,
        "end_to_end_speedup": result.tokens_per_s / baseline.tokens_per_s,
    }


def as_dict(results: Sequence[Result]) -> dict[str, Any]:
    """The first result, its speed-up over each other, and all in full. The speed-ups at the top are those over `synchronous`."""
    first = results[0]
    speedups = {other.scheduler: against(first, other) for other in results[1:]}
    return {
        "scheduler": first.scheduler,
        **speedups.get("synchronous", {}),
        "work_conserving_fraction": first.work_conserving_fraction,
        "length_bias": first.length_bias,
        "against": speedups,
        "results": [asdict(result) for result in results],
    }
