"""Run a response's program as Python would run a script."""

from __future__ import annotations

import _sitebuiltins
import builtins
import sys
import types
from typing import Any

WORDS = 300  # characters of an exception's message that are told


def compiled(source: str) -> types.CodeType:
    return compile(source, "<response>", "exec", dont_inherit=True)


def as_main(code: types.CodeType) -> dict[str, Any]:
    """The program's globals when it is through."""
    module = types.ModuleType("__main__")
    module.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = module
    for name in ("exit", "quit"):  # the interpreter runs without `site`, which makes them
        setattr(builtins, name, _sitebuiltins.Quitter(name, "Ctrl-D (i.e. EOF)"))
    exec(code, module.__dict__)
    return module.__dict__


def described(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:WORDS]
    except Exception:  # its __str__ is the response's
        return type(error).__name__
