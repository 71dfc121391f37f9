"""Mathematical equality of final answers, by math-verify.

The answer of a response is its last boxed expression, else the last LaTeX or plain expression it states. math-verify's own time
limits (SIGALRM, which a loop inside C code never sees) are off: the caller kills what hangs, and the status says so.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse
from math_verify import verify as equal

from megatron_rl.types import Prompt, Score

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off

_LATEX = (LatexExtractionConfig(),)
_NUMBER = re.compile(r"\s*[-+]?[\d.,]+\s*")
_GOLD = (LatexExtractionConfig(), ExprExtractionConfig())
_RESPONSE = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())


def verify(response: str, prompt: Prompt) -> Score:
    gold = _gold(prompt.answer)
    if not gold:
        return Score(0.0, "error", reason=f"the gold answer {prompt.answer[:80]!r} cannot be parsed")
    target = parse(response, _RESPONSE, parsing_timeout=None)
    if not target:
        return Score(0.0, "unparsable", reason="no mathematical expression in the response")
    right = equal(gold, target, timeout_seconds=None)
    return Score(float(right), "correct" if right else "wrong", extracted=str(target[-1])[:200])


@lru_cache(maxsize=1024)
def _gold(answer: str) -> list[Any]:
    """A gold answer is a bare expression more often than a sentence. `1,22` is a number, and no list of LaTeX."""
    bare = "$" not in answer and "\\boxed" not in answer and not _NUMBER.fullmatch(answer)
    latex = parse(f"${answer}$", _LATEX, parsing_timeout=None) if bare else []
    return list(latex or parse(answer, _GOLD, parsing_timeout=None))
