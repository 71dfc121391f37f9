"""Start latency and executions per second of the code sandbox, against a plain subprocess that runs the same program.

    python benchmarks/sandbox.py [--runs 60] [--threads 2]

`subprocess` is `python -I -S -c program`, once per case and with no protection at all; `sandbox` is a whole verdict of the verifier
`code`: a program with one input, and the same with ten; a function with three asserts (two sandboxes). Medians, one after the
other; then verdicts per second with several at once.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median

from megatron_rl.rewards import sandbox
from megatron_rl.rewards.bubblewrap import Limits
from megatron_rl.rewards.code import Runner
from megatron_rl.types import Prompt

PROGRAM = "print(sum(map(int, input().split())))\n"
FUNCTION = "def f(x):\n    return x * x\n"
TEST = "def check(candidate):\n    for x in range(3):\n        assert candidate(x) == x * x\n"


def milliseconds(work: Callable[[], object], runs: int) -> list[float]:
    out = []
    for _ in range(runs):
        started = time.perf_counter()
        work()
        out.append((time.perf_counter() - started) * 1e3)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    sandbox.require(unsafe=False)
    runner = Runner(timeout_s=30.0)
    case = {"input": "1 2\n", "output": "3\n"}
    one, ten = (Prompt("", "", (), "", "code", metadata={"cases": [case] * count}) for count in (1, 10))
    function = Prompt("", "", (), "", "code", metadata={"entry_point": "f", "test": TEST})
    python = getattr(sys, "_base_executable", sys.executable)

    def plain() -> None:
        done = subprocess.run([python, "-I", "-S", "-c", PROGRAM], input=case["input"], capture_output=True, text=True, check=True)
        assert done.stdout == case["output"]

    def empty() -> None:
        with sandbox.Cell("stdio", Limits()) as cell:
            cell.ready()
            cell.send({"program": "", "output_limit": 0}, time.monotonic() + 30)
            cell.send({"input": ""}, time.monotonic() + 30)
            cell.receive(time.monotonic() + 30)

    def verdict(prompt: Prompt, source: str) -> Callable[[], None]:
        def work() -> None:
            score = runner.verify(f"```python\n{source}```", prompt)
            assert score.status == "correct", score

        return work

    works = {
        "subprocess, 1 case": plain,
        "sandbox: start, empty program, end": empty,
        "sandbox: verdict on 1 case": verdict(one, PROGRAM),
        "sandbox: verdict on 10 cases": verdict(ten, PROGRAM),
        "sandbox: verdict on a function": verdict(function, FUNCTION),
    }
    for name, work in works.items():
        work()
        took = sorted(milliseconds(work, args.runs))
        started = time.perf_counter()
        with ThreadPoolExecutor(args.threads) as threads:
            list(threads.map(lambda _, work=work: work(), range(args.runs)))
        rate = args.runs / (time.perf_counter() - started)
        print(f"{name:36} {median(took):7.1f} ms median, {took[0]:6.1f} least; {args.threads} at once: {rate:6.1f} a second")


if __name__ == "__main__":
    main()
