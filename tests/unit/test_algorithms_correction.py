"""IcePop's masking of importance ratios."""

from __future__ import annotations

import math

import torch

from megatron_rl.algorithms.correction import correction_weights, icepop_weights

INF, NAN = math.inf, math.nan


def weights_of(ratios: list[float], low: float = 0.5, high: float = 5.0) -> list[float]:
    return icepop_weights(torch.tensor(ratios).log(), torch.zeros(len(ratios)), low, high).tolist()


def test_the_published_example() -> None:
    kept = weights_of([0.4, 0.8, 6.0])
    assert kept[0] == kept[2] == 0.0
    assert math.isclose(kept[1], 0.8, rel_tol=1e-6)  # the ratio itself, not 1


def test_both_ends_of_the_band_are_inside() -> None:
    torch.testing.assert_close(torch.tensor(weights_of([0.5, 5.0])), torch.tensor([0.5, 5.0]), atol=0, rtol=1e-6)
    assert weights_of([0.4999, 5.001]) == [0.0, 0.0]


def test_low_zero_has_no_lower_bound() -> None:
    kept_T = torch.tensor(weights_of([1e-6, 4.0, 6.0], low=0.0))
    torch.testing.assert_close(kept_T, torch.tensor([1e-6, 4.0, 0.0]), atol=0, rtol=1e-5)


def test_infinite_and_undefined_logprobs_weigh_nothing() -> None:
    old_T = torch.tensor([-INF, -1.0, -INF, NAN, -1.0, INF, 0.0, -200.0], requires_grad=True)
    engine_T = torch.tensor([-1.0, -INF, -INF, -1.0, NAN, -1.0, -200.0, 0.0])
    weights_T = icepop_weights(old_T, engine_T)
    assert weights_T.tolist() == [0.0] * 8
    assert not weights_T.requires_grad


def test_none_weighs_every_token_alike() -> None:
    engine_T = torch.tensor([-1.0, -INF])
    assert correction_weights("none", torch.tensor([-9.0, -1.0]), engine_T, 0.5, 5.0).tolist() == [1.0, 1.0]
    torch.testing.assert_close(
        correction_weights("icepop", torch.tensor([-1.0]), torch.tensor([-2.0]), 0.5, 5.0), torch.tensor([math.e])
    )
