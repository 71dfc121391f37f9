"""Weights from the train/infer ratio, against numbers worked out by hand and float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from megatron_rl.algorithms.batch import PackedBatch
from megatron_rl.algorithms.correction import (
    Correction,
    clip_weights,
    icepop_weights,
    kpop_mask,
    off_policy_sequence_mask,
    sequence_mask,
    tis_weights,
)

INF, NAN = math.inf, math.nan
Weights = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
OF_TOKENS: dict[str, Weights] = {
    "icepop": icepop_weights,
    "tis": tis_weights,
    "clip": lambda old, engine: clip_weights(old, engine, 0.5, 5.0),
    "kpop": lambda old, engine: kpop_mask(old, engine, 100.0),
}


def weights_of(ratios: list[float], weights: Weights = icepop_weights) -> torch.Tensor:
    return weights(torch.tensor(ratios).log(), torch.zeros(len(ratios)))


def near(actual_T: torch.Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(actual_T, torch.tensor(expected), atol=0, rtol=1e-6)


def packed(*lengths: int, mask: list[float] | None = None) -> PackedBatch:
    ends = torch.tensor([0, *lengths]).cumsum(0)
    total = int(ends[-1])
    mask_T = torch.ones(total) if mask is None else torch.tensor(mask)
    return PackedBatch(torch.zeros(total, dtype=torch.long), ends.to(torch.int32), mask_T)


def test_the_published_example_of_icepop() -> None:
    near(weights_of([0.4, 0.8, 6.0]), [0.0, 0.8, 0.0])  # the ratio itself, not 1


def test_both_ends_of_icepops_band_are_inside() -> None:
    near(weights_of([0.5, 5.0, 0.4999, 5.001]), [0.5, 5.0, 0.0, 0.0])


def test_low_zero_has_no_lower_bound() -> None:
    kept_T = weights_of([1e-6, 4.0, 6.0], lambda old, engine: icepop_weights(old, engine, low=0.0))
    torch.testing.assert_close(kept_T, torch.tensor([1e-6, 4.0, 0.0]), atol=0, rtol=1e-5)


def test_truncation_and_clip_by_hand() -> None:
    near(weights_of([0.4, 0.8, 6.0], tis_weights), [0.4, 0.8, 2.0])
    near(weights_of([0.4, 0.8, 6.0], lambda old, engine: tis_weights(old, engine, cap=5.0)), [0.4, 0.8, 5.0])
    near(weights_of([0.4, 0.8, 6.0], OF_TOKENS["clip"]), [0.5, 0.8, 5.0])


def coin_kl(p: float, q: float) -> float:
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def test_kpop_by_hand() -> None:
    # 0.5 against 0.25: 0.5 log 2 + 0.5 log (2 / 3) = 0.143841; the other way 0.25 log 0.5 + 0.75 log 1.5 = 0.130812.
    assert coin_kl(0.5, 0.25) == pytest.approx(0.143841, abs=1e-6) and coin_kl(0.25, 0.5) == pytest.approx(0.130812, abs=1e-6)
    half_T, quarter_T = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()
    for phi, kept in ((0.1439, 1.0), (0.1438, 0.0), (0.135, 0.0)):  # both directions must be within, whichever is the larger
        assert kpop_mask(half_T, quarter_T, phi).item() == kpop_mask(quarter_T, half_T, phi).item() == kept


def test_kpop_against_float64_down_to_unlikely_and_up_to_certain_tokens() -> None:
    draw = torch.Generator().manual_seed(0)
    p_T = torch.rand(2000, generator=draw, dtype=torch.float64).pow(4)
    q_T = (p_T * (0.8 * torch.randn(2000, generator=draw, dtype=torch.float64)).exp()).clamp(max=0.9999)
    there, back = zip(*((coin_kl(p, q), coin_kl(q, p)) for p, q in zip(p_T.tolist(), q_T.tolist(), strict=True)), strict=True)
    for phi in (0.001, 0.02, 0.1):
        decided_T = torch.tensor([min(abs(t - phi), abs(b - phi)) > 1e-5 for t, b in zip(there, back, strict=True)])
        expected_T = torch.tensor([max(t, b) <= phi for t, b in zip(there, back, strict=True)])
        actual_T = kpop_mask(p_T.log().float(), q_T.log().float(), phi) > 0
        assert actual_T[decided_T].equal(expected_T[decided_T]) and decided_T.float().mean() > 0.99 and expected_T.any()
    certain_T, likely_T = torch.zeros(1), torch.tensor([-0.1])
    assert kpop_mask(certain_T, certain_T, 0.1).item() == 1.0
    assert kpop_mask(certain_T, likely_T, 1.0).item() == 0.0
    assert kpop_mask(certain_T, torch.tensor([-1e-7]), 0.1).item() == 1.0  # float32's 0 is no coin that never falls otherwise


@pytest.mark.parametrize("name", OF_TOKENS)
def test_infinite_and_undefined_logprobs_weigh_nothing(name: str) -> None:
    old_T = torch.tensor([-INF, -1.0, -INF, NAN, -1.0, INF, INF], requires_grad=True)
    engine_T = torch.tensor([-1.0, -INF, -INF, -1.0, NAN, -1.0, INF])
    weights_T = OF_TOKENS[name](old_T, engine_T)
    assert weights_T.tolist() == [0.0] * 7
    assert not weights_T.requires_grad


@pytest.mark.parametrize("name", OF_TOKENS)
def test_a_huge_ratio_is_computed_without_overflow(name: str) -> None:
    weights_T = OF_TOKENS[name](torch.tensor([-500.0, 0.0]), torch.tensor([0.0, -500.0]))
    assert weights_T.tolist() == {"icepop": [0.0, 0.0], "tis": [0.0, 2.0], "clip": [0.5, 5.0], "kpop": [0.0, 0.0]}[name]


def test_sequence_mask_by_hand() -> None:
    # Geometric means: sqrt(2 x 0.5) = 1; (1.01^3)^(1/3) = 1.01; sqrt(0.9 x 0.9) = 0.9. The first token is a prompt's.
    batch = packed(3, 3, 2, mask=[0.0] + [1.0] * 7)
    old_T = torch.tensor([9.0, 2.0, 0.5, 1.01, 1.01, 1.01, 0.9, 0.9], requires_grad=True).log()
    engine_T = torch.zeros(8)
    assert sequence_mask(old_T, engine_T, batch).tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    assert sequence_mask(old_T, engine_T, batch, 0.95, 1.02).tolist() == [1, 1, 1, 1, 1, 1, 0, 0]
    assert sequence_mask(old_T, engine_T, batch, 0.0, 1.005).tolist() == [1, 1, 1, 0, 0, 0, 1, 1]
    assert not sequence_mask(old_T, engine_T, batch).requires_grad


@pytest.mark.parametrize("bad", [-INF, INF, NAN])
def test_one_undefined_ratio_drops_its_sequence(bad: float) -> None:
    old_T = torch.tensor([-1.0, bad, -1.0, -1.0])
    assert sequence_mask(old_T, torch.full((4,), -1.0), packed(2, 2)).tolist() == [0, 0, 1, 1]
    prompt = packed(2, 2, mask=[1.0, 0.0, 1.0, 1.0])
    assert sequence_mask(old_T, torch.full((4,), -1.0), prompt).tolist() == [1, 1, 1, 1]


def test_off_policy_sequence_mask_by_hand() -> None:
    # mean(engine - new): 0.5 x (0.2 + 0.6) = 0.4, twice, with either sign of A; then 0.1, and one that is undefined.
    new_T = torch.tensor([-1.2, -1.6, -1.2, -1.6, -1.1, NAN, -1.0])
    old_T, batch = torch.full((7,), -1.0), packed(2, 2, 1, 2)
    advantages_T = torch.tensor([-1.0, -1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    for delta, expected in ((0.3, [0, 0, 1, 1, 1, 0, 0]), (0.5, [1, 1, 1, 1, 1, 0, 0]), (0.05, [0, 0, 1, 1, 0, 0, 0])):
        assert off_policy_sequence_mask(new_T, old_T, advantages_T, batch, delta).tolist() == expected


def test_what_is_set_multiplies() -> None:
    old_T, engine_T, batch = torch.tensor([2.0, 0.5, 3.0, 3.0, 6.0, 1.0]).log(), torch.zeros(6), packed(2, 2, 2)
    near(Correction("icepop").weights(old_T, engine_T, batch), [2.0, 0.5, 3.0, 3.0, 0.0, 1.0])
    near(Correction("icepop", sequence_band=(0.9, 2.5)).weights(old_T, engine_T, batch), [2.0, 0.5, 0.0, 0.0, 0.0, 1.0])
    near(Correction("tis", cap=1.5, sequence_band=(0.9, 2.5)).weights(old_T, engine_T, batch), [1.5, 0.5, 0.0, 0.0, 1.5, 1.0])
    near(Correction("none", sequence_band=(0.9, 2.4)).weights(old_T, engine_T, batch), [1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    near(Correction("clip", 0.8, 1.25).weights(old_T, engine_T, batch), [1.25, 0.8, 1.25, 1.25, 1.25, 1.0])


def test_none_looks_at_no_ratio() -> None:
    assert Correction("none").weights(torch.tensor([-9.0, -1.0]), torch.tensor([-1.0, -INF]), packed(2)).tolist() == [1.0, 1.0]


def test_kpop_has_no_default_bound() -> None:
    with pytest.raises(ValueError, match="needs a phi"):
        Correction("kpop").weights(torch.zeros(2), torch.zeros(2), packed(2))
