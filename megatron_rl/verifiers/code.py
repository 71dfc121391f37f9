"""Programs judged by tests: the pure part. `rewards.code` runs in sandboxes what is decided here, and this judges what came out.

The program of a response is its last Python code block; a response without any block may be the code that goes on where the
prompt's code ends (HumanEval). `prompt.metadata` holds the tests: `cases`, a list of {"input", "output"} for the program's
standard streams, or `entry_point` and `test`, for a function: source of asserts, or with a `check(candidate)` that makes them.
`prompt`, the code that the function completes, may stand beside them (default: the prompt's text, if that is Python).

Invariants:
- no expected output and no test is part of what a response's program can see;
- a program that ends early, however politely, has passed the tests that it answered and no others;
- with marks="all" the value is 1 if all tests pass and 0 otherwise; with marks="fraction" it is the share that passes, and only a
  program that passes all is `correct`;
- tests that cannot be run are an `error`, whatever the response.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from megatron_rl.types import Prompt, Score

Marks = Literal["all", "fraction"]

PROGRAM_LIMIT = 256 * 1024  # characters
SHOWN = 120  # characters of an output in a reason
_FENCE = re.compile(r"^[ \t]*(```+|~~~+)[ \t]*([^\s`]*)[^\n]*$", re.MULTILINE)
_PYTHON = ("", "python", "python3", "py", "py3")


class Unfit(ValueError):
    """The prompt's tests cannot be run."""


@dataclass(frozen=True)
class FunctionTask:
    program: str
    entry_point: str
    prelude: str  # the prompt's code, which tests may use
    test: str  # instrumented
    sources: tuple[str, ...]  # of the asserts


@dataclass(frozen=True)
class StreamTask:
    program: str
    cases: tuple[tuple[str, str], ...]  # input, expected output


@dataclass(frozen=True)
class Output:
    """Of one run of a program."""

    stdout: str
    stdout_bytes: int
    stderr: str
    exit: int  # negative: the signal that ended it


def task(response: str, prompt: Prompt) -> FunctionTask | StreamTask | Score:
    """What to run, or the Score of a response that leaves nothing to run."""
    metadata = prompt.metadata
    cases = stream_cases(metadata["cases"]) if "cases" in metadata else None
    entry_point = "" if cases is not None else str(metadata["entry_point"])
    given = "" if cases is not None else code_of(metadata.get("prompt"), prompt.text)
    block, fault = last_block(response)
    program = completed(given, block, response, entry_point) if entry_point and fault in ("", NO_BLOCK) else block
    if program is None:
        return Score(0.0, "unparsable", reason=fault)
    if len(program) > PROGRAM_LIMIT:
        return Score(0.0, "unparsable", reason=f"the program has more than {PROGRAM_LIMIT:,} characters")
    if words := syntax_fault(program):
        return Score(0.0, "unparsable", extracted=program, reason=f"the program is not Python: {words}")
    if cases is not None:
        return StreamTask(program, cases)
    test, sources = instrumented(str(metadata["test"]))
    return FunctionTask(program, entry_point, given, test, sources)


NO_BLOCK = "no code block in the response"


def last_block(response: str) -> tuple[str | None, str]:
    """The text in the last Python block, or None and why."""
    found, opening, language, start = None, "", "", 0
    fault = NO_BLOCK
    for fence in _FENCE.finditer(response):
        mark, tag = fence[1], fence[2].lower()
        if not opening:
            opening, language, start = mark, tag, fence.end() + 1
        elif mark[0] == opening[0] and len(mark) >= len(opening) and not tag:
            if language in _PYTHON:
                found = response[start : fence.start()]
            opening = ""
    if opening and language in _PYTHON:
        found, fault = None, "the last code block is not closed"
    return found, "" if found is not None else fault


def code_of(given: Any, text: str) -> str:
    """The code that a completion goes on from."""
    if given is not None:
        return str(given)
    return "" if syntax_fault(text) else text


def completed(given: str, block: str | None, response: str, entry_point: str) -> str | None:
    """A block that defines the function stands for itself, after what the prompt's code brings along (imports, helpers). Any other
    block, and a response without one, may go on where the prompt's code ends; of these a block may still be right by itself."""
    if block is not None and defines(block, entry_point):
        return block if syntax_fault(given) else f"{given}\n\n{block}"
    whole = given + (response if block is None else block)
    return whole if given and defines(whole, entry_point) else block


def defines(source: str, name: str) -> bool:
    if syntax_fault(source):
        return False
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return True
        if isinstance(node, ast.Assign) and any(isinstance(target, ast.Name) and target.id == name for target in node.targets):
            return True
        if isinstance(node, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in node.names):
            return True
    return False


@lru_cache(maxsize=64)
def syntax_fault(source: str) -> str:
    try:
        ast.parse(source)
    except SyntaxError as error:
        return f"line {error.lineno}: {error.msg}"
    except (ValueError, RecursionError, MemoryError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def stream_cases(cases: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(cases, Sequence) or isinstance(cases, str) or not cases:
        raise Unfit("metadata.cases must be a list of at least one {'input', 'output'}")
    for i, case in enumerate(cases):
        if not isinstance(case, Mapping) or not all(isinstance(case.get(key), str) for key in ("input", "output")):
            raise Unfit(f"metadata.cases[{i}] must be an object with the strings 'input' and 'output'")
    return tuple((case["input"], case["output"]) for case in cases)


@lru_cache(maxsize=1024)
def instrumented(test: str) -> tuple[str, tuple[str, ...]]:
    """Each assert in a `with __test__(i)`, and the asserts' sources. What stands in a `try` is left as it is: there an assert that
    fails may be meant to."""
    try:
        tree = ast.parse(test)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Unfit(f"metadata.test is not Python: {error}") from None
    counter = _Counter()
    tree = ast.fix_missing_locations(counter.visit(tree))
    return ast.unparse(tree), tuple(counter.sources)


class _Counter(ast.NodeTransformer):
    def __init__(self) -> None:
        self.sources: list[str] = []

    def visit_Try(self, node: ast.Try) -> ast.AST:
        return node

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        call = ast.Call(ast.Name("__test__", ast.Load()), [ast.Constant(len(self.sources))], [])
        self.sources.append(shortened(ast.unparse(node.test)))
        return ast.With([ast.withitem(call)], [node])


def function_score(task: FunctionTask, verdict: Mapping[str, Any], marks: Marks) -> Score:
    """From what `checks` says: {"passed", "failed", "first", "ended", "broken", "calls"}."""
    if verdict["broken"]:
        raise Unfit(f"metadata.test fails by itself: {verdict['broken']}")
    passed, failed, ended = verdict["passed"], verdict["failed"], verdict["ended"]
    if not ended and not verdict["calls"]:
        raise Unfit(f"metadata.test never calls {task.entry_point}: {verdict['first'] or 'it passes whatever that does'}")
    tests = passed + failed
    if ended:
        tests = max(tests + (not failed), len(task.sources))
    reason = verdict["first"] or (f"test {passed}: {ended}" if ended else "")
    return counted(task.program, passed, tests if failed or ended else passed, marks, reason)


def stream_score(task: StreamTask, faults: Sequence[str], marks: Marks) -> Score:
    """`faults`: of each case in order, "" for one that passed; those after the last were not run."""
    passed = sum(not fault for fault in faults)
    first = next((f"test {i}: {fault}" for i, fault in enumerate(faults) if fault), "")
    return counted(task.program, passed, len(task.cases), marks, first)


def counted(program: str, passed: int, tests: int, marks: Marks, reason: str) -> Score:
    if passed == tests:
        return Score(1.0, "correct", extracted=program)
    if marks == "fraction":
        return Score(passed / tests, "wrong", extracted=program, reason=f"{passed} of {tests} tests pass; {reason}")
    return Score(0.0, "wrong", extracted=program, reason=reason)


def output_fault(output: Output, expected: str, limit: int) -> str:
    """Why a run does not pass, or "". White space at the ends of lines and empty lines at the end do not count."""
    if output.stdout_bytes > limit:
        return f"it wrote more than {limit:,} bytes"
    if output.exit:
        how = f"exit code {output.exit}" if output.exit > 0 else f"killed by signal {-output.exit}"
        last = output.stderr.strip().rpartition("\n")[2]
        return f"{how}: {shortened(last)}" if last else how
    got, wanted = lines(output.stdout), lines(expected)
    if got == wanted:
        return ""
    at = next((i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), min(len(got), len(wanted)))
    here = repr(shortened(got[at])) if at < len(got) else "nothing more"
    there = repr(shortened(wanted[at])) if at < len(wanted) else "nothing more"
    return f"line {at + 1}: got {here}, expected {there}"


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def shortened(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
