"""What turns scores into an update.

Invariant (tests/unit/test_frame_config.py): a key that would be without effect beside the others is refused where it is not at its
default, by name, with the key that it needs and with that default.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from megatron_rl.config.base import Config


def refuse_dead(config: Config, keys: Sequence[str], live: bool, needs: str) -> None:
    """The YAML groups name every key, so that one counts as set where it differs from its default."""
    defaults = {key: type(config).model_fields[key].default for key in keys}
    dead = {key: getattr(config, key) for key in keys if getattr(config, key) != defaults[key]}
    if dead and not live:
        found = ", ".join(f"{key}={value}" for key, value in dead.items())
        unset = ", ".join(f"{key}={'null' if defaults[key] is None else defaults[key]}" for key in dead)
        raise ValueError(f"{found}: without effect, needs {needs}; without that {unset}")


class CorrectionConfig(Config):
    """What a token's policy gradient weighs, from k = exp(old_logprobs - engine_logprobs). All that are set multiply."""

    kind: Literal["icepop", "tis", "clip", "kpop", "none"] = "icepop"  # the token's own weight
    low: NonNegativeFloat = 0.5  # of icepop (alpha) and clip
    high: PositiveFloat = 5.0  # beta
    cap: PositiveFloat = 2.0  # of tis: min(k, cap)
    phi: PositiveFloat | None = None  # of kpop, and needed there
    sequence_band: tuple[NonNegativeFloat, PositiveFloat] | None = None  # [low, high] of the sequence's geometric mean of k (MIS)
    off_policy_delta: NonNegativeFloat | None = None  # sequences with A < 0 and mean(engine - new) above it give no policy gradient

    @model_validator(mode="after")
    def _band(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low={self.low} is not below high={self.high}")
        if self.sequence_band and self.sequence_band[0] >= self.sequence_band[1]:
            raise ValueError(f"sequence_band={list(self.sequence_band)}: the first is not below the second")
        if self.kind == "kpop" and self.phi is None:
            raise ValueError("phi=null: kind=kpop needs it, and published values differ twentyfold (0.1, 2.0): measure first")
        refuse_dead(self, ("low", "high"), self.kind in ("icepop", "clip"), "kind=icepop or clip")
        refuse_dead(self, ("cap",), self.kind == "tis", "kind=tis")
        refuse_dead(self, ("phi",), self.kind == "kpop", "kind=kpop")
        return self


class RoutingConfig(Config):
    """Which experts tokens go to in the update's forward passes."""

    kind: Literal["off", "r2", "r3"] = "off"  # the router's own; r2: as when the step began; r3: as in the engine
    unrecorded: Literal["own", "mask"] = "own"  # tokens whose experts the engine could not report: the router's own, or not trained
    probe_every: NonNegativeInt = 0  # steps; with kind=off, in those the routers are compared with the engine's experts; 0: never

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.probe_every and self.kind != "off":
            raise ValueError(
                f"probe_every={self.probe_every} is for kind=off: r3 compares in every step, r2 has no engine's experts"
            )
        if self.unrecorded == "mask" and self.kind != "r3":
            raise ValueError("unrecorded=mask needs kind=r3")
        return self

    def needs_engines_experts(self, version: int) -> bool:
        """In the step that trains the weights `version`."""
        return self.kind == "r3" or (self.probe_every > 0 and (version + 1) % self.probe_every == 0)


class AlgorithmConfig(Config):
    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce", "reinforce_pp", "reinforce_pp_baseline"] = "grpo"
    # Groups that teach nothing, because all rewards are equal. mask: they stay in every divisor, and that is all; resample: others
    # take their place within the phase (DAPO).
    zero_variance: Literal["keep", "mask", "drop", "resample"] = "drop"
    correction: CorrectionConfig = CorrectionConfig()
    routing: RoutingConfig = RoutingConfig()
    # gspo and gmpo are as published with aggregation=sequence; the others weigh a sequence by its length, too
    surrogate: Literal["ppo", "gspo", "cispo", "gmpo", "reinforce"] = "ppo"
    clip_low: PositiveFloat = 0.2  # of the ratio's distance from 1; under gmpo of its logarithm; cispo has no lower bound
    clip_high: PositiveFloat = 0.2
    dual_clip: PositiveFloat | None = None  # of ppo: the largest ratio that counts against A < 0
    kl_weight: NonNegativeFloat = 0.0  # against the policy the run started from
    kl_estimator: Literal["k1", "k2", "k3", "unbiased"] = "k3"
    kl_in: Literal["loss", "reward"] = "loss"  # reward: summed over the response and subtracted before the advantages
    entropy_weight: NonNegativeFloat = 0.0  # enters the loss as -entropy_weight * H
    router_z_loss: NonNegativeFloat = 0.0  # times the mean of logsumexp(router logits)^2 over tokens, summed over layers (ST-MoE)
    load_balance: NonNegativeFloat = 0.0  # times experts * sum_i f_i P_i of a microbatch, by its share of the tokens (Switch)
    aggregation: Literal["token_budget", "token", "sequence", "constant"] = "sequence"
    train_token_budget: PositiveInt | None = None  # C3PO's Phi on the training side, over all replicas; with token_budget
    train_overflow: Literal["carry", "discard"] = "carry"  # finished groups beyond that budget: to the next step, or given up
    loss_constant: PositiveInt | None = None  # tokens, of aggregation=constant; null: rollout.max_response_tokens
    old_logprobs: Literal["recompute", "reuse"] = "recompute"  # reuse: the update's own forward, exact while strictly on-policy
    updates_per_step: PositiveInt = 1

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.aggregation == "token_budget" and self.train_token_budget is None:
            raise ValueError("aggregation=token_budget needs train_token_budget")
        if self.old_logprobs == "reuse" and self.updates_per_step > 1:
            raise ValueError("old_logprobs=reuse needs updates_per_step=1: later updates are off-policy")
        if self.old_logprobs == "reuse" and self.routing.kind == "r2":
            raise ValueError("routing.kind=r2 needs old_logprobs=recompute: that pass is what it replays")
        if self.old_logprobs == "reuse" and self.kl_in == "reward":
            raise ValueError("kl_in=reward needs old_logprobs=recompute: rewards are complete before the update's forward")
        if self.kl_in == "reward" and self.kl_weight > 0 and self.aggregation == "token_budget":
            raise ValueError("kl_in=reward needs another aggregation than token_budget: a reward takes the KL of whole responses")
        if self.kl_in == "reward" and self.kl_weight > 0 and self.kl_estimator == "unbiased":
            raise ValueError("kl_estimator=unbiased needs kl_in=loss: before the update its ratio is 1, and it is k3")
        if self.kl_in == "loss" and self.kl_weight > 0 and self.kl_estimator == "k1":
            raise ValueError("kl_estimator=k1 needs kl_in=reward: as a loss its gradient has mean 0")
        if self.dual_clip is not None and (self.surrogate != "ppo" or self.dual_clip <= 1 + self.clip_high):
            raise ValueError(f"dual_clip={self.dual_clip} needs surrogate=ppo and to be above 1 + clip_high = {1 + self.clip_high}")
        return self

    @model_validator(mode="after")
    def _live(self) -> Self:
        refuse_dead(self, ("clip_low",), self.surrogate in ("ppo", "gspo", "gmpo"), "surrogate=ppo, gspo or gmpo")
        refuse_dead(self, ("clip_high",), self.surrogate != "reinforce", "another surrogate than reinforce, which clips nothing")
        refuse_dead(self, ("kl_estimator", "kl_in"), self.kl_weight > 0, "kl_weight above 0")
        refuse_dead(self, ("loss_constant",), self.aggregation == "constant", "aggregation=constant")
        refuse_dead(self, ("train_overflow",), self.train_token_budget is not None, "train_token_budget")
        return self
