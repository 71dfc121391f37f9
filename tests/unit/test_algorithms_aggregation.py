"""Token weights against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from megatron_rl.algorithms.aggregation import token_weights

LENGTHS, GROUPS = [2, 6, 4], ["a", "a", "b"]


def test_token_by_hand() -> None:
    result = token_weights(LENGTHS, GROUPS, "token")
    assert result.weights == (1 / 12,) * 3 and result.keep_lengths == (2, 6, 4)


def test_sequence_by_hand() -> None:
    # Two groups. a has two members: 1 / (2 x 2 x 2), 1 / (2 x 2 x 6); b one: 1 / (2 x 1 x 4).
    result = token_weights(LENGTHS, GROUPS, "sequence")
    assert result.weights == (1 / 8, 1 / 24, 1 / 8) and result.keep_lengths == (2, 6, 4)


def test_token_budget_cuts_the_response_that_crosses_it() -> None:
    # 2 + 6 = 8 fit into 10, of the 4 there is room for 2.
    result = token_weights(LENGTHS, GROUPS, "token_budget", 10)
    assert result.weights == (0.1, 0.1, 0.1) and result.keep_lengths == (2, 6, 2)


def test_token_budget_lists_what_found_no_room() -> None:
    result = token_weights(LENGTHS, GROUPS, "token_budget", 8)  # full exactly at the end of group a
    assert result.weights == (1 / 8, 1 / 8, 0.0) and result.keep_lengths == (2, 6, 0)
    result = token_weights(LENGTHS, GROUPS, "token_budget", 1)
    assert result.keep_lengths == (1, 0, 0)


def test_token_budget_divides_by_the_budget_even_when_it_is_not_filled() -> None:
    result = token_weights(LENGTHS, GROUPS, "token_budget", 100)
    assert result.weights == (0.01,) * 3 and result.keep_lengths == (2, 6, 4)


def test_constant_by_hand() -> None:
    result = token_weights(LENGTHS, GROUPS, "constant", constant=8)
    assert result.weights == (1 / 24,) * 3 and result.keep_lengths == (2, 6, 4)
    assert token_weights([200, 1, 1], GROUPS, "constant", constant=8).weights == result.weights


@pytest.mark.parametrize(("method", "budget"), [("token", None), ("sequence", None), ("token_budget", 17)])
def test_the_weights_of_all_kept_tokens_add_up_to_one(method: str, budget: int | None) -> None:
    result = token_weights([3, 5, 7, 1, 4], [0, 0, 1, 1, 2], method, budget)  # type: ignore[arg-type]
    assert math.isclose(math.fsum(w * n for w, n in zip(result.weights, result.keep_lengths, strict=True)), 1.0, rel_tol=1e-12)


def test_nothing_in_nothing_out() -> None:
    assert token_weights([], [], "token").weights == token_weights([], [], "sequence").weights == ()


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token per response"):
        token_weights([3, 0], [0, 0], "token")
    with pytest.raises(ValueError, match="one group id"):
        token_weights([3], [0, 0], "token")
    with pytest.raises(ValueError, match="needs a budget"):
        token_weights([3], [0], "token_budget")
    with pytest.raises(ValueError, match="needs a constant"):
        token_weights([3], [0], "constant")
