"""reasoning-gym's own scorers. `prompt.metadata` holds the dataset's name and the entry the scorer wants.

The answer is what follows the last `#`. Invariant: the reward is 1 where the scorer gives its full mark and 0 elsewhere. Partial
marks would pay for text that merely contains the answer (`compute_decimal_reward`, reasoning_gym/utils.py), and a policy finds
that at once; they are kept in `reason`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import reasoning_gym

from megatron_rl.types import Prompt, Score


def verify(response: str, prompt: Prompt) -> Score:
    _, mark, tail = response.rpartition("#")
    answer = tail.strip()
    if not mark or not answer:
        return Score(0.0, "unparsable", reason="nothing follows a '#'" if mark else "no '#' in the response")
    mark_given = float(_scorer(prompt.metadata["dataset"])(answer, dict(prompt.metadata["entry"])))
    right = mark_given >= 1.0
    reason = "" if right else f"the scorer gives {mark_given:.3g}"
    return Score(float(right), "correct" if right else "wrong", extracted=answer, reason=reason)


@cache
def _scorer(dataset: str) -> Any:
    return reasoning_gym.get_score_answer_fn(dataset)
