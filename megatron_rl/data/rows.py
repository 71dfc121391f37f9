"""A row of any of the formats that are read -> a row of ours, or one line that says what is wrong with it.

Ours: {"prompt": str | "messages": [{"role", "content"}, ..], "answer": str, "verifier": str, "id"?: str, "domain"?: str,
"metadata"?: object}.

verl's, read as it is: {"data_source", "prompt": [messages], "ability", "reward_model": {"ground_truth"}, "extra_info"}. The data
source is the domain, extra_info the metadata, and the ability names the verifier where `data.verifier` does not.

Others: `data.columns` says which column is what; columns that it does not name are left alone.

Invariants: a column that is given to one part of a row is no other part of it; in JSONL no key of ours is misspelt in silence.
"""

from __future__ import annotations

import json
from typing import Any

from megatron_rl import verifiers
from megatron_rl.config.data import RowFormat
from megatron_rl.config.errors import UserError
from megatron_rl.data.jsonl import field, refuse_unknown
from megatron_rl.data.sources import Row

KEYS = ("id", "prompt", "messages", "answer", "verifier", "domain", "metadata")
QUESTIONS = ("prompt", "messages", "question", "problem")  # columns that hold a question, in files of anyone's making
ABILITIES = {"math": "math", "MATH": "math"}  # verl's `ability` -> the verifier


def our_row(row: Row, where: str, format: RowFormat, foreign: bool = False) -> Row:
    """`foreign`: from a format whose columns have types, where a number is a fine answer."""
    columns = format.columns.named
    if columns:
        row = _mapped(row, columns, where)
    elif is_verl(row):
        row = _from_verl(row, where, format.verifier)
    elif foreign:
        row = {key: row[key] for key in KEYS if key in row}
    else:
        refuse_unknown(row, KEYS, where, hint="; anything else belongs under 'metadata'")
    if foreign or columns:
        row = _tolerant(row)
    defaults = {"verifier": format.verifier, "domain": format.domain}
    row = {key: value for key, value in defaults.items() if value is not None} | row
    _check(row, where, format)
    return row | {"answer": _final(row["answer"], where, format.answer_after)}


def question(row: Row, where: str, column: str | None = None) -> str:
    """What is asked in a row, whatever its format; of messages, those of the user."""
    name = column or next((name for name in QUESTIONS if name in row), None)
    if name is None or name not in row:
        wanted = repr(name) if name else " or ".join(map(repr, QUESTIONS))
        raise UserError(f"{where}: no column {wanted}; there are {', '.join(row)}", exit_code=1)
    value = row[name]
    if isinstance(value, list):
        _check_messages(value, where)
        return "\n".join(message["content"] for message in value if message["role"] == "user")
    return str(field(row, name, str, where))


def is_verl(row: Row) -> bool:
    return "reward_model" in row and isinstance(row.get("prompt"), list)


def _mapped(row: Row, columns: dict[str, str], where: str) -> Row:
    for key, column in columns.items():
        if column not in row:
            raise UserError(f"{where}: no column {column!r} (data.columns.{key}); there are {', '.join(row)}", exit_code=1)
    taken = set(columns.values()) | ({"prompt", "messages"} if columns.keys() & {"prompt", "messages"} else set())
    own = {key: row[key] for key in KEYS if key in row and key not in columns and key not in taken}
    return own | {key: row[column] for key, column in columns.items()}


def _from_verl(row: Row, where: str, verifier: str | None) -> Row:
    ability = row.get("ability")
    name = verifier or ABILITIES.get(str(ability))
    if name is None:
        raise UserError(f"{where}: the ability {ability!r} names no verifier; data.verifier=... does", exit_code=1)
    truth = field(row, "reward_model", dict, where).get("ground_truth")
    if truth is None:
        raise UserError(f"{where}: missing key 'reward_model.ground_truth'", exit_code=1)
    domain = {"domain": row["data_source"]} if "data_source" in row else {}
    return domain | {"messages": row["prompt"], "answer": _text(truth), "verifier": name, "metadata": row.get("extra_info", {})}


def _tolerant(row: Row) -> Row:
    row = dict(row)
    if isinstance(row.get("prompt"), list) and "messages" not in row:
        row["messages"] = row.pop("prompt")
    return row | {key: _text(row[key]) for key in ("id", "answer", "domain") if key in row}


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _check(row: Row, where: str, format: RowFormat) -> None:
    if ("prompt" in row) == ("messages" in row):
        raise UserError(f"{where}: expected either 'prompt' or 'messages'", exit_code=1)
    if "messages" in row:
        _check_messages(field(row, "messages", list, where), where)
        if not format.chat_template:
            raise UserError(f"{where}: 'messages' need data.chat_template=true", exit_code=1)
    for key in ("prompt", "id", "domain"):
        if key in row:
            field(row, key, str, where)
    field(row, "answer", str, where)
    metadata = field(row, "metadata", dict, where) if "metadata" in row else {}
    try:
        json.dumps(metadata)
    except TypeError as error:
        raise UserError(f"{where}: 'metadata' is no JSON ({error})", exit_code=1) from None
    fault = verifiers.fault(field(row, "verifier", str, where), metadata)
    if fault:
        raise UserError(f"{where}: {fault}", exit_code=1)


def _check_messages(messages: list[Any], where: str) -> None:
    if not messages:
        raise UserError(f"{where}: 'messages' is empty", exit_code=1)
    for i, message in enumerate(messages):
        spot = f"{where}: messages[{i}]"
        if not isinstance(message, dict):
            raise UserError(f"{spot} must be an object with 'role' and 'content'", exit_code=1)
        refuse_unknown(message, ("role", "content"), spot)
        field(message, "role", str, spot)
        field(message, "content", str, spot)


def _final(answer: str, where: str, mark: str | None) -> str:
    if mark is None:
        return answer
    _, found, tail = answer.rpartition(mark)
    if not found:
        raise UserError(f"{where}: no {mark!r} in the answer (data.answer_after)", exit_code=1)
    return tail.strip()
