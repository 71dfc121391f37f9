"""Verifiers: pure functions (response text, prompt) -> Score, found by the name a prompt carries.

A verifier may take long or hang on hostile input; it holds no clock: whoever calls it can kill it (`rewards.pool`).
Importing this package imports no verifier: their libraries take a second.

Invariant: `correct` is worth more than `wrong`; what is `unparsable` is worth 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from megatron_rl.types import Prompt, Score

Verifier = Callable[[str, Prompt], Score]

# name -> the metadata keys a prompt must bring
_METADATA: dict[str, tuple[str, ...]] = {
    "exact": (),
    "format": (),
    "math": (),
    "mcq": (),
    "mixture": ("mixture",),
    "reasoning_gym": ("dataset", "entry"),
}
_CODE_METADATA = (("cases",), ("entry_point", "test"))  # one of these, for a prompt of `code`
MODULES = {name: f"{__name__}.{name}" for name in _METADATA}  # the module holds the function, `verify`
MODULES["code"] = "megatron_rl.rewards.code"  # which runs what `verifiers.code` decides: pure is only that part


def load(module: str) -> Verifier:
    """The verifier in a module of `MODULES`, imported."""
    verify: Verifier = import_module(module).verify
    return verify


def fault(name: str, metadata: Mapping[str, Any]) -> str | None:
    """What keeps this verifier from judging a prompt with this metadata, if anything. Looks, and imports nothing."""
    if name not in MODULES:
        return f"unknown verifier {name!r}; known are {', '.join(MODULES)}"
    if name == "code":
        enough = any(all(key in metadata for key in keys) for keys in _CODE_METADATA)
        return None if enough else "verifier 'code' needs metadata.cases, or metadata.entry_point and metadata.test"
    missing = [key for key in _METADATA[name] if key not in metadata]
    if missing:
        return f"verifier {name!r} needs metadata.{missing[0]}"
    return _mixture_fault(metadata) if name == "mixture" else None


def _mixture_fault(metadata: Mapping[str, Any]) -> str | None:
    weights = metadata["mixture"]
    if not isinstance(weights, Mapping) or not weights:
        return "metadata.mixture must name verifiers and their weights"
    for name, weight in weights.items():
        if name == "mixture":
            return "metadata.mixture: a mixture holds no mixture"
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            return f"metadata.mixture: the weight of {name!r} must be a number above 0, not {weight!r}"
        if found := fault(name, metadata):
            return f"metadata.mixture: {found}"
    return None
