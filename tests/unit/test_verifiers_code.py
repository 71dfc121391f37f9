"""Invariants of verifiers/code.py, of the values that cross sandboxes, and of the system call filter: all without a process."""

from __future__ import annotations

import math
import struct
from typing import Any

import pytest

from megatron_rl import verifiers
from megatron_rl.rewards import seccomp
from megatron_rl.rewards.cell.checks import exception
from megatron_rl.rewards.cell.values import decode, encode
from megatron_rl.types import Prompt, Score
from megatron_rl.verifiers import code
from megatron_rl.verifiers.code import FunctionTask, Output, StreamTask, Unfit

GIVEN = "import math\n\ndef helper(x):\n    return x\n\ndef f(x):\n    '''Double x.'''\n"
TEST = "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(2) == 4, 'words'\n"


def prompt(text: str = "Write f.", **metadata: Any) -> Prompt:
    return Prompt("p", text, (), "", "code", metadata=metadata or {"cases": [{"input": "", "output": ""}]})


def function(response: str, text: str = GIVEN) -> FunctionTask | StreamTask | Score:
    return code.task(response, prompt(text, entry_point="f", test=TEST))


def test_a_prompt_without_tests_is_refused_before_it_is_used() -> None:
    assert verifiers.fault("code", {"cases": []}) is None
    assert verifiers.fault("code", {"entry_point": "f", "test": ""}) is None
    for metadata in ({}, {"test": ""}, {"entry_point": "f"}):
        assert "needs metadata.cases, or metadata.entry_point and metadata.test" in str(verifiers.fault("code", metadata))


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("```python\na\n```", "a\n"),
        ("```\na\n```", "a\n"),
        ("so:\n```python\na\n```\nor better\n```py\nb\n```\ndone", "b\n"),
        ("```python\na\n```\noutput:\n```text\nb\n```", "a\n"),
        ("~~~python\na\n~~~", "a\n"),
        ("````python\n'''\n```\n'''\n````", "'''\n```\n'''\n"),
        ("```Python3\na\n```", "a\n"),
        ("```python\r\na\r\n```", "a\r\n"),
    ],
)
def test_the_program_is_the_last_python_block(response: str, program: str) -> None:
    task = code.task(response, prompt())
    assert isinstance(task, StreamTask)
    assert task.program == program


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("", "no code block"),
        ("print(1)", "no code block"),
        ("```bash\nls\n```", "no code block"),
        ("```python\nprint(1)\n", "not closed"),
        ("```python\na\n```\nbetter:\n```python\nb", "not closed"),
        ("```python\nprint(\n```", "not Python: line 1"),
        ("```python\n\0\n```", "not Python: "),
        (f"```python\n{'(' * 10_000}\n```", "not Python: "),
        (f"```python\n{'#' * 300_000}\n```", "more than 262,144 characters"),
    ],
)
def test_a_response_that_leaves_nothing_to_run_is_unparsable(response: str, reason: str) -> None:
    score = code.task(response, prompt())
    assert isinstance(score, Score)
    assert (score.status, score.value) == ("unparsable", 0.0)
    assert reason in score.reason


def test_a_block_with_the_function_stands_for_itself_after_the_prompts_code() -> None:
    task = function("```python\ndef f(x):\n    return helper(x) * 2\n```")
    assert isinstance(task, FunctionTask)
    space: dict[str, Any] = {}
    exec(task.program, space)
    assert space["f"](4) == 8


@pytest.mark.parametrize("response", ["    return 2 * x\n", "```python\n    return 2 * x\n```"])
def test_anything_else_goes_on_where_the_prompt_ends(response: str) -> None:
    task = function(response)
    assert isinstance(task, FunctionTask)
    space: dict[str, Any] = {}
    exec(task.program, space)
    assert space["f"](4) == 8


def test_a_prompt_in_words_needs_a_block() -> None:
    task = function("    return 2 * x\n", "Write f.")
    assert isinstance(task, Score)
    assert (task.status, task.reason) == ("unparsable", "no code block in the response")
    assert isinstance(function("```python\nexec('f = 1')\n```", "Write f."), FunctionTask)
    assert isinstance(function("```python\ndef f(x): return 2\n```", "Write f."), FunctionTask)
    assert isinstance(function("```python\nf = lambda x: 2\n```", "Write f."), FunctionTask)


def test_no_test_and_no_expected_output_is_part_of_the_program() -> None:
    task = function("```python\ndef f(x): return 2\n```")
    assert isinstance(task, FunctionTask)
    assert "candidate" not in task.program
    assert "words" not in task.program


def test_each_assert_is_a_test_of_its_own_but_in_a_try() -> None:
    source = TEST + "    try:\n        candidate()\n        assert False\n    except TypeError:\n        pass\nassert f(3) == 6\n"
    test, sources = code.instrumented(source)
    assert sources == ("candidate(1) == 2", "candidate(2) == 4", "f(3) == 6")
    entered = []

    class Recorder:
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    def record(index: int) -> Recorder:
        entered.append(index)
        return Recorder()

    space: dict[str, Any] = {"__test__": record, "f": lambda x: 2 * x}
    exec(test, space)
    space["check"](lambda x: 2 * x)
    assert entered == [2, 0, 1]
    space["check"](lambda x: 2 * x)
    with pytest.raises(AssertionError, match="words"):
        space["check"](lambda x: 2)


@pytest.mark.parametrize(
    ("verdict", "marks", "status", "value"),
    [
        ({"passed": 2}, "all", "correct", 1.0),
        ({"passed": 2}, "fraction", "correct", 1.0),
        ({"passed": 1, "failed": 1}, "all", "wrong", 0.0),
        ({"passed": 1, "failed": 1}, "fraction", "wrong", 0.5),
        ({"passed": 1, "ended": "its process ended with exit code 0"}, "fraction", "wrong", 0.5),
        ({"passed": 2, "ended": "TypeError"}, "fraction", "wrong", 2 / 3),
        ({"passed": 0, "ended": "exit code 0"}, "fraction", "wrong", 0.0),
        ({"passed": 2, "ended": "exit code 0"}, "all", "wrong", 0.0),
        ({"passed": 0}, "all", "correct", 1.0),  # a test that raises by itself, and did not
    ],
)
def test_marks(verdict: dict[str, Any], marks: Any, status: str, value: float) -> None:
    task = function("```python\ndef f(x): return 2\n```")
    assert isinstance(task, FunctionTask)
    whole = {"passed": 0, "failed": 0, "first": "", "ended": "", "broken": "", "calls": 2} | verdict
    score = code.function_score(task, whole, marks)
    assert (score.status, score.value) == (status, pytest.approx(value))


def test_marks_of_streams_count_the_cases_that_were_not_run() -> None:
    task = code.task("```python\npass\n```", prompt(cases=[{"input": "", "output": str(i)} for i in range(4)]))
    assert isinstance(task, StreamTask)
    score = code.stream_score(task, ["", "", "exit code 1"], "fraction")
    assert (score.status, score.value, score.reason) == ("wrong", 0.5, "2 of 4 tests pass; test 2: exit code 1")
    assert code.stream_score(task, ["", "it ended"], "all").value == 0.0
    assert code.stream_score(task, [""] * 4, "all").status == "correct"


@pytest.mark.parametrize(
    ("stdout", "expected", "fault"),
    [
        ("1\n2\n", "1\n2", ""),
        ("1  \n2\n\n\n", "1\n2\n", ""),
        ("", "", ""),
        ("1\n", "1\n2\n", "line 2: got nothing more, expected '2'"),
        ("1\n2\n3", "1\n2\n", "line 3: got '3', expected nothing more"),
        (" 1", "1", "line 1: got ' 1', expected '1'"),
        ("1.0", "1", "line 1: got '1.0', expected '1'"),
    ],
)
def test_outputs_are_compared_line_by_line(stdout: str, expected: str, fault: str) -> None:
    assert code.output_fault(Output(stdout, len(stdout), "", 0), expected, 100) == fault


def test_an_output_counts_only_of_a_program_that_ended_well_and_within_its_limit() -> None:
    assert code.output_fault(Output("1", 1, "Trace\nValueError: no\n", 1), "1", 9) == "exit code 1: ValueError: no"
    assert code.output_fault(Output("1", 1, "", -11), "1", 9) == "killed by signal 11"
    assert code.output_fault(Output("", 10, "", 0), "", 9) == "it wrote more than 9 bytes"


@pytest.mark.parametrize("cases", [[], "ab", {"input": ""}, [1], [{"input": ""}], [{"input": 1, "output": ""}]])
def test_cases_that_are_none_are_the_prompts_fault(cases: Any) -> None:
    with pytest.raises(Unfit, match=r"metadata\.cases"):
        code.task("```python\npass\n```", prompt(cases=cases))


PLAIN: list[Any] = [None, True, 1, -(2**70), 10**5000, 1.5, math.inf, 1j, "x\ud800\0", b"\0\xff", [1, [2]], (1,), {1, 2}, set()]
PLAIN += [frozenset({1}), {1: "a", (1, 2): [None]}, range(1, 9, 2), [True, 1, 1.0]]


@pytest.mark.parametrize("value", PLAIN, ids=lambda value: type(value).__name__)
def test_a_plain_value_arrives_with_its_type(value: Any) -> None:
    back = decode(encode(value))
    assert back == value
    assert type(back) is type(value)
    assert list(map(type, back)) == list(map(type, value)) if isinstance(value, list) else True


def test_a_subclass_arrives_as_what_it_extends_and_an_iterator_as_one() -> None:
    class Liar(list):  # type: ignore[type-arg]
        def __eq__(self, other: object) -> bool:
            return True

    assert type(decode(encode(Liar([1])))) is list
    assert list(decode(encode(iter([1, 2])))) == [1, 2]
    assert decode(encode({1: 2}.items())) == [(1, 2)]
    assert math.isnan(decode(encode(math.nan)))
    with pytest.raises(TypeError, match="a object is no plain value"):
        encode(object())


@pytest.mark.parametrize(
    "message", [["what", []], {"a": 1}, 1.5, ["list", 1], ["set", [["list", []]]], ["int"], ["range", "a"], [[]]]
)
def test_a_malformed_value_is_an_error(message: Any) -> None:
    with pytest.raises((ValueError, TypeError, IndexError)):
        decode(message)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ValueError", ValueError),
        ("KeyError", KeyError),
        *(
            (name, RuntimeError)
            for name in ("StopIteration", "SystemExit", "GeneratorExit", "Mine", "print", "UnicodeDecodeError", 3)
        ),
    ],
)
def test_an_exception_of_the_responses_never_ends_a_loop_or_a_process(name: Any, kind: type) -> None:
    assert type(exception(name, f"{name}: words")) is kind


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_refuses_its_calls_and_lets_others_pass(machine: str) -> None:
    """Interpreted here, instruction by instruction, as the kernel would."""
    steps = [struct.unpack_from("=HBBI", seccomp.program(machine), at) for at in range(0, len(seccomp.program(machine)), 8)]
    column, architecture = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}[machine]

    def verdict(number: int, argument: int = 0, architecture: int = architecture) -> int:
        data = struct.pack("=IIQQ", number, architecture, 0, argument)
        at = value = 0
        while True:
            operation, if_true, if_false, k = steps[at]
            at += 1
            if operation == 0x20:
                (value,) = struct.unpack_from("=I", data, k)
            elif operation == 0x06:
                return int(k)
            else:
                holds = {0x15: value == k, 0x35: value >= k, 0x45: bool(value & k)}[operation]
                at += if_true if holds else if_false

    allow, refuse, kill = 0x7FFF0000, 0x00050001, 0x80000000
    assert verdict((0, 63)[column]) == allow  # read
    assert verdict((101, 117)[column]) == refuse  # ptrace
    assert verdict((272, 97)[column]) == refuse  # unshare
    assert verdict((56, 220)[column], 0x11) == allow  # clone, as fork does
    assert verdict((56, 220)[column], 0x10000011) == refuse  # clone into a new user namespace
    assert verdict(435) == 0x00050026  # clone3
    assert verdict((0, 63)[column], architecture=0x40000003) == kill
    assert verdict(0x40000000) == kill


def test_a_machine_without_a_filter_is_named() -> None:
    with pytest.raises(LookupError, match="riscv64"):
        seccomp.program("riscv64")
