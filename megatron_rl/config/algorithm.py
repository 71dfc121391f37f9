"""What turns scores into an update."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from megatron_rl.config.base import Config


class CorrectionConfig(Config):
    """The train/infer correction k = exp(old_logprobs - engine_logprobs), per token."""

    kind: Literal["icepop", "none"] = "icepop"
    low: NonNegativeFloat = 0.5  # alpha
    high: PositiveFloat = 5.0  # beta

    @model_validator(mode="after")
    def _band(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low={self.low} is not below high={self.high}")
        return self


class AlgorithmConfig(Config):
    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce"] = "grpo"
    # Groups whose rewards are all equal carry no gradient; resample: others take their place within the phase (DAPO).
    zero_variance: Literal["keep", "drop", "resample"] = "drop"
    correction: CorrectionConfig = CorrectionConfig()
    clip_low: PositiveFloat = 0.2
    clip_high: PositiveFloat = 0.2
    kl_weight: NonNegativeFloat = 0.0  # of k3 against the policy the run started from
    entropy_weight: NonNegativeFloat = 0.0  # enters the loss as -entropy_weight * H
    aggregation: Literal["token_budget", "token", "sequence"] = "sequence"
    train_token_budget: PositiveInt | None = None  # C3PO's Phi on the training side, over all replicas; with token_budget
    train_overflow: Literal["carry", "discard"] = "carry"  # finished groups beyond that budget: to the next step, or given up
    old_logprobs: Literal["recompute", "reuse"] = "recompute"  # reuse: the update's own forward, exact while strictly on-policy
    updates_per_step: PositiveInt = 1

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.aggregation == "token_budget" and self.train_token_budget is None:
            raise ValueError("aggregation=token_budget needs train_token_budget")
        if self.old_logprobs == "reuse" and self.updates_per_step > 1:
            raise ValueError("old_logprobs=reuse needs updates_per_step=1: later updates are off-policy")
        return self
