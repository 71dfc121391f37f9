"""Role: answer calls to one function of the response's program.

First the program comes from the worker, then calls [args, kwargs] from `checks`; each is answered by ["value", v],
["raised", type, words] or ["unusable", words]. What the program prints goes nowhere. A function is judged by what it returns:
arguments that it changes are its own copies.
"""

from __future__ import annotations

from typing import Any

from megatron_rl.rewards.cell.channel import Channel
from megatron_rl.rewards.cell.program import as_main, compiled, described
from megatron_rl.rewards.cell.values import decode, encode


def main(worker: Channel, tests: Channel) -> None:
    task = worker.receive()
    worker.close()
    try:
        function = as_main(compiled(task["program"]))[task["entry_point"]]
    except BaseException as error:
        missing = isinstance(error, KeyError) and error.args == (task["entry_point"],)
        words = f"the program defines no {task['entry_point']}" if missing else f"the program ended with {described(error)}"
        tests.send(["unusable", words])
        return
    tests.send(["ready"])
    while True:
        args, kwargs = tests.receive()
        tests.send(answer(function, decode(args), decode(kwargs)))


def answer(function: Any, args: Any, kwargs: Any) -> list[Any]:
    try:
        value = function(*args, **kwargs)
    except BaseException as error:
        return ["raised", type(error).__name__, described(error)]
    try:
        return ["value", encode(value)]
    except BaseException as error:  # an iterator may raise anything, too
        return ["unusable", f"what it returned cannot leave the sandbox: {described(error)}"]
