"""What a run's evaluations say RL did and did not teach, in sentences computed from the numbers.

A rise of accuracy alone does not tell learning from eliciting. The forced pass does: the same prompts with each response made to
begin with its working, before and after. What the model could already do when forced, RL did not teach.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NOISE = 0.03  # a change below three points is not called one: 800 samples at 50 % have a standard error of 1.8 points


def lessons(evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    """Paragraphs about the first and the last of `evaluations`: rows with `eval/accuracy`, `eval/accuracy_forced` and so on."""
    if len(evaluations) < 2:
        return ["This run has no evaluation before and after: its curves show the training reward alone."]
    before, after = evaluations[0], evaluations[-1]
    text = [_accuracy(before, after)]
    if "eval/accuracy_forced" in before and "eval/accuracy_forced" in after:
        text.append(_forced(before, after))
    else:
        text.append(
            "The forced-working check was not run (eval.forced_prefix=true), so these numbers cannot tell whether RL taught the "
            "model something or brought out what it could already do."
        )
    return text


def _accuracy(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    a, b = before["eval/accuracy"], after["eval/accuracy"]
    verb = "hardly moved" if abs(b - a) < NOISE else "rose" if b > a else "fell"
    sentence = f"On held-out prompts sampled accuracy {verb}, from {_percent(a)} to {_percent(b)} ({_points(b - a)})"
    if "eval/accuracy_greedy" in before and "eval/accuracy_greedy" in after:
        greedy = before["eval/accuracy_greedy"], after["eval/accuracy_greedy"]
        sentence += f", greedy accuracy from {_percent(greedy[0])} to {_percent(greedy[1])} ({_points(greedy[1] - greedy[0])})"
    if "eval/response_tokens" in before and "eval/response_tokens" in after:
        lengths = before["eval/response_tokens"], after["eval/response_tokens"]
        sentence += f"; the mean answer went from {lengths[0]:.1f} to {lengths[1]:.1f} tokens"
    return sentence + "."


def _forced(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    a, b = before["eval/accuracy"], after["eval/accuracy"]
    could, can = before["eval/accuracy_forced"], after["eval/accuracy_forced"]
    start = f"Made to begin with its working, the model was already right on {_percent(could)} of the same prompts before RL"
    moved = f"that forced accuracy went from {_percent(could)} to {_percent(can)} ({_points(can - could)})"
    if b - a < NOISE:
        return f"{start}, and sampled accuracy did not rise; {moved}. RL found no better way to answer here."
    elicited = min(max((could - a) / (b - a), 0.0), 1.0)
    share = f"{elicited:.0%} of the rise" if elicited < 1 else "the whole rise"
    taught = (
        f"over RL {moved}: the steps of the working themselves did not get more reliable"
        if abs(can - could) < NOISE
        else f"over RL {moved}: the working itself got {'more' if can > could else 'less'} reliable, too"
    )
    if elicited < 0.5:
        return f"{start}; only {share} lies within that reach, and {taught}. Most of the rise is new ability."
    start = f"{start}, so {share} lies within what it could do already, and {taught}"
    if can - could >= NOISE:
        return f"{start}. RL found that showing the working pays, and improved it."
    if elicited < 0.9:
        return f"{start}. RL found that showing the working pays; the rest of the rise is new."
    return (
        f"{start}. RL found that showing the working pays: it changed how the model chooses to answer, and taught it little or "
        "nothing about the task."
    )


def _percent(value: float) -> str:
    return f"{value * 100:.1f}\u00a0%"


def _points(change: float) -> str:
    return f"{change * 100:+.1f} points".replace("-", "−")
