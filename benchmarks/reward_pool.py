"""Scores per second, and per second of processor time, through the reward pool and without one.

    python benchmarks/reward_pool.py [--responses 256] [--workers 1] [--pairs FILE]

`reasoning_gym`: a quickstart step's answers of 4 to 50 characters. `math`: boxed fractions, or responses and gold answers from all
over a JSONL file (`response`, `gold`). Beside the pool: the same verifier called in this process, for math also math-verify as it
comes (parse, verify, its own alarms), and what is safe without a pool, an interpreter for every case.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median

import psutil
from math_verify import parse
from math_verify import verify as equal

from megatron_rl import verifiers
from megatron_rl.rewards.pool import RewardPool
from megatron_rl.types import Prompt, Rollout

FRESH = """
import json, sys
from math_verify import parse, verify
gold, text = json.load(sys.stdin)
verify(parse(gold), parse(text))
"""
SUBPROCESSES = 8  # enough for a mean of seconds


@dataclass(frozen=True)
class Case:
    text: str
    prompt: Prompt


def chain_sums(count: int) -> list[Case]:
    rng = random.Random(0)
    cases = []
    for i in range(count):
        a, b, c = (rng.randrange(1, 99) for _ in range(3))
        metadata = {"dataset": "chain_sum", "entry": {"answer": str(a + b - c), "metadata": {}}}
        prompt = Prompt(str(i), "", (), str(a + b - c), "reasoning_gym", metadata=metadata)
        cases.append(Case(f"{a}+{b}={a + b} {a + b}-{c}={a + b - c} #{a + b - c}", prompt))
    return cases


def fractions(count: int) -> list[Case]:
    rng = random.Random(0)
    numbers = [[rng.randrange(1, 99) for _ in range(3)] for _ in range(count)]
    return [
        Case(rf"We get \boxed{{\frac{{{a}}}{{{b}}}}}.", Prompt(str(i), "", (), f"{a * c}/{b * c}", "math"))
        for i, (a, b, c) in enumerate(numbers)
    ]


def pairs(path: Path, count: int) -> list[Case]:
    """Evenly spread over the file."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    chosen = islice(rows, 0, None, max(1, len(rows) // count))
    return [Case(row["response"], Prompt(str(i), "", (), row["gold"], "math")) for i, row in enumerate(islice(chosen, count))]


def processor_seconds() -> float:
    times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return time.process_time() + sum(spent.user + spent.system for spent in times)


def measured(work: Callable[[], object], times: int = 5) -> tuple[float, float]:
    """Median wall and processor seconds."""
    walls, processors = [], []
    for _ in range(times):
        started, spent = time.perf_counter(), processor_seconds()
        work()
        walls.append(time.perf_counter() - started)
        processors.append(processor_seconds() - spent)
    return median(walls), median(processors)


def report(name: str, count: int, wall: float, processor: float) -> None:
    print(f"  {name:28} {count / wall:10,.1f} scores/s {count / max(processor, 1e-9):10,.1f} per core second")


def compare(verifier: str, cases: Sequence[Case], workers: int) -> None:
    started = time.perf_counter()
    pool = RewardPool(workers, 10.0, lambda tokens: cases[tokens[0]].text)
    rollouts = [Rollout(f"0:{i}#0", case.prompt, 0, (i,), (0.0,), (0,), "stop") for i, case in enumerate(cases)]
    asyncio.run(pool.score(rollouts[:1]))
    print(f"{verifier}: {len(cases)} responses, {workers} worker(s), warm after {time.perf_counter() - started:.1f} s")
    report("reward pool", len(cases), *measured(lambda: asyncio.run(pool.score(rollouts))))
    pool.close()
    verify = verifiers.load(verifiers.MODULES[verifier])
    report("the verifier in process", len(cases), *measured(lambda: [verify(case.text, case.prompt) for case in cases]))
    if verifier == "math":
        report(
            "math-verify in process", len(cases), *measured(lambda: [equal(parse(c.prompt.answer), parse(c.text)) for c in cases])
        )
        few = cases[:SUBPROCESSES]
        started = time.perf_counter()
        for case in few:
            told = json.dumps([case.prompt.answer, case.text])
            subprocess.run([sys.executable, "-c", FRESH], input=told, text=True, check=True, capture_output=True)
        print(f"  {'an interpreter for each':28} {len(few) / (time.perf_counter() - started):10,.1f} scores/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=256)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--pairs", type=Path)
    args = parser.parse_args()
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    compare("reasoning_gym", chain_sums(args.responses), args.workers)
    compare("math", pairs(args.pairs, args.responses) if args.pairs else fractions(args.responses), args.workers)


if __name__ == "__main__":
    main()
