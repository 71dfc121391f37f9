"""Plain values as JSON and back: what a function may be given and may return across two sandboxes.

Invariants: a value arrives with its type (1, 1.0 and True stay three things; a subclass arrives as the plain type it extends, so
that no method of the sender's travels along); what is no plain value is a TypeError naming its type; a malformed message is a
ValueError or TypeError.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from itertools import islice
from typing import Any

EXACT = 2**53  # integers that JSON readers agree on; Python's own limits the digits of larger ones
ITEMS = 100_000  # taken from an iterator
_SEQUENCES: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "iterator": iter}


def encode(value: Any) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return value if -EXACT < value < EXACT else ["int", hex(value)]
    if isinstance(value, float):
        return ["float", float.hex(value)]
    if isinstance(value, complex):
        return ["complex", value.real.hex(), value.imag.hex()]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", value.hex()]
    if isinstance(value, dict):
        return ["dict", [[encode(key), encode(value[key])] for key in value]]
    if isinstance(value, range):
        return ["range", value.start, value.stop, value.step]
    for name, kind in (("list", list), ("tuple", tuple), ("set", set), ("frozenset", frozenset)):
        if isinstance(value, kind):
            return [name, [encode(item) for item in value]]
    if isinstance(value, KeysView | ValuesView | ItemsView):
        return ["list", [encode(item) for item in value]]
    if isinstance(value, Iterator):
        return ["iterator", list(map(encode, islice(value, ITEMS)))]
    raise TypeError(f"a {type(value).__name__} is no plain value")


def decode(message: Any) -> Any:
    if not isinstance(message, list):
        if message is None or isinstance(message, (bool, int, str)):
            return message
        raise ValueError(f"a bare {type(message).__name__}")
    name, *parts = message
    if name in _SEQUENCES:
        (items,) = parts
        return _SEQUENCES[name]([decode(item) for item in items])
    if name == "dict":
        (pairs,) = parts
        return {decode(key): decode(item) for key, item in pairs}
    if name == "int":
        return int(parts[0], 16)
    if name == "float":
        return float.fromhex(parts[0])
    if name == "complex":
        return complex(float.fromhex(parts[0]), float.fromhex(parts[1]))
    if name == "bytes":
        return bytes.fromhex(parts[0])
    if name == "range":
        return range(*parts)
    raise ValueError(f"unknown kind {name!r}")
