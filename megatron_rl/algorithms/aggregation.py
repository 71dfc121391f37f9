"""What one token weighs in the loss, known before the first backward pass.

The objective is the sum over all tokens of all microbatches of all replicas of weight x term: nothing is divided later, so neither
packing nor the number of replicas can change it.

Invariants (tests/unit/test_algorithms_aggregation.py):
- token and sequence: the weights of all tokens add up to 1; so do token_budget's where the budget is filled;
- token_budget: kept tokens add up to min(budget, all of them), and the divisor is the budget, always;
- constant: a token weighs the same however long its own response and the others are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

AggregationMethod = Literal["token_budget", "token", "sequence", "constant"]


@dataclass(frozen=True, slots=True)
class TokenWeights:
    """One entry per sequence."""

    weights: tuple[float, ...]  # of each kept token
    keep_lengths: tuple[int, ...]  # train on the first so many response tokens; 0: nothing of this one


def token_weights(
    response_lengths: Sequence[int],
    group_ids: Sequence[Hashable],
    method: AggregationMethod,
    budget: int | None = None,
    constant: int | None = None,
) -> TokenWeights:
    """`response_lengths` in tokens, over all replicas, groups in the order in which they may take the budget.

    - token: 1 / all tokens (DAPO, arXiv 2503.14476, section 3.3).
    - sequence: 1 / (groups x members of the group x tokens of the response): GRPO's mean of means, IcePop's objective
      (arXiv 2510.18855, section 2.3.2).
    - token_budget: 1 / budget (C3PO, arXiv 2506.14731, section 3.2). Responses fill the budget one after the other, the one
      that crosses it is cut there. Advantages come first: they need whole groups and whole responses.
    - constant: 1 / (responses x constant), whatever their lengths (Dr.GRPO, arXiv 2503.20783, section 3.1).

    Raises ValueError for an empty response, and for token_budget or constant without theirs.
    """
    if len(response_lengths) != len(group_ids) or min(response_lengths, default=1) < 1:
        raise ValueError(f"one group id and at least one token per response: lengths {response_lengths}, group ids {group_ids}")
    keep = tuple(response_lengths)
    if method == "token":
        return TokenWeights(tuple(1 / sum(keep) for _ in keep), keep)
    if method == "sequence":
        sizes = Counter(group_ids)
        weights = tuple(1 / (len(sizes) * sizes[group] * length) for group, length in zip(group_ids, keep, strict=True))
        return TokenWeights(weights, keep)
    if method == "constant":
        if constant is None or constant < 1:
            raise ValueError(f"constant needs a constant of at least one token, not {constant}")
        return TokenWeights(tuple(1 / (len(keep) * constant) for _ in keep), keep)
    if budget is None or budget < 1:
        raise ValueError(f"token_budget needs a budget of at least one token, not {budget}")
    keep = _fill(keep, budget)
    return TokenWeights(tuple(1 / budget if kept else 0.0 for kept in keep), keep)


def _fill(lengths: Sequence[int], budget: int) -> tuple[int, ...]:
    kept, room = [], budget
    for length in lengths:
        kept.append(min(length, room))
        room -= kept[-1]
    return tuple(kept)
