"""The three runs: rl, sft, eval."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from megatron_rl.config.algorithm import AlgorithmConfig, RoutingConfig
from megatron_rl.config.base import Config
from megatron_rl.config.data import DataConfig, EvalData
from megatron_rl.config.model import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_rl.config.rollout import EngineConfig, RewardConfig, RolloutConfig


class DirConfig(Config):
    dir: str = Field(min_length=1)  # the run directory
    seed: int = Field(default=0, ge=0)
    steps: PositiveInt


Resume = Literal[True, False, "auto"]  # auto: go on where a checkpoint exists; true: one must; false: the directory must be new


class CheckpointConfig(Config):
    every: NonNegativeInt = 10  # steps; 0: only at the end and on a signal
    keep: PositiveInt = 2
    export_hf: bool = True  # at the end of the run, into <run.dir>/hf


class TrackConfig(Config):
    tensorboard: bool = True
    rollouts_every: NonNegativeInt = 1  # steps between dumps of readable samples; 0: never
    rollouts_kept: PositiveInt = 16  # samples per dump


class MismatchAlarmConfig(Config):
    """A warning when a metric rises above its threshold; null: none."""

    # The mean |p_old - p_engine|; training has been seen to fail above 0.05 (Ring-1T's report, arXiv 2510.18855, section 2.3.2).
    prob_gap_mean: PositiveFloat | None = 0.05
    masked_fraction: PositiveFloat | None = 0.01  # of trained tokens, by the correction; there 0.001 to 0.002


class RlTrackConfig(TrackConfig):
    mismatch_alarm: MismatchAlarmConfig = MismatchAlarmConfig()


class EvalConfig(Config):
    every: NonNegativeInt = 0  # training steps between two evaluations; 0: none between the ends
    at_ends: bool = True  # before the first step and after the last
    prompts: PositiveInt | None = None  # the first so many; null: all
    samples: PositiveInt = 4
    temperature: float = Field(default=1.0, ge=0.0)
    greedy: bool = True  # a greedy pass beside the sampled one
    forced_prefix: bool = False  # also with each prompt's metadata.forced_prefix as the start of the response


class RlRun(Config):
    run: DirConfig
    resume: Resume = "auto"
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig
    engine: EngineConfig = EngineConfig()
    rollout: RolloutConfig
    reward: RewardConfig = RewardConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    data: DataConfig
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    track: RlTrackConfig = RlTrackConfig()

    @model_validator(mode="after")
    def _lengths(self) -> Self:
        longest = self.rollout.max_prompt_tokens + self.rollout.max_response_tokens
        if longest > self.model.max_position_embeddings:
            raise ValueError(
                f"rollout: max_prompt_tokens + max_response_tokens = {longest} is beyond "
                f"model.max_position_embeddings={self.model.max_position_embeddings}"
            )
        if self.rollout.group_size == 1 and self.algorithm.advantage in ("grpo", "dr_grpo", "rloo", "reinforce_pp_baseline"):
            raise ValueError(
                f"rollout.group_size=1: algorithm.advantage={self.algorithm.advantage} compares the members of a group"
            )
        if self.model.moe is None and self.algorithm.routing != RoutingConfig():
            raise ValueError("algorithm.routing: the model has no experts (model.moe is null)")
        if self.algorithm.routing.probe_every > self.run.steps:
            raise ValueError(
                f"algorithm.routing.probe_every={self.algorithm.routing.probe_every}: run.steps={self.run.steps} has no such step"
            )
        if (self.eval.every or self.eval.at_ends) and not self.data.eval:
            raise ValueError("data.eval: null, but eval.every or eval.at_ends asks for an evaluation")
        if self.algorithm.kl_in == "reward" and self.rollout.group_release == "early":
            raise ValueError("algorithm.kl_in=reward needs rollout.group_release=complete: early members' log-probs are gone")
        return self

    @model_validator(mode="after")
    def _stages(self) -> Self:
        stages, steps = self.data.stages, self.run.steps
        named = sum(stage.steps or 0 for stage in stages)
        if stages and stages[-1].steps is None and named >= steps:
            raise ValueError(f"run.steps={steps}: the stages of data.stages have {named} before the last one's rest begins")
        if stages and stages[-1].steps is not None and named != steps:
            raise ValueError(f"run.steps={steps}: the stages of data.stages have {named}")
        return self


class SftStage(Config):
    data: str  # JSONL of {"prompt", "response"}
    steps: PositiveInt


class SftData(Config):
    tokenizer: str
    chat_template: bool = False
    stages: tuple[SftStage, ...] = Field(min_length=1)  # a curriculum: one after the other, under one learning-rate schedule


class SftRun(Config):
    run: DirConfig
    resume: Resume = "auto"
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig
    batch_size: PositiveInt  # sequences per step, over all replicas
    max_tokens: PositiveInt = 4096  # longer examples are counted and left out
    data: SftData
    checkpoint: CheckpointConfig = CheckpointConfig()
    track: TrackConfig = TrackConfig()

    @model_validator(mode="after")
    def _steps(self) -> Self:
        steps = sum(stage.steps for stage in self.data.stages)
        if steps != self.run.steps:
            raise ValueError(f"run.steps={self.run.steps}: the stages of data.stages have {steps}")
        return self


class EvalRun(Config):
    out: str = Field(min_length=1)  # directory of summary.json and responses.jsonl
    checkpoint: str = Field(min_length=1)  # a Hugging Face directory, a conversion's, or a run's checkpoints/step_N
    data: EvalData
    engine: EngineConfig = EngineConfig()
    reward: RewardConfig = RewardConfig()
    eval: EvalConfig = EvalConfig()
    seed: int = Field(default=0, ge=0)
    max_prompt_tokens: PositiveInt = 1024
    max_response_tokens: PositiveInt = 4096
