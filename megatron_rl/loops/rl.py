"""Reinforcement learning with verifiable rewards: one step is rollouts, advantages, update, weight push.

Every rank runs this loop. Rank 0 alone has a conductor (scheduler, engines, rewards); what it decides reaches the others by
`ranks.broadcast`. A step pushes the policy's weights into the engines, lets them generate up to the token budget, and trains on
the groups that are complete; weights version n are those after n steps. Engines and policy take turns on the device.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_rl.config import RlRun
from megatron_rl.loops import batches
from megatron_rl.loops.conductor import Phase
from megatron_rl.loops.parts import RlParts, bring_up_engines, hand_device_to_engines, hand_device_to_policy, push
from megatron_rl.loops.statistics import group_metrics
from megatron_rl.loops.update import update


def train(config: RlRun, parts: RlParts) -> bool:
    """Run or go on until `config.run.steps`. True when complete, False when a signal ended it early (resumable)."""
    step = restore(parts)
    while True:
        metrics: dict[str, float] = {}
        if step < config.run.steps or evaluation_is_due(config, parts, step):
            bring_up_engines(parts)
            with timed(metrics, "time/sync_s"):
                push(parts, step)
        if evaluation_is_due(config, parts, step):
            evaluate(parts, step)
        if step >= config.run.steps:
            break

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
        metrics |= dict(phase.metrics) | group_metrics((*phase.groups, *phase.useless), trained, step)
        with timed(metrics, "time/train_s"):
            metrics |= update(config, parts, trained, step)

        step += 1
        metrics["time/step_s"] = time.monotonic() - started + metrics["time/sync_s"]
        parts.tracker.log(step, metrics)
        parts.tracker.rollouts(step, phase.groups)
        if step == config.run.steps or (config.checkpoint.every and step % config.checkpoint.every == 0):
            save(parts, step)

    if config.checkpoint.export_hf:
        hand_device_to_policy(parts)
        parts.store.export_hf(Path(config.run.dir) / "hf")
    return True


def roll_out(config: RlRun, parts: RlParts, step: int) -> Phase:
    """*Collective*: one rollout phase, however often engines have to be brought back in it."""
    while True:
        hand_device_to_engines(parts)
        algorithm, conductor = config.algorithm, parts.conductor
        phase = conductor.phase(step, algorithm.train_token_budget, algorithm.train_overflow) if conductor else None
        phase = parts.ranks.broadcast(phase, f"the rollout phase of step {step + 1}")
        if phase.status != "no_engine":
            return phase
        push(parts, step)


def evaluation_is_due(config: RlRun, parts: RlParts, step: int) -> bool:
    """*Collective*: by the configuration, and not on record already (of a run that was killed after it)."""
    at_end = config.eval.at_ends and step in (0, config.run.steps)
    if not at_end and not (config.eval.every and step > 0 and step % config.eval.every == 0):
        return False
    return not parts.ranks.broadcast(step in parts.tracker.evaluated(), "the evaluations on record")


def evaluate(parts: RlParts, step: int) -> None:
    """*Collective*: the held-out prompts under the weights pushed last; from the start again if an engine dies under it."""
    while True:
        hand_device_to_engines(parts)
        metrics = parts.evaluator.metrics_or_none() if parts.evaluator else None
        metrics = parts.ranks.broadcast(metrics, "the evaluation")
        if metrics is not None:
            parts.tracker.evaluation(step, metrics)
            return
        push(parts, step)


def save(parts: RlParts, step: int) -> None:
    """*Collective*: all that the run needs to go on from here, in one commit."""
    hand_device_to_policy(parts)
    parts.store.save(step, parts.conductor.state_dict() if parts.conductor else {})
    if parts.conductor:
        parts.conductor.checkpointed(step)


def restore(parts: RlParts) -> int:
    """*Collective*: the newest checkpoint's step, or 0 in a fresh run; what later steps had logged is forgotten."""
    restored = parts.store.restore()
    step, state = restored if restored else (0, None)
    if parts.conductor:
        if state is not None:
            parts.conductor.load_state_dict(state)
        parts.conductor.restarted(step)
    parts.tracker.rewind(step)
    return step


@contextmanager
def timed(metrics: dict[str, float], name: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    metrics[name] = time.monotonic() - started
