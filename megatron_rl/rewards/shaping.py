"""Length rewards as a run is configured: from a judgement and its response's tokens to the value that trains.

Invariants: a status never changes, so that accuracies do not know of lengths; under `cosine` a correct answer is worth more than a
wrong one at any length (the configuration refuses others).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from megatron_rl.types import Score
from megatron_rl.verifiers.length import cosine, soft_overlong


def length_shape(
    method: Literal["cosine", "soft_overlong"],
    max_tokens: int,
    *,
    correct: tuple[float, float],
    correct_cap: float,
    wrong: tuple[float, float],
    cache_tokens: int,
) -> Callable[[Score, int], Score]:
    def shape(score: Score, tokens: int) -> Score:
        if method == "soft_overlong":
            extra = soft_overlong(tokens, max_tokens, min(cache_tokens, max_tokens))
        elif score.status == "correct":
            extra = cosine(tokens, max_tokens, *correct, correct_cap)
        else:
            extra = cosine(tokens, max_tokens, *wrong)
        reason = f"{score.reason}; " if score.reason else ""
        return replace(score, value=score.value + extra, reason=f"{reason}length {extra:+.3g}")

    return shape
