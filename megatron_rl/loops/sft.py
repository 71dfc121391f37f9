"""Supervised fine-tuning over a curriculum: the same packed batches, policy and checkpoints as RL.

The batch of a step is a function of (seed, step) alone, so the step number is all there is to resume.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from megatron_rl.algorithms.loss import summarise
from megatron_rl.config import SftRun
from megatron_rl.loops import batches
from megatron_rl.loops.signals import StopFlag
from megatron_rl.ports import Policy, Ranks, Store, TokenLoss, Tracker


class ExampleStream(Protocol):
    def batch(self, step: int) -> Sequence[batches.Example]: ...


@dataclass(frozen=True)
class SftParts:
    ranks: Ranks
    policy: Policy
    loss: TokenLoss
    examples: ExampleStream
    store: Store
    tracker: Tracker
    device: torch.device
    stop: StopFlag


def train(config: SftRun, parts: SftParts) -> bool:
    """Run or go on until `config.run.steps`. True when complete, False when a signal ended it early (resumable)."""
    ranks, store, tracker = parts.ranks, parts.store, parts.tracker
    restored = store.restore()
    step = restored[0] if restored else 0
    tracker.rewind(step)

    while step < config.run.steps:
        started = time.monotonic()
        sequences = batches.sft_sequences(parts.examples.batch(step))
        share = batches.microbatches(
            sequences,
            capacity=config.parallel.microbatch_tokens,
            replicas=ranks.dp_size,
            replica=ranks.dp_rank,
            device=parts.device,
        )
        metrics = summarise(parts.policy.train_step(share, parts.loss, temperature=1.0))
        step += 1
        tokens = float(sum(map(len, sequences)))
        tracker.log(step, metrics | {"train/tokens": tokens, "time/train_s": time.monotonic() - started})
        stopped = ranks.broadcast(parts.stop.requested, "the stop flag")
        if stopped or step == config.run.steps or (config.checkpoint.every and step % config.checkpoint.every == 0):
            store.save(step, {})
        if stopped and step < config.run.steps:
            return False

    if config.checkpoint.export_hf:
        store.export_hf(Path(config.run.dir) / "hf")
    return True
