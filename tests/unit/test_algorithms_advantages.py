"""Group advantages against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from megatron_rl.algorithms.advantages import AdvantageMethod, group_advantages, zero_variance

BASELINED: list[AdvantageMethod] = ["grpo", "dr_grpo", "rloo"]


# Rewards 1 0 0 1: mean 1/2; squares of the differences add up to 4 x 1/4 = 1, over n - 1 = 3: deviation sqrt(1/3) = 0.577350;
# 0.5 / 0.577350 = 0.866025. Leave-one-out: the others of a 1 have mean 1/3, of a 0 have 2/3.
@pytest.mark.parametrize(
    ("method", "right", "wrong"),
    [("grpo", 0.866025, -0.866025), ("dr_grpo", 0.5, -0.5), ("rloo", 2 / 3, -2 / 3), ("reinforce", 1.0, 0.0)],
)
def test_by_hand(method: AdvantageMethod, right: float, wrong: float) -> None:
    advantages_G = group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0]), method)
    torch.testing.assert_close(advantages_G, torch.tensor([right, wrong, wrong, right]), atol=2e-6, rtol=0)


def test_grpo_by_hand_with_graded_rewards() -> None:
    # 0 1 5: mean 2, differences -2 -1 3, squares 4 + 1 + 9 = 14, over 2: sqrt(7) = 2.645751.
    expected_G = torch.tensor([-2.0, -1.0, 3.0], dtype=torch.float64) / 2.6457513110645906
    actual_G = group_advantages(torch.tensor([0.0, 1.0, 5.0], dtype=torch.float64), "grpo")
    torch.testing.assert_close(actual_G, expected_G, atol=0, rtol=1e-6)


@pytest.mark.parametrize("method", BASELINED)
def test_equal_rewards_and_lone_members_give_exactly_zero(method: AdvantageMethod) -> None:
    for rewards_G in (torch.full((7,), 0.1), torch.zeros(4), torch.tensor([3.0])):  # the float mean of seven 0.1 is not 0.1
        assert zero_variance(rewards_G)
        assert group_advantages(rewards_G, method).tolist() == [0.0] * len(rewards_G)


@pytest.mark.parametrize("method", BASELINED)
def test_advantages_add_up_to_zero(method: AdvantageMethod) -> None:
    rewards_G = torch.rand(16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert abs(group_advantages(rewards_G, method).sum().item()) < 1e-12
