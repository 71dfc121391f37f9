"""What the RL loop is made of, and how engines and policy take turns on the device they share."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from megatron_rl.loops.conductor import Conductor
from megatron_rl.loops.evaluate import Evaluator
from megatron_rl.ports import Engines, Policy, Ranks, Store, TokenLoss, Tracker, WeightSync
from megatron_rl.types import EngineLost, RoutingShape

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RlParts:
    """`conductor`, `engines` and `evaluator` exist on rank 0 only."""

    ranks: Ranks
    policy: Policy
    loss: TokenLoss
    sync: WeightSync
    store: Store
    tracker: Tracker
    device: torch.device
    routing: RoutingShape | None = None  # of a model with experts
    conductor: Conductor | None = None
    engines: Engines | None = None
    evaluator: Evaluator | None = None


def push(parts: RlParts, version: int) -> None:
    """*Collective*: every engine alive and on weights `version`."""
    while True:
        bring_up_engines(parts)
        try:
            parts.sync.push(version)
            return
        except EngineLost as error:
            log.warning("%s while taking weights %d; pushing again", error, version)


def bring_up_engines(parts: RlParts) -> None:
    """*Collective*: start what does not run. They need a push before they are of use."""
    parts.policy.occupy("weights")
    parts.ranks.barrier("all policies to make room for the engines")
    if parts.engines:
        parts.engines.recover()
        parts.engines.wake(for_push=True)


def hand_device_to_engines(parts: RlParts) -> None:
    """*Collective*."""
    parts.policy.occupy("nothing")
    parts.ranks.barrier("all policies to leave the device")
    if parts.engines:
        parts.engines.wake(for_push=False)


def hand_device_to_policy(parts: RlParts) -> None:
    """*Collective*. The engines forget their weights: the next thing they need is a push."""
    if parts.engines:
        parts.engines.sleep()
    parts.ranks.barrier("engines and policy to change places")
    parts.policy.occupy("all")
