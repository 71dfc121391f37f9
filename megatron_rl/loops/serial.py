"""The nouns of `types.py` to plain JSON values and back, for checkpoints."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, TypeVar

from pydantic import TypeAdapter

from megatron_rl.types import Group, Prompt, Rollout

T = TypeVar("T", Prompt, Rollout, Group)


def to_json(value: Prompt | Rollout | Group) -> dict[str, Any]:
    return asdict(value, dict_factory=lambda items: {name: _text(part) for name, part in items})


def from_json(kind: type[T], value: Mapping[str, Any]) -> T:
    """Raises pydantic.ValidationError if the value is not of the form."""
    if kind is Rollout:
        value = _with_bytes(value)
    elif kind is Group:
        value = {**value, "rollouts": [_with_bytes(rollout) for rollout in value["rollouts"]]}
    restored: T = ADAPTERS[kind].validate_python(value)
    return restored


def _with_bytes(rollout: Mapping[str, Any]) -> dict[str, Any]:
    support = tuple(map(base64.b64decode, rollout["support"]))
    return {**rollout, "experts": base64.b64decode(rollout["experts"]), "support": support}


def _text(value: Any) -> Any:
    if isinstance(value, tuple) and value and isinstance(value[0], bytes):
        return [_text(part) for part in value]
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


ADAPTERS: Mapping[type, TypeAdapter[Any]] = {kind: TypeAdapter(kind) for kind in (Prompt, Rollout, Group)}
