"""One phase's groups into optimizer steps: sequences with advantages, packed and shared out, old log-probs, the loss.

Invariant: what the sequences weigh, and what is subtracted from their rewards, is the same on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import torch

from megatron_rl.algorithms.batch import PackedBatch
from megatron_rl.algorithms.loss import summarise
from megatron_rl.algorithms.mismatch import mismatch_histograms
from megatron_rl.config import RlRun
from megatron_rl.loops import batches
from megatron_rl.loops.parts import RlParts, hand_device_to_policy
from megatron_rl.types import Group


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
