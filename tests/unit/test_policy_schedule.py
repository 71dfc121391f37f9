"""The learning-rate schedule, by hand."""

from __future__ import annotations

import math

import pytest

from megatron_rl.config.model import OptimizerConfig
from megatron_rl.policy.schedule import lr_at


def rates(steps: int, **config: object) -> list[float]:
    return [lr_at(step, OptimizerConfig.model_validate({"lr": 1.0, **config}), steps) for step in range(steps)]


def test_constant_without_warmup_is_constant() -> None:
    assert rates(4, min_lr=0.1) == [1.0] * 4


def test_warmup_ends_at_lr() -> None:
    assert rates(6, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear() -> None:
    assert rates(6, warmup_steps=2, decay="linear", min_lr=0.2) == pytest.approx([0.5, 1.0, 1.0, 0.8, 0.6, 0.4])


def test_cosine() -> None:
    expected = [1.0, 0.5 + 0.5 * math.cos(math.pi / 4), 0.5, 0.5 + 0.5 * math.cos(3 * math.pi / 4)]
    assert rates(4, decay="cosine") == pytest.approx(expected)


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_the_rate_stays_at_min_lr_after_decay_steps(decay: str) -> None:
    assert rates(10, decay=decay, decay_steps=5, min_lr=0.1)[5:] == pytest.approx([0.1] * 5)


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup_steps", [0, 3, 20])
def test_the_rate_never_leaves_its_bounds(decay: str, warmup_steps: int) -> None:
    values = rates(10, decay=decay, warmup_steps=warmup_steps, min_lr=0.05)
    assert all(0.0 < value <= 1.0 for value in values)
    assert all(value >= 0.05 for value in values[warmup_steps:])
