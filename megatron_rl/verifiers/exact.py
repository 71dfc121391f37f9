"""The whole response, without surrounding white space, is the answer."""

from __future__ import annotations

from megatron_rl.types import Prompt, Score


def verify(response: str, prompt: Prompt) -> Score:
    answer = response.strip()
    if not answer:
        return Score(0.0, "unparsable", reason="empty response")
    right = answer == prompt.answer.strip()
    return Score(float(right), "correct" if right else "wrong", extracted=answer)
