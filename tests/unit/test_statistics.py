"""A step's numbers about its groups, of all and by domain."""

from __future__ import annotations

import pytest

from megatron_rl.loops.statistics import group_metrics
from megatron_rl.types import FinishReason, Group, Prompt, Rollout, Score, ScoreStatus

BY_DOMAIN = {
    *("reward/mean", "reward/groups", "reward/correct_fraction", "reward/all_correct_fraction", "reward/all_wrong_fraction"),
    *("response/tokens_mean", "response/truncated_fraction"),
}


def group(name: str, domain: str, *members: tuple[ScoreStatus, int, FinishReason]) -> Group:
    prompt = Prompt(name, name, (7,), "a", "exact", domain)
    rollouts = tuple(
        Rollout(f"0:{name}#{i}", prompt, i, (5,) * tokens, (-1.0,) * tokens, (0,) * tokens, reason)
        for i, (_, tokens, reason) in enumerate(members)
    )
    return Group(f"0:{name}", prompt, rollouts, tuple(Score(float(status == "correct"), status) for status, _, _ in members))


ALL_RIGHT = group("a", "math", ("correct", 2, "stop"), ("correct", 4, "stop"))
HALF = group("b", "math", ("correct", 3, "stop"), ("timeout", 7, "length"))
ALL_WRONG = group("c", "code", ("wrong", 9, "length"), ("unparsable", 11, "length"))


def test_by_hand() -> None:
    found = group_metrics([ALL_RIGHT, HALF, ALL_WRONG], [HALF], version=2)
    expected = {
        "reward/mean": (3 / 6, 3 / 4, 0.0),
        "reward/groups": (3, 2, 1),
        "reward/correct_fraction": (3 / 6, 3 / 4, 0.0),
        "reward/all_correct_fraction": (1 / 3, 1 / 2, 0.0),
        "reward/all_wrong_fraction": (1 / 3, 0.0, 1.0),
        "response/tokens_mean": (6.0, 4.0, 10.0),
        "response/truncated_fraction": (3 / 6, 1 / 4, 1.0),
    }
    assert expected.keys() == BY_DOMAIN
    for name, (whole, math, code) in expected.items():
        assert [found[name], found[f"{name}/math"], found[f"{name}/code"]] == pytest.approx([whole, math, code]), name
    assert found["reward/timeout_fraction"] == pytest.approx(1 / 6) and found["train/tokens"] == 10.0
    assert found["rollout/token_age_max"] == 2.0 and found["response/tokens_max"] == 11.0


def test_a_domain_keeps_its_numbers_in_a_step_that_has_no_other() -> None:
    assert {key for key in group_metrics([HALF], [], 0) if key.endswith("/math")} == {f"{name}/math" for name in BY_DOMAIN}


def test_prompts_that_name_no_domain_have_no_numbers_of_one() -> None:
    assert not [key for key in group_metrics([group("d", "default", ("wrong", 1, "stop"))], [], 0) if key.count("/") > 1]


def test_a_step_without_groups() -> None:
    assert group_metrics([], [], 0) == {"reward/groups": 0.0, "train/groups": 0.0, "train/tokens": 0.0}
