"""Reinforcement learning with verifiable rewards: one step is rollouts, advantages, update, weight push.

Every rank runs this loop. Rank 0 alone has a conductor (scheduler, engines, rewards); what it decides reaches the others by
`ranks.broadcast`. Step n generates with weights version n and ends by pushing version n + 1.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_rl.algorithms.batch import PackedBatch
from megatron_rl.algorithms.loss import summarise
from megatron_rl.config import RlRun
from megatron_rl.loops import batches
from megatron_rl.loops.conductor import Conductor, Phase
from megatron_rl.loops.evaluate import Evaluator
from megatron_rl.loops.statistics import group_metrics
from megatron_rl.ports import Engines, Policy, Ranks, Store, TokenLoss, Tracker, WeightSync
from megatron_rl.types import EngineLost

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RlParts:
    """What the loop is made of. `conductor`, `engines` and `evaluator` exist on rank 0 only."""

    ranks: Ranks
    policy: Policy
    loss: TokenLoss
    sync: WeightSync
    store: Store
    tracker: Tracker
    device: torch.device
    conductor: Conductor | None = None
    engines: Engines | None = None
    evaluator: Evaluator | None = None


def train(config: RlRun, parts: RlParts) -> bool:
    """Run or go on until `config.run.steps`. True when complete, False when a signal ended it early (resumable)."""
    store, tracker = parts.store, parts.tracker
    step = restore(parts)
    if step < config.run.steps:
        if parts.engines:
            parts.engines.start()
        push(parts, step)
    if step == 0 and config.eval.at_ends:
        tracker.log(0, evaluate(parts))

    while step < config.run.steps:
        started = time.monotonic()
        phase = roll_out(config, parts, step)
        if phase.status == "stopped":
            save(parts, step)
            return False

        trained = batches.usable_groups(
            phase.groups,
            advantage=config.algorithm.advantage,
            zero_variance=config.algorithm.zero_variance,
            exclude_failed=config.reward.exclude_failed,
        )
        sequences = batches.rl_sequences(
            trained,
            step,
            advantage=config.algorithm.advantage,
            aggregation=config.algorithm.aggregation,
            train_token_budget=config.algorithm.train_token_budget,
        )
        metrics = dict(phase.metrics) | group_metrics(phase.groups, trained, step)
        with timed(metrics, "time/train_s"):
            metrics |= update(config, parts, sequences)

        step += 1
        with timed(metrics, "time/sync_s"):
            push(parts, step)
        last = step == config.run.steps
        if (config.eval.every and step % config.eval.every == 0) or (last and config.eval.at_ends):
            metrics |= evaluate(parts)
        metrics["time/step_s"] = time.monotonic() - started
        tracker.log(step, metrics)
        tracker.rollouts(step, phase.groups)
        if last or (config.checkpoint.every and step % config.checkpoint.every == 0):
            save(parts, step)

    if config.checkpoint.export_hf:
        store.export_hf(Path(config.run.dir) / "hf")
    return True


def roll_out(config: RlRun, parts: RlParts, step: int) -> Phase:
    """*Collective*: one rollout phase, however often engines have to be brought back in it."""
    while True:
        phase = parts.conductor.phase(step, config.algorithm.train_token_budget) if parts.conductor else None
        phase = parts.ranks.broadcast(phase, f"the rollout phase of step {step + 1}")
        if phase.status != "no_engine":
            break
        push(parts, step)
    if parts.engines:
        parts.engines.sleep()
    parts.policy.onload()
    return phase


def update(config: RlRun, parts: RlParts, sequences: list[batches.TrainSequence]) -> dict[str, float]:
    """*Collective*: `updates_per_step` optimizer steps on one phase's sequences, against the same old log-probs."""
    if not sequences:
        return {"policy/updates": 0.0}
    algorithm, policy, ranks = config.algorithm, parts.policy, parts.ranks
    temperature = config.rollout.temperature or 1.0  # a greedy engine reports log-probs at temperature 1
    share = batches.microbatches(
        sequences,
        capacity=config.parallel.microbatch_tokens,
        replicas=ranks.dp_size,
        replica=ranks.dp_rank,
        device=parts.device,
    )
    if algorithm.old_logprobs == "recompute":
        add_field(share, "old_logprobs", policy.logprobs(share, temperature))
    if algorithm.kl_weight:
        add_field(share, "ref_logprobs", policy.reference_logprobs(share, temperature))
    metrics: dict[str, float] = {}
    for _ in range(algorithm.updates_per_step):
        metrics = summarise(policy.train_step(share, parts.loss, temperature))
    return metrics | {"policy/updates": float(algorithm.updates_per_step)}


def add_field(share: list[PackedBatch], name: str, values: list[torch.Tensor]) -> None:
    for batch, value_T in zip(share, values, strict=True):
        batch.fields[name] = value_T


def push(parts: RlParts, version: int) -> None:
    """*Collective*: every engine alive, awake and on weights `version`; then the policy leaves the device to them."""
    while True:
        if parts.engines:
            parts.engines.recover()
            parts.engines.wake()
        try:
            parts.sync.push(version)
            break
        except EngineLost as error:
            log.warning("%s while taking weights %d; pushing again", error, version)
    parts.policy.offload()


def evaluate(parts: RlParts) -> dict[str, float]:
    """*Collective*: the held-out prompts under the weights pushed last."""
    metrics = parts.evaluator.metrics() if parts.evaluator else None
    return parts.ranks.broadcast(metrics, "the evaluation")


def save(parts: RlParts, step: int) -> None:
    """*Collective*: all that the run needs to go on from here, in one commit."""
    parts.store.save(step, parts.conductor.state_dict() if parts.conductor else {})


def restore(parts: RlParts) -> int:
    """*Collective*: the newest checkpoint's step, or 0 in a fresh run; what later steps had logged is forgotten."""
    restored = parts.store.restore()
    step, state = restored if restored else (0, None)
    if parts.conductor and state is not None:
        parts.conductor.load_state_dict(state)
    parts.tracker.rewind(step)
    return step


@contextmanager
def timed(metrics: dict[str, float], name: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    metrics[name] = time.monotonic() - started
