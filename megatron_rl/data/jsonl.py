"""JSONL files whose every fault is one line that names file and line.

Invariants: blank lines are skipped but counted, so that a number shown is the number an editor shows; a fault is never skipped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_rl.config.errors import UserError


def read_jsonl(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("<file>:<line>", object) of every line; an empty or missing file is a UserError too."""
    path = Path(path)
    if not path.is_file():
        what = "is a directory, not a JSONL file" if path.is_dir() else f"no such file (relative paths start from {Path.cwd()})"
        raise UserError(f"{path}: {what}", exit_code=1)
    empty = True
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                empty = False
                yield f"{path}:{number}", _parse(line, f"{path}:{number}")
    if empty:
        raise UserError(f"{path}: the file is empty", exit_code=1)


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})", exit_code=1) from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error.msg} at column {error.colno})", exit_code=1) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a nesting as deep
        raise UserError(f"{where}: not readable JSON ({error})", exit_code=1) from None
    if rb"\ud" in line.lower() and not _is_text(value):
        raise UserError(f"{where}: half of a surrogate pair (\\ud...) is no text", exit_code=1)
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, found {kind(value)}", exit_code=1)
    return value


def _is_text(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def field(row: dict[str, Any], key: str, expected: type, where: str) -> Any:
    """`row[key]`, which must be there and of the type `expected`."""
    if key not in row:
        raise UserError(f"{where}: missing key {key!r}", exit_code=1)
    value = row[key]
    if not isinstance(value, expected) or isinstance(value, bool):
        quotes = " (put it in quotes)" if expected is str and isinstance(value, (int, float)) else ""
        raise UserError(f"{where}: {key!r} must be {_NAMES[expected]}, found {kind(value)}{quotes}", exit_code=1)
    return value


def refuse_unknown(row: dict[str, Any], known: tuple[str, ...], where: str, hint: str = "") -> None:
    unknown = [key for key in row if key not in known]
    if unknown:
        raise UserError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(known)}{hint}", exit_code=1)


_NAMES: dict[type, str] = {str: "a string", dict: "an object", list: "a list"}


def kind(value: Any) -> str:
    """A JSON value's type in JSON's words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, (int, float)):
        return f"the number {value}"
    return _NAMES[type(value)]
