"""Evaluation statistics against closed forms on synthetic outcomes."""

from __future__ import annotations

import itertools
import random
from statistics import fmean

import pytest

from megatron_rl.loops.outcomes import Outcome, interval, majority_at, pass_at, powers_of_two, summary


def outcome(correct: bool, answer: str | None = "7", question: str = "q", domain: str = "math", tokens: int = 10) -> Outcome:
    return Outcome(question, domain, correct, answer, tokens, truncated=tokens >= 100)


def samples(*pattern: bool) -> list[Outcome]:
    return [outcome(correct, "right" if correct else f"wrong {i}") for i, correct in enumerate(pattern)]


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_the_mean_over_all_subsets(k: int) -> None:
    pattern = (True, False, False, True, False)
    expected = fmean(any(subset) for subset in itertools.combinations(pattern, k))
    assert pass_at(k, samples(*pattern)) == pytest.approx(expected)


def test_pass_at_1_is_the_accuracy() -> None:
    assert pass_at(1, samples(True, False, False, False)) == 0.25


def test_the_majority_by_hand() -> None:
    wrong = [outcome(False, "3")] * 3
    assert majority_at(5, [*wrong, outcome(True, "4"), outcome(True, "4.0")]) == 0.0
    assert majority_at(6, [*wrong, *[outcome(True, a) for a in ("4", "4.0", "four")]]) == 0.5, "correct answers are one"
    assert majority_at(4, [outcome(True), outcome(False, None), outcome(False, None), outcome(False, None)]) == 1.0
    assert majority_at(2, [outcome(False, None)] * 2) == 0.0


def test_the_majority_among_some_is_the_mean_over_all_subsets() -> None:
    five = [outcome(True), outcome(True), outcome(False, "1"), outcome(False, "1"), outcome(False, "2")]
    exact = fmean(majority_at(3, list(subset)) for subset in itertools.combinations(five, 3))
    assert majority_at(3, five) == pytest.approx(exact, abs=0.1)


def test_the_interval_covers_as_often_as_it_says() -> None:
    """Questions of accuracy 0.1 to 0.9, answered 8 times: in about 95 of 100 repetitions the truth lies inside."""
    rng = random.Random(0)
    inside = 0
    for repetition in range(100):
        truths = [rng.uniform(0.1, 0.9) for _ in range(40)]
        low, high = interval([[rng.random() < truth for _ in range(8)] for truth in truths], seed=repetition)
        inside += low <= 0.5 <= high
    assert 88 <= inside <= 100


def test_the_interval_of_a_binomial_is_the_normal_one() -> None:
    """One sample for each of many questions: p +- 1.96 sqrt(p (1 - p) / n), twice the variance by the second draw aside."""
    correct = [[i % 4 == 0] for i in range(4000)]
    low, high = interval(correct)
    assert (high - low) / 2 == pytest.approx(1.96 * (0.25 * 0.75 / 4000) ** 0.5, rel=0.1)
    assert interval(correct, seed=3) == interval(correct, seed=3) != interval(correct, seed=4)


def test_every_question_weighs_the_same() -> None:
    outcomes = [outcome(True, question="a"), *[outcome(False, question="b") for _ in range(3)]]
    assert summary(outcomes)["accuracy"] == 0.5


def test_the_summary_by_hand() -> None:
    outcomes = [
        *[outcome(c, "1", question="a", domain="math", tokens=t) for c, t in ((True, 10), (True, 20), (False, 30), (False, 40))],
        *[outcome(c, "1", question="b", domain="code", tokens=100) for c in (False, False, False, True)],
    ]
    numbers = summary(outcomes)
    assert numbers["accuracy"] == pytest.approx((0.5 + 0.25) / 2)
    assert (numbers["accuracy/math"], numbers["accuracy/code"]) == (0.5, 0.25)
    assert numbers["pass@2"] == pytest.approx((1 - 1 / 6 + 1 - 3 / 6) / 2) and numbers["pass@4"] == 1.0
    assert numbers["maj@4"] == pytest.approx((0.5 + 0.0) / 2)
    assert numbers["truncated"] == 0.5 and numbers["response_tokens"] == 62.5 and numbers["response_tokens_p50"] == 70
    assert numbers["accuracy_low"] <= numbers["accuracy"] <= numbers["accuracy_high"]


def test_powers_of_two() -> None:
    assert [powers_of_two(n) for n in (1, 2, 3, 64)] == [[], [2], [2], [2, 4, 8, 16, 32, 64]]
