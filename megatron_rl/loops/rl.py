"""Reinforcement learning with verifiable rewards: one step is rollouts, advantages, update, weight push.

Every rank runs this loop. Rank 0 alone has a conductor (scheduler, engines, rewards); what it decides reaches the others by
`ranks.broadcast`. A step pushes the policy's weights into the engines, lets them generate up to the token budget, and trains on
the groups that are complete; weights version n are those after n steps. Engines and policy take turns on the device.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

import torch

from megatron_rl.algorithms.batch import PackedBatch
from megatron_rl.algorithms.loss import summarise
from megatron_rl.algorithms.mismatch import mismatch_histograms
from megatron_rl.config import RlRun
from megatron_rl.loops import batches
from megatron_rl.loops.conductor import Phase
from megatron_rl.loops.parts import RlParts, bring_up_engines, hand_device_to_engines, hand_device_to_policy, push
from megatron_rl.loops.statistics import group_metrics
from megatron_rl.types import Group


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


def update(config: RlRun, parts: RlParts, groups: Sequence[Group], version: int) -> dict[str, float]:
    """*Collective*: `updates_per_step` optimizer steps on one phase's groups, against the same old log-probs."""
    algorithm, policy, ranks = config.algorithm, parts.policy, parts.ranks
    routing = parts.routing if algorithm.routing.needs_engines_experts(version) else None
    sequences = batches.rl_sequences(
        groups,
        version,
        advantage=algorithm.advantage,
        aggregation=algorithm.aggregation,
        train_token_budget=algorithm.train_token_budget,
        loss_constant=algorithm.loss_constant or config.rollout.max_response_tokens,
        zero_variance=algorithm.zero_variance,
        recorded=routing if algorithm.routing.unrecorded == "mask" else None,
    )
    if not sequences:
        return {"policy/updates": 0.0}
    hand_device_to_policy(parts)
    temperature = config.rollout.temperature or 1.0  # a greedy engine reports log-probs at temperature 1
    split = {"capacity": config.parallel.microbatch_tokens, "replicas": ranks.dp_size, "replica": ranks.dp_rank}
    share = batches.microbatches(sequences, **split, device=parts.device, routing=routing)
    if algorithm.old_logprobs == "recompute":
        add_field(share, "old_logprobs", policy.logprobs(share, temperature))
    if algorithm.kl_weight:
        add_field(share, "ref_logprobs", policy.reference_logprobs(share, temperature))
    metrics = {"routing/recorded_fraction": batches.recorded_fraction(sequences, routing)} if routing else {}
    if algorithm.kl_weight and algorithm.kl_in == "reward":
        metrics |= penalise(config, parts, groups, sequences, share, batches.places(sequences, **split))
    for _ in range(algorithm.updates_per_step):
        totals = policy.train_step(share, parts.loss, temperature)
        metrics |= summarise(totals)
    if histograms := mismatch_histograms(totals):
        parts.tracker.histograms(version + 1, histograms)
    return metrics | {"policy/updates": float(algorithm.updates_per_step)}


def penalise(
    config: RlRun,
    parts: RlParts,
    groups: Sequence[Group],
    sequences: Sequence[batches.TrainSequence],
    share: list[PackedBatch],
    places: list[list[int]],
) -> dict[str, float]:
    """*Collective*: advantages of rewards less kl_weight KL(old || ref) of the response, into the microbatches."""
    algorithm = config.algorithm
    own = batches.sequence_kl(share, places, algorithm.kl_estimator, len(sequences))
    kl = parts.ranks.sum_over_replicas(own, "the KL of all sequences").tolist()
    penalties = {sequence.rollout_id: algorithm.kl_weight * value for sequence, value in zip(sequences, kl, strict=True)}
    advantages = batches.rollout_advantages(groups, algorithm.advantage, penalties)
    batches.replace_advantages(share, places, [advantages[sequence.rollout_id] for sequence in sequences])
    return {"reward/kl_penalty_mean": fmean(penalties.values())}


def add_field(share: list[PackedBatch], name: str, values: list[torch.Tensor]) -> None:
    for batch, value_T in zip(share, values, strict=True):
        batch.fields[name] = value_T


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
