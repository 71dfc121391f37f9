"""Whether a response has the form that was asked for, whatever it answers: all parts of `metadata.format`, or nothing.

- `think`: thoughts, then `</think>` once, then an answer; the opening tag may stand in the prompt, as Ring's template has it;
- `answer`: the response ends with one `<answer>...</answer>`;
- `boxed`: one box after the thoughts, and what is in it.

Invariant: nothing can be had by repeating a part or by leaving it empty.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from megatron_rl.types import Prompt, Score
from megatron_rl.verifiers.answers import boxes, last_box

DEFAULT = ("think", "boxed")
_ANSWER = re.compile(r"<answer>(?P<answer>[^<]*(?:<(?!/?answer>)[^<]*)*)</answer>\s*\Z")


def verify(response: str, prompt: Prompt) -> Score:
    wanted = prompt.metadata.get("format", DEFAULT)
    unknown = [part for part in wanted if part not in PARTS]
    if isinstance(wanted, str) or unknown or not wanted:
        return Score(0.0, "error", reason=f"metadata.format={wanted!r} must list some of {', '.join(PARTS)}")
    for part in wanted:
        if fault := PARTS[part](response):
            return Score(0.0, "wrong", reason=f"{part}: {fault}")
    return Score(1.0, "correct")


def _think(response: str) -> str | None:
    thoughts, tag, rest = response.strip().removeprefix("<think>").partition("</think>")
    if not tag:
        return "no </think>"
    if "<think>" in thoughts or "<think>" in rest or "</think>" in rest:
        return "more than one block of thoughts"
    return None if thoughts.strip() and rest.strip() else "nothing " + ("in" if rest.strip() else "after") + " the thoughts"


def _answer(response: str) -> str | None:
    match = _ANSWER.search(response)
    if not match or response.count("<answer>") != 1:
        return "the response does not end with one <answer>...</answer>"
    return None if match["answer"].strip() else "an empty <answer>"


def _boxed(response: str) -> str | None:
    spoken = response.rpartition("</think>")[2]
    count = boxes(spoken)
    if count != 1:
        return f"{count} boxes"
    return None if last_box(spoken) else "an empty box"


PARTS: Mapping[str, Callable[[str], str | None]] = {"think": _think, "answer": _answer, "boxed": _boxed}
