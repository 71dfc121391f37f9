r"""Mathematical equality of final answers, by math-verify over sympy.

The answer of a response is its last box, else the last LaTeX or plain expression it states. `metadata.math_mode`:

- `lenient` (the default) also accepts what a reader accepts: an answer without a box, a unit or percent sign that one side
  leaves out, an exact answer to a rounded gold one, parts or words written otherwise, the letter of a choice where gold is one;
- `strict` wants a box, and in it an answer of the gold one's value, with its unit.

math-verify's own time limits (SIGALRM, which a loop inside C code never sees) are off: the caller kills what hangs, and says so.

Invariants: a gold answer in a box is correct for itself; lenient accepts all that strict accepts; what has too many digits or
braces to be an answer is `unparsable` before any algebra.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import sympy
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse
from math_verify import verify as equal

from megatron_rl.types import Prompt, Score
from megatron_rl.verifiers import mcq
from megatron_rl.verifiers.answers import as_words, final_text, is_bare, last_box, overgrown, parts, stated, tidied, unit

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off

MODES = ("lenient", "strict")
_LATEX = (LatexExtractionConfig(),)
_GOLD = (LatexExtractionConfig(), ExprExtractionConfig())
_RESPONSE = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
_NUMBER = re.compile(r"\s*[-+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d*[.,]?\d+)\s*")
_CHOICE = re.compile(r"\s*\(?[A-J]\)?\s*")
_ROUNDED = re.compile(r"-?\d*\.(?P<places>\d{2,})")
_MIXED = re.compile(r"\s*(-?)(\d+) +(\d+/\d+)\s*")
_SIGN = re.compile(r"\\?%$")
_PERCENT = re.compile(r"(?P<value>-?[\d.,]+)\s*\\?%")

Parsed = Sequence[Any]  # of sympy's objects, and the text they were read from


def verify(response: str, prompt: Prompt) -> Score:
    mode = prompt.metadata.get("math_mode", "lenient")
    if mode not in MODES:
        return Score(0.0, "error", reason=f"metadata.math_mode={mode!r}; known are {', '.join(MODES)}")
    gold, text = tidied(prompt.answer), tidied(final_text(response))
    if fault := overgrown(gold):
        return _unreadable(gold, f"has {fault}")
    if fault := overgrown(text):
        return Score(0.0, "unparsable", reason=f"the response has {fault}")
    return _strict(text, gold) if mode == "strict" else _lenient(text, gold)


def _strict(text: str, gold: str) -> Score:
    box = last_box(text)
    if not box:
        return Score(0.0, "unparsable", extracted=box, reason="no box in the response")
    bare = last_box(gold) or gold
    if unit(box) != unit(bare):
        return _judged(False, box, f"its unit is {unit(box)!r}, the gold answer's {unit(bare)!r}")
    read = _gold(gold)
    if not read and not as_words(gold):
        return _unreadable(gold)
    return _judged(_same(read, _latex(box)) or _same_words(bare, box), box, f"not equal to {bare[:80]!r}")


def _lenient(text: str, gold: str) -> Score:
    letter = mcq.choice(gold) if _CHOICE.fullmatch(gold) or _is_prose(gold) else None
    if letter and (said := mcq.choice(text)):
        return _judged(said == letter, said, f"the answer is {letter}")
    read, bare = _gold(gold), last_box(gold) or gold.strip("$ ")
    stripped = text.strip().strip("$")
    answer = last_box(text) or (stripped if is_bare(stripped) else None)
    if _same_words(bare, answer or stated(text)):
        return _judged(True, answer or stated(text))
    if not read:
        return _unreadable(gold)
    target = list(parse(text, _RESPONSE, parsing_timeout=None))
    right = _same(read, target) or (answer is not None and _same_when_rewritten(bare, read, answer))
    if not right and not target and not (answer and _latex(answer)):
        return Score(0.0, "unparsable", extracted=answer, reason="no mathematical expression in the response")
    return _judged(right, answer or str(target[-1]), f"not equal to {bare[:80]!r}")


def _same_when_rewritten(gold: str, read: Parsed, answer: str) -> bool:
    """The rules beyond math-verify's, for an answer that stands alone."""
    target = _latex(answer)
    return (
        _same(read, target)
        or _same_complex(read, target)
        or _rounds_to(gold, target)
        or _same_parts(gold, answer)
        or _same_share(gold, answer)
    )


def _same(gold: Parsed, target: Parsed) -> bool:
    return bool(gold and target and equal(list(gold), list(target), timeout_seconds=None))


def _is_prose(gold: str) -> bool:
    return not is_bare(gold) and "$" not in gold and "\\" not in gold


def _same_words(gold: str, answer: str) -> bool:
    words = as_words(gold)
    return len(words) > 1 and words.replace(" ", "").isalpha() and words == as_words(answer)


def _same_complex(gold: Parsed, target: Parsed) -> bool:
    """math-verify takes `i` for a variable where it does not look like a complex number: i(2 - i)."""
    numbers, symbols = [], set()
    for parsed in (gold, target):
        expression = parsed[0] if parsed else None
        if not isinstance(expression, sympy.Expr):
            return False
        symbols |= {symbol.name for symbol in expression.free_symbols}
        numbers.append(expression.subs(dict.fromkeys(expression.free_symbols, sympy.I)))
    return symbols == {"i"} and bool(sympy.expand(numbers[0] - numbers[1]) == 0)


def _rounds_to(gold: str, target: Parsed) -> bool:
    """A gold answer of two decimals or more may be rounded: an exact answer that rounds to it is right. No other way round."""
    rounded = _ROUNDED.fullmatch(gold)
    exact = target[0] if target and isinstance(target[0], sympy.Expr) and not target[0].atoms(sympy.Float) else None
    if not rounded or exact is None or not exact.is_number or exact.is_integer or not exact.is_real:
        return False
    half = sympy.Rational(1, 2) / 10 ** len(rounded["places"])
    return bool(abs(sympy.N(exact - sympy.Rational(gold), 30)) <= half)


def _same_parts(gold: str, answer: str) -> bool:
    """`p=5, q=2 and p=7, q=2`: as many parts, each equal to one of the other's."""
    golds, answers = parts(gold), parts(answer)
    if not 1 < len(golds) == len(answers) <= 8:
        return False
    left = [_latex(part) for part in answers]
    for part in golds:
        match = next((target for target in left if _same(_latex(part), target)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _same_share(gold: str, answer: str) -> bool:
    """10 % is 0.1."""
    shares = [_PERCENT.fullmatch(text.strip()) for text in (gold, answer)]
    if (shares[0] is None) == (shares[1] is None):
        return False
    left, right = (_latex(f"({share['value']})/100" if share else text) for share, text in zip(shares, (gold, answer), strict=True))
    return _same(left, right)


def _judged(right: bool, extracted: str | None, reason: str = "") -> Score:
    return Score(
        float(right), "correct" if right else "wrong", extracted=extracted and extracted[:200], reason="" if right else reason
    )


def _unreadable(gold: str, why: str = "cannot be parsed") -> Score:
    return Score(0.0, "error", reason=f"the gold answer {gold[:80]!r} {why}")


def _latex(text: str) -> list[Any]:
    """Without a percent sign at the end, which the grammar of LaTeX answers does not know: 10 % is 10 to math-verify, too."""
    mixed = _MIXED.fullmatch(text)
    plain = "{}({}+{})".format(*mixed.groups()) if mixed else _SIGN.sub("", text)
    return list(parse(f"${plain}$", _LATEX, parsing_timeout=None))


@lru_cache(maxsize=1024)
def _gold(answer: str) -> tuple[Any, ...]:
    """A gold answer is a bare expression more often than a sentence. `1,22` may be a number and may be two."""
    bare = "$" not in answer and "\\boxed" not in answer
    read = _latex(answer) if bare else []
    if not read or _NUMBER.fullmatch(answer):
        read += parse(answer, _GOLD, parsing_timeout=None)
    return tuple(read)
