"""The nouns of `types.py` to plain JSON values and back, for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, TypeVar

from pydantic import TypeAdapter

from megatron_rl.types import Group, Prompt, Rollout

T = TypeVar("T", Prompt, Rollout, Group)


def to_json(value: Prompt | Rollout | Group) -> dict[str, Any]:
    return asdict(value)


def from_json(kind: type[T], value: Mapping[str, Any]) -> T:
    """Raises pydantic.ValidationError if the value is not of the form."""
    restored: T = ADAPTERS[kind].validate_python(value)
    return restored


ADAPTERS: Mapping[type, TypeAdapter[Any]] = {kind: TypeAdapter(kind) for kind in (Prompt, Rollout, Group)}
