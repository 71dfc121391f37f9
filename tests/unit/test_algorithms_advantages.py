"""Advantages against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from megatron_rl.algorithms.advantages import AdvantageMethod, step_advantages, teaches_nothing

OF_GROUPS: list[AdvantageMethod] = ["grpo", "dr_grpo", "rloo"]
BASELINED: list[AdvantageMethod] = [*OF_GROUPS, "reinforce_pp_baseline"]


def of_one_group(rewards: list[float], method: AdvantageMethod) -> torch.Tensor:
    return step_advantages([torch.tensor(rewards, dtype=torch.float64)], method)[0]


# Rewards 1 0 0 1: mean 1/2; squares of the differences add up to 4 x 1/4 = 1, over n - 1 = 3: deviation sqrt(1/3) = 0.577350;
# 0.5 / 0.577350 = 0.866025. Leave-one-out: the others of a 1 have mean 1/3, of a 0 have 2/3.
@pytest.mark.parametrize(
    ("method", "right", "wrong"),
    [("grpo", 0.866025, -0.866025), ("dr_grpo", 0.5, -0.5), ("rloo", 2 / 3, -2 / 3), ("reinforce", 1.0, 0.0)],
)
def test_by_hand(method: AdvantageMethod, right: float, wrong: float) -> None:
    expected_G = torch.tensor([right, wrong, wrong, right], dtype=torch.float64)
    torch.testing.assert_close(of_one_group([1.0, 0.0, 0.0, 1.0], method), expected_G, atol=2e-6, rtol=0)


def test_grpo_by_hand_with_graded_rewards() -> None:
    # 0 1 5: mean 2, differences -2 -1 3, squares 4 + 1 + 9 = 14, over 2: sqrt(7) = 2.645751.
    expected_G = torch.tensor([-2.0, -1.0, 3.0], dtype=torch.float64) / 2.6457513110645906
    torch.testing.assert_close(of_one_group([0.0, 1.0, 5.0], "grpo"), expected_G, atol=0, rtol=1e-6)


def test_reinforce_pp_by_hand() -> None:
    # 0 1 5 and 2 2, together: mean 2, differences -2 -1 3 0 0, squares 14, over 4: sqrt(3.5) = 1.870829.
    groups = [torch.tensor([0.0, 1.0, 5.0], dtype=torch.float64), torch.tensor([2.0, 2.0], dtype=torch.float64)]
    first_G, second_G = step_advantages(groups, "reinforce_pp")
    expected_G = torch.tensor([-2.0, -1.0, 3.0], dtype=torch.float64) / 1.8708286933869707
    torch.testing.assert_close(first_G, expected_G, atol=0, rtol=1e-6)
    assert second_G.tolist() == [0.0, 0.0]


def test_reinforce_pp_with_a_baseline_by_hand() -> None:
    # 0 4 less 2, 7 9 less 8, 5 5 less 5: -2 2 -1 1 0 0, squares 10, over 5: sqrt(2) = 1.414214.
    groups = [torch.tensor(rewards, dtype=torch.float64) for rewards in ([0.0, 4.0], [7.0, 9.0], [5.0, 5.0])]
    first_G, second_G, third_G = step_advantages(groups, "reinforce_pp_baseline")
    torch.testing.assert_close(
        torch.cat([first_G, second_G]), torch.tensor([-2.0, 2.0, -1.0, 1.0]).double() / 2**0.5, rtol=1e-6, atol=0
    )
    assert third_G.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("method", BASELINED)
def test_equal_rewards_and_lone_members_give_exactly_zero(method: AdvantageMethod) -> None:
    for rewards_G in (torch.full((7,), 0.1), torch.zeros(4), torch.tensor([3.0])):  # the float mean of seven 0.1 is not 0.1
        assert teaches_nothing(rewards_G, method)
        for others in ([], [torch.tensor([0.3, 0.9])]):
            assert step_advantages([rewards_G, *others], method)[0].tolist() == [0.0] * len(rewards_G)
    assert not teaches_nothing(torch.tensor([0.1, 0.2]), method)


def test_reinforce_pp_is_exactly_zero_where_all_rewards_of_the_step_are_equal() -> None:
    for advantages_G in step_advantages([torch.full((7,), 0.1), torch.full((3,), 0.1)], "reinforce_pp"):
        assert not advantages_G.any()


def test_without_a_baseline_of_the_group_equal_rewards_can_teach() -> None:
    right_G, wrong_G = torch.ones(3), torch.zeros(3)
    assert not teaches_nothing(right_G, "reinforce") and teaches_nothing(wrong_G, "reinforce")
    assert not teaches_nothing(right_G, "reinforce_pp") and not teaches_nothing(wrong_G, "reinforce_pp")
    better_G, worse_G = step_advantages([right_G, wrong_G], "reinforce_pp")
    assert (better_G > 0).all() and (worse_G < 0).all()


@pytest.mark.parametrize("method", [*BASELINED, "reinforce_pp"])
def test_advantages_add_up_to_zero(method: AdvantageMethod) -> None:
    draw = torch.Generator().manual_seed(0)
    groups = [torch.rand(n, dtype=torch.float64, generator=draw) for n in (16, 3, 8)]
    advantages = step_advantages(groups, method)
    assert [len(advantages_G) for advantages_G in advantages] == [16, 3, 8]
    sums = [advantages_G.sum() for advantages_G in advantages]
    assert all(abs(value) < 1e-12 for value in (sums if method in BASELINED else [sum(sums)]))


def test_no_groups() -> None:
    assert step_advantages([], "reinforce_pp") == []
