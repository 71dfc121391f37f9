"""Hooks into SGLang through its own registry (srt/plugins/hook_registry.py), which only logs a failure; here it is an error."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from typing import Any, Literal

from sglang.srt.plugins.hook_registry import HookRegistry, HookType


def hook(target: str, kind: Literal["AFTER", "AROUND", "REPLACE"], function: Callable[..., Any]) -> None:
    before = pkgutil.resolve_name(target)
    HookRegistry.register(target, function, HookType[kind])
    HookRegistry.apply_hooks()
    if pkgutil.resolve_name(target) == before:
        raise RuntimeError(f"SGLang's hook registry left {target} as it was")
