"""The product-limit estimate of lengths."""

from __future__ import annotations

import random

import pytest

from megatron_rl.scheduler.lengths import Survival


def test_by_hand() -> None:
    # 5 at risk at 2: 4/5. Then one is cut at 3. 3 at risk at 4: 2/3. 2 at risk at 7, both end: 0.
    survival = Survival.of(ended=[2, 4, 7, 7], unended=[3])
    assert survival.lengths == (2, 4, 7)
    assert survival.shares == pytest.approx((4 / 5, 8 / 15, 0))
    assert survival.mean == pytest.approx(2 + 2 * 4 / 5 + 3 * 8 / 15)
    assert [survival.beyond(length) for length in (0, 1, 2, 6, 7)] == pytest.approx([1, 1, 4 / 5, 8 / 15, 0])


def test_without_cuts_it_is_the_plain_distribution() -> None:
    lengths = [random.Random(1).randint(1, 50) for _ in range(200)]
    survival = Survival.of(lengths, [])
    assert survival.mean == pytest.approx(sum(lengths) / 200)
    assert survival.beyond(20) == pytest.approx(sum(length > 20 for length in lengths) / 200)


def test_cuts_do_not_shorten_what_is_seen() -> None:
    """Rollouts cut at random: the mean of those that ended is far too short, the estimate is not."""
    rng = random.Random(2)
    pairs = [(rng.expovariate(1 / 100), rng.expovariate(1 / 100)) for _ in range(20_000)]
    ended = [int(length) for length, cut in pairs if length <= cut]
    unended = [int(cut) for length, cut in pairs if length > cut]
    assert sum(ended) / len(ended) < 60
    assert Survival.of(ended, unended).beyond(150) == pytest.approx(2.718281828**-1.5, abs=0.02)


def test_nothing_known() -> None:
    survival = Survival.of([], [5, 6])
    assert survival.mean == 0.0 and survival.beyond(3) == 1.0


def test_the_longest_rest_is_that_of_the_slowest() -> None:
    rng = random.Random(3)
    survival = Survival.of([rng.randint(1, 1000) for _ in range(2000)], [])
    grown = [0, 100, 100, 500, 900]
    drawn = [max(rng.uniform(length, 1000) - length for length in grown) for _ in range(4000)]  # given what has grown
    assert survival.longest_rest(grown) == pytest.approx(sum(drawn) / len(drawn), rel=0.03)
    assert survival.longest_rest([100, 500]) < survival.longest_rest(grown) < survival.longest_rest([0] * 50) <= 1000


def test_what_no_rollout_is_known_to_outgrow_has_no_rest() -> None:
    assert Survival.of([5, 9], []).longest_rest([9, 30]) == Survival.of([5, 9], []).longest_rest([]) == 0.0
    assert Survival.of([], [4]).longest_rest([2]) == 0.0
