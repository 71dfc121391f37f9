r"""Multiple choice: the letter, A to J, that a response settles on.

In this order, the last mention each: a box; what follows "answer", "option" or "choose"; the first line if it starts with a
choice and is most of the response; the last line if it is or starts with one; a letter in brackets or bold; the text of exactly one
option, where `metadata.options` gives them (["A) 5", "B) 6"], ["5", "6"] or {"A": "5"}).

Invariant: prose is no choice: neither the article A nor the pronoun I is a letter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from megatron_rl.types import Prompt, Score
from megatron_rl.verifiers.answers import as_words, final_text, last_box, tidied

LETTERS = "ABCDEFGHIJ"
_LETTER = r"[(\[]?(?P<letter>[B-HJ]|[AI](?!\s(?!is\b)[a-z]))(?![A-Za-z0-9'’&^_+])"
_CUED = re.compile(
    r"(?i:\b(?:ans|answer|choice|option)\b(?:[^.\n]{0,60}?\b(?:is|be|are)\b)?|\b(?:choose|select|pick|chose)\b)"
    rf"[\s:=.,-]{{0,6}}(?i:option\s|choice\s)?\s{{0,4}}{_LETTER}"
)
_NAMED = re.compile(r"(?<![A-Za-z0-9])(?P<letter>[A-J])\)? (?i:is the (?:correct |right )?(?:answer|choice|option))")
_LABELLED = re.compile(r"\s{0,9}\(?(?P<letter>[A-J])\s{0,3}[).:\]](?P<text>.*)", re.DOTALL)
_ALONE = re.compile(r"\s{0,9}[(\[]?\s?(?P<letter>[A-J])\s?[)\].,:]{0,3}\s{0,9}")
_BRACKETED = re.compile(r"[(\[](?P<letter>[A-J])[)\]]")
_BOLD = re.compile(r"\*\*\s?\(?(?P<letter>[A-J])\s?(?:[).:][^*\n]{0,200})?\*\*")
_DECORATION = re.compile(r"\*\*|\*|`|\$|\\[()\[\]]|\\(?:text|textbf|mathrm|mathbf) ?\{([^{}]*)\}")


def verify(response: str, prompt: Prompt) -> Score:
    options = _options(prompt.metadata.get("options", ()))
    gold = letter_of(prompt.answer) or _by_text(tidied(prompt.answer), options)
    if gold is None:
        return Score(0.0, "error", reason=f"the gold answer {prompt.answer[:80]!r} names no choice")
    letter = choice(response, options)
    if letter is None:
        return Score(0.0, "unparsable", reason="the response names no choice")
    right = letter == gold
    return Score(float(right), "correct" if right else "wrong", extracted=letter, reason="" if right else f"the answer is {gold}")


def letter_of(answer: str) -> str | None:
    """The letter that an answer is: `B`, `(B)`, `b`, `B) 65`, `**B**`."""
    plain = _undecorated(answer)
    match = _ALONE.fullmatch(plain.upper()) or _LABELLED.fullmatch(plain)
    return match["letter"] if match else None


def choice(response: str, options: Mapping[str, str] | None = None) -> str | None:
    options = options or {}
    text = tidied(final_text(response)).strip()
    box = last_box(text)
    if box is not None:
        return letter_of(box) or _by_text(box, options)
    plain = _undecorated(text)
    cued = [match for pattern in (_CUED, _NAMED) for match in pattern.finditer(plain)]
    if cued:
        return max(cued, key=lambda match: match.start("letter"))["letter"]
    lines = [line for line in plain.splitlines() if line.strip()] or [""]
    if 2 * len(lines[0]) > len(plain) and (letter := letter_of(lines[0])):
        return letter
    if letter := letter_of(lines[-1]):
        return letter
    set_off = [match for pattern in (_BRACKETED, _BOLD) for match in pattern.finditer(text)]
    if set_off:
        return max(set_off, key=lambda match: match.start())["letter"]
    return _by_text(lines[-1], options)


def _undecorated(text: str) -> str:
    return _DECORATION.sub(lambda match: match[1] or "", text).strip()


def _options(given: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """Letter -> words. Options without a label count from A."""
    if isinstance(given, Mapping):
        return {letter: as_words(tidied(text)) for letter, text in given.items()}
    labelled = [match for match in map(_LABELLED.fullmatch, given) if match]
    if len(labelled) == len(given):
        return {match["letter"]: as_words(tidied(match["text"])) for match in labelled}
    return {letter: as_words(tidied(text)) for letter, text in zip(LETTERS, given, strict=False)}


def _by_text(answer: str, options: Mapping[str, str]) -> str | None:
    """The one option whose text an answer is, or ends with."""
    words = as_words(answer)
    for found in (
        [letter for letter, text in options.items() if text and words == text],
        [letter for letter, text in options.items() if text and words.endswith(f" {text}")],
    ):
        if len(found) == 1:
            return found[0]
    return None
