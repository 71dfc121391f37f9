"""From a composed plain dict to a validated run, or to one line that names the key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from megatron_rl.config.base import Config
from megatron_rl.config.errors import UserError

C = TypeVar("C", bound=Config)


def validate(kind: type[C], values: Mapping[str, Any]) -> C:
    """Raises UserError with one line per wrong key, e.g. `rollout.token_budget=-3: Input should be greater than 0`."""
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise UserError("; ".join(_line(e) for e in error.errors())) from None


def _line(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key"
    if error["type"] == "missing":
        return f"{key}: missing"
    if error["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}={error['input']!r}: {message}"
