"""The learning rate of every optimizer step, as a pure function.

Invariants: warm-up ends at `lr`; the rate never leaves [min(lr, min_lr), lr]; without warm-up a constant schedule is constant.
"""

from __future__ import annotations

import math

from megatron_rl.config.model import OptimizerConfig


def lr_at(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """For the update after `step` updates. Warm-up is linear from lr / warmup_steps; decay takes the steps from there to
    `decay_steps` (null: the run's), and stays at `min_lr`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.decay == "constant":
        return config.lr
    decaying = max(1, (config.decay_steps or total_steps) - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / decaying)
    left = 1 - progress if config.decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.min_lr + (config.lr - config.min_lr) * left
