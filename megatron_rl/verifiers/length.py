"""What a response's length, in tokens, adds to its value. Pure functions of numbers.

Invariants: lengths are clamped at `max_tokens`; every function is monotone in the length.
"""

from __future__ import annotations

import math


def cosine(tokens: int, max_tokens: int, at_zero: float, at_max: float, cap: float = math.inf) -> float:
    """Light-R1 (arXiv 2503.10460): r_L + (r_0 - r_L)(1 + cos(pi L / L_max)) / 2, at most `cap`: without one a policy that is paid
    for short correct answers stops thinking before it has learnt to."""
    share = min(tokens, max_tokens) / max_tokens
    return min(cap, at_max + 0.5 * (at_zero - at_max) * (1.0 + math.cos(math.pi * share)))


def soft_overlong(tokens: int, max_tokens: int, cache: int) -> float:
    """DAPO (arXiv 2503.14476, eq. 13): nothing up to max_tokens - cache, then a line down to -1 at max_tokens."""
    return -min(1.0, max(0.0, (tokens - (max_tokens - cache)) / cache))
