"""Where the answer stands in a response, and how answers are written: text alone, no algebra.

Invariants:
- every function is linear in its input, whatever that is: a megabyte takes well under a second;
- `final_text` keeps the last box, else the end, in at most `WINDOW` characters: nothing after it sees more.
"""

from __future__ import annotations

import re
import unicodedata

WINDOW = 8_000  # characters; an answer that does not fit is none
_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])")
_INVISIBLE = {"Cc", "Cf", "Cs", "Co"}  # control, format (right-to-left marks, zero widths), surrogates, private use
_PLAIN = str.maketrans({"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ",
                        "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "°": r"^\circ ", "\u00a0": " "})  # fmt: skip
_COMMANDS = (
    "begin|boxed|cdot|cfrac|circ|cos|cup|dfrac|end|frac|ge|geq|in|infty|le|left|leq|ln|log|mathbf|mathrm|mbox|ne|neq|pi|pm|"
    "quad|right|sin|sqrt|tan|text|textbf|textit|tfrac|times"
)
_ESCAPED_TWICE = re.compile(rf"(?<!\\)\\\\(?=(?:{_COMMANDS})(?![a-zA-Z]))")
_MONEY = re.compile(r"\\\$ ?(?=[\d.])")
_STATED = re.compile(r"(?i:\banswer(?: is:?|:)) (?P<answer>[^\n]{1,200})$")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname) ?\{([^{}]*)\}")
_COMMAND = re.compile(r"\\(?:(?:begin|end)\{[a-z*]+\}|[a-zA-Z]+)")
_FUNCTIONS = {
    "sin",
    "cos",
    "tan",
    "cot",
    "sec",
    "csc",
    "log",
    "exp",
    "sqrt",
    "arcsin",
    "arccos",
    "arctan",
    "and",
    "mod",
    "abs",
    "det",
}
_WORD = re.compile(r"[a-zA-Z]{3,}")
_PHRASE = re.compile(r"\b[a-z]{2,} [a-z]{2,}\b")
_LIST_MARK = re.compile(r"\s*[a-zA-Z]\s*[:)](?!=)")
_QUAD = re.compile(r"\\q?quad(?![a-zA-Z])")
_JOINT = re.compile(r";|\\text ?\{\s?(?:and|or)\s?\}|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])")
_FRAMED = re.compile(r"\\(?:text|mbox|mathrm|textrm) ?\{(?P<unit>[^{}]*)\}(?P<power>\^\{?\d\}?)?\.?$")
_PLAIN_UNIT = re.compile(r"(?<=[\d.})\s])(?:\\?(?P<percent>%)|(?P<unit>[a-z]{2,}))\.?$")
MAX_DIGITS = 400  # of one number
MAX_DEPTH = 40  # of braces, and of brackets
_DIGITS = re.compile(rf"\d{{{MAX_DIGITS}}}")


def final_text(response: str) -> str:
    """What a response says at last: after its thoughts if they were closed, from the last box on if that lies far back."""
    spoken = response.rpartition("</think>")[2]
    text = spoken if spoken.strip() else response
    tail = text[-WINDOW:]
    if _BOX.search(tail):
        return tail
    boxes = [match.start() for match in _BOX.finditer(text)]
    return text[boxes[-1] : boxes[-1] + WINDOW] if boxes else tail


def last_box(text: str) -> str | None:
    r"""The content of the last \boxed or \fbox whose braces close, or its one character: \boxed 5."""
    closing = _closing_braces(text)
    for match in reversed(list(_BOX.finditer(text))):
        start = match.end() + (text[match.end() : match.end() + 1] == " ")
        if start in closing:
            return text[start + 1 : closing[start]].strip()
        if text[start : start + 1].isalnum():
            return text[start]
    return None


def _closing_braces(text: str) -> dict[int, int]:
    """Where each brace that is closed is closed. Escaped ones are text."""
    closing: dict[int, int] = {}
    opened: list[int] = []
    escaped = False
    for i, character in enumerate(text):
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        elif character == "{":
            opened.append(i)
        elif character == "}" and opened:
            closing[opened.pop()] = i
    return closing


def boxes(text: str) -> int:
    return len(_BOX.findall(text))


def tidied(text: str) -> str:
    r"""The same in the TeX that parsers know: no invisible characters, no signs beyond ASCII, no \\frac for \frac, no dollars."""
    visible = "".join(c for c in text.translate(_PLAIN) if c in "\n\t" or unicodedata.category(c) not in _INVISIBLE)
    return _MONEY.sub("", _ESCAPED_TWICE.sub(r"\\", visible)).replace(r"\varnothing", r"\emptyset")


def is_bare(text: str) -> bool:
    """Whether a text is an expression alone: no sentence around it, no mark of TeX's mathematics."""
    if any(mark in text for mark in ("$", r"\(", r"\[", r"\boxed", "####", "<<")) or "\n" in text.strip() or len(text) > 400:
        return False
    prose = _COMMAND.sub(" ", _TEXT.sub(" ", text))
    return (
        not _LIST_MARK.match(text)
        and not _PHRASE.search(prose)
        and all(word.lower() in _FUNCTIONS for word in _WORD.findall(prose))
    )


def as_words(text: str) -> str:
    r"""For answers that are words: `\text{ Even }.` and `even` are the same."""
    plain = _TEXT.sub(r"\1", text).replace("$", "").replace("{", "").replace("}", "").replace("\\", " ")
    return " ".join(plain.split()).strip(" .,:;!*").lower()


def stated(text: str) -> str:
    """The words a text ends with: those of its last line, or what they say the answer is."""
    line = text.strip().rpartition("\n")[2]
    match = _STATED.search(line)
    return match["answer"] if match else line


def parts(answer: str) -> list[str]:
    r"""`p=5, q=2 \text{ and } p=7, q=2`, `1; 2`, `1 or 2`: what is joined. Commas join within a part."""
    return [part.strip(" ,") for part in _JOINT.split(_QUAD.sub(" ", answer))]


def unit(answer: str) -> str:
    r"""What an answer ends with after its number: `cm^2` of `30\text{ cm}^2`, `%` of `5\%`, else nothing."""
    if match := _FRAMED.search(answer.rstrip()):
        words = match["unit"] + (match["power"] or "")
    elif match := _PLAIN_UNIT.search(answer.rstrip()):
        words = match["percent"] or match["unit"]
    else:
        return ""
    return "".join(words.split()).replace("{", "").replace("}", "").lower().removesuffix("s")


def overgrown(text: str) -> str | None:
    """What makes a text too much for any parser, if anything."""
    if _DIGITS.search(text):
        return f"a number of more than {MAX_DIGITS} digits"
    for opening, closing in (("{", "}"), ("([", ")]")):
        depth = 0
        for character in text:
            if character in opening:
                depth += 1
            elif character in closing:
                depth = max(0, depth - 1)
            if depth > MAX_DEPTH:
                return f"more than {MAX_DEPTH} nested {opening}"
    return None
