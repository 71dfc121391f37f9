"""The verifier `code`: runs in sandboxes what `verifiers.code` decides, and has it judged there.

A function and its tests live in two sandboxes that exchange plain values; a program with streams gets one input after the other,
and its output is compared here. `timeout` is the status of a program that used up its time, wall clock or CPU.

Invariant: a worker that runs one response after the other keeps nothing of them.
"""

from __future__ import annotations

import time
from typing import Any

from megatron_rl.rewards.bubblewrap import FILE_MB, Limits
from megatron_rl.rewards.sandbox import Cell, Ended, OutOfTime, linked, require
from megatron_rl.types import Prompt, Score
from megatron_rl.verifiers import code
from megatron_rl.verifiers.code import FunctionTask, Marks, Output, StreamTask, Unfit


class Runner:
    """Settings of `reward.code`."""

    def __init__(
        self,
        marks: Marks = "all",
        timeout_s: float = 5.0,
        memory_mb: int = 512,
        processes: int = 16,
        output_kb: int = 1024,
        unsafe: bool = False,
    ) -> None:
        self._marks = marks
        self._limits = Limits(timeout_s, memory_mb, processes)
        self._output_limit = output_kb * 1024
        self._unsafe = unsafe

    def verify(self, response: str, prompt: Prompt) -> Score:
        require(self._unsafe)
        try:
            task = code.task(response, prompt)
            if isinstance(task, Score):
                return task
            return self._function(task) if isinstance(task, FunctionTask) else self._streams(task)
        except Unfit as error:
            return Score(0.0, "error", reason=str(error))

    def _function(self, task: FunctionTask) -> Score:
        go_on = self._marks == "fraction"
        checks = {"entry_point": task.entry_point, "sources": task.sources, "go_on": go_on}
        with linked() as (left, right), self._cell("function", left) as response, self._cell("checks", right) as tests:
            left.close()  # so that each cell sees the other's end
            right.close()
            response.ready()
            tests.ready()
            deadline = time.monotonic() + self._limits.seconds
            try:
                response.send({"program": task.program, "entry_point": task.entry_point}, deadline)
                tests.send({"prelude": task.prelude, "test": task.test, **checks}, deadline)
                verdict = tests.receive(deadline, watched=(response,))
                if verdict["lost"]:
                    verdict["ended"] = response.end()
            except Ended as ended:
                return Score(0.0, "wrong", extracted=task.program, reason=str(ended))
            except OutOfTime:
                return self._late(task.program)
        return code.function_score(task, verdict, self._marks)

    def _streams(self, task: StreamTask) -> Score:
        if any(len(text) > FILE_MB * 2**18 for text, _ in task.cases):
            raise Unfit(f"metadata.cases: an input has more than {FILE_MB * 2**18:,} characters")
        faults: list[str] = []
        with self._cell("stdio") as cell:
            cell.ready()
            deadline = time.monotonic() + self._limits.seconds
            try:
                cell.send({"program": task.program, "output_limit": self._output_limit}, deadline)
                for text, expected in task.cases:
                    cell.send({"input": text}, deadline)
                    faults.append(code.output_fault(self._output(cell, deadline), expected, self._output_limit))
                    if faults[-1] and self._marks == "all":
                        break
            except Ended as ended:
                faults.append(str(ended))
            except OutOfTime:
                return self._late(task.program, f"test {len(faults)}: ")
        return code.stream_score(task, faults, self._marks)

    def _output(self, cell: Cell, deadline: float) -> Output:
        said = cell.receive(deadline)
        try:
            output = Output(**said)
            if not isinstance(output.stdout, str) or not isinstance(output.stderr, str):
                raise TypeError("not text")
            output.exit + output.stdout_bytes
        except TypeError as error:  # the program took its parent over
            raise Ended(f"its sandbox said something else than an answer: {error}") from None
        return output

    def _cell(self, role: str, *peers: Any) -> Cell:
        return Cell(role, self._limits, peers, self._unsafe)

    def _late(self, program: str, where: str = "") -> Score:
        seconds = self._limits.seconds
        return Score(0.0, "timeout", extracted=program, reason=f"{where}not done within reward.code.timeout_s={seconds:g}")


_runner = Runner()


def configure(**settings: Any) -> None:
    """Of this process."""
    global _runner
    _runner = Runner(**settings)


def verify(response: str, prompt: Prompt) -> Score:
    return _runner.verify(response, prompt)
