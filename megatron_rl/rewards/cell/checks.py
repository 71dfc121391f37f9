"""Role: run the prompt's tests against a function that lives in another sandbox.

The response's code never runs here: it cannot read a test, patch a checker, end this process or return an object whose `==` is
always true. The tests call `candidate` (also under the function's own name); each of their `assert`s stands in a `with
__test__(i)` (`verifiers.code.instrumented`).

Invariant: an exception of the response's reaches the tests as a built-in `Exception` of the same name or a RuntimeError, never as
one that ends a loop or this process (StopIteration, GeneratorExit, SystemExit).
"""

from __future__ import annotations

import builtins
from typing import Any

from megatron_rl.rewards.cell.channel import Channel
from megatron_rl.rewards.cell.program import described
from megatron_rl.rewards.cell.values import decode, encode

SHOWN = 200  # characters of a value in a reason
_NOT_PASSED_ON = (StopIteration, StopAsyncIteration, UnicodeError, ExceptionGroup)  # the last two take more than words


class Over(BaseException):
    """No more tests: `except Exception` in a test does not catch it."""


class Lost(Over):
    """The response's sandbox ended."""


class Broken(Over):
    """The test itself is at fault."""


class Candidate:
    def __init__(self, channel: Channel, name: str) -> None:
        self.__name__ = name
        self.calls = 0
        self.last = ""
        self._channel = channel

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        try:
            message = [encode(args), encode(kwargs)]
        except TypeError as error:
            raise Broken(f"it passes what cannot enter a sandbox: {error}") from None
        kind, *rest = self._asked(message)
        if kind == "value":
            value = decoded(rest)
            self.last = f"got {shown(value)}"
            return value
        words = str(rest[-1]) if rest else "a malformed answer"
        self.last = words
        raise exception(rest[0], words) if kind == "raised" and len(rest) == 2 else Over(words)

    def wait(self) -> None:
        """Until the program has defined the function."""
        kind, *rest = self._asked(None)
        if kind != "ready":
            raise Over(str(rest[-1:]) if kind != "unusable" else str(rest[0]))

    def _asked(self, message: Any) -> list[Any]:
        try:
            if message is not None:
                self._channel.send(message)
            answer = self._channel.receive()
        except (EOFError, OSError):
            raise Lost from None
        except ValueError as error:
            raise Over(f"a malformed answer: {error}") from None
        if not isinstance(answer, list) or not answer:
            raise Over("a malformed answer")
        return answer


class Tests:
    """`__test__`: counts, and says what failed first."""

    def __init__(self, candidate: Candidate, sources: list[str], go_on: bool) -> None:
        self._candidate = candidate
        self._sources = sources
        self._go_on = go_on
        self._current = 0
        self.passed = self.failed = 0
        self.first = ""

    def __call__(self, index: int) -> Tests:
        self._current = index
        return self

    def __enter__(self) -> None:
        self._candidate.last = ""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if error is None:
            self.passed += 1
            return False
        if not isinstance(error, Exception):
            return False
        self.failed += 1
        got = self._candidate.last if isinstance(error, AssertionError) and self._candidate.last else described(error)
        self.first = self.first or f"test {self._current}: {self._sources[self._current]}: {got}"
        if not self._go_on:
            raise Over from None
        return True


def main(worker: Channel, response: Channel) -> None:
    task = worker.receive()
    name = task["entry_point"]
    candidate = Candidate(response, name)
    tests = Tests(candidate, task["sources"], task["go_on"])
    space: dict[str, Any] = {"__name__": "tests"}
    verdict = {"ended": "", "lost": False, "broken": ""}
    try:
        try:
            exec(compile(task["prelude"], "<prompt>", "exec"), space)
            code = compile(task["test"], "<test>", "exec")
        except Exception as error:
            verdict["broken"] = described(error)
        else:
            candidate.wait()
            space |= {name: candidate, "candidate": candidate, "__test__": tests}
            exec(code, space)
            check = space.get("check")
            if callable(check):
                check(candidate)
    except Lost:
        verdict["lost"] = True
    except Broken as broken:
        verdict["broken"] = str(broken)
    except Over as over:
        verdict["ended"] = str(over)
    except BaseException as error:
        words = described(error)
        if candidate.calls:
            verdict["ended"] = f"{words}; the last call: {candidate.last}" if candidate.last else words
        else:
            verdict["broken"] = words
    worker.send(verdict | {"passed": tests.passed, "failed": tests.failed, "first": tests.first, "calls": candidate.calls})


def decoded(rest: list[Any]) -> Any:
    try:
        (message,) = rest
        return decode(message)
    except (ValueError, TypeError, IndexError, RecursionError, OverflowError) as error:
        raise Over(f"a malformed answer: {described(error)}") from None


def exception(name: Any, words: str) -> Exception:
    kind = getattr(builtins, name, None) if isinstance(name, str) else None
    if not isinstance(kind, type) or not issubclass(kind, Exception) or issubclass(kind, _NOT_PASSED_ON):
        return RuntimeError(words)
    return kind(words.partition(": ")[2])


def shown(value: Any) -> str:
    try:
        text = repr(value)
    except Exception as error:
        text = described(error)  # an integer with too many digits
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
