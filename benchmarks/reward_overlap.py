"""How much of the rewards' time a rollout phase hides behind its generation.

    python benchmarks/reward_overlap.py [--phases 6] [--wait-ms 150] [--only 'code 2']

The conductor of a run, with its scheduler, journal and reward workers; in the engines' place a clock: a rollout grows by RATE
tokens a second of real time, whatever the event loop does, to a length of the built-in long tail. The workers judge fractions
(`math`), run programs in sandboxes (`code`), or wait as long as they are told (`wait`: the same on a busy machine). Columns, in
seconds a phase, after two phases that are not counted:

    generation   the same phases with rewards that cost nothing
    rewards      what the workers were busy, summed over them
    floor        the longer one of generation and rewards / workers: nothing that needs both can end sooner
    after        scoring when generation is over, all at once
    groups       scoring beside it, a group when it is complete
    beside       what the conductor does: rollouts that have ended are scored ahead of their groups
    tail         of these two, between the last token and the last score (time/reward_tail_s)
    hidden       (after - beside) / (after - generation): the share of the rewards' time that generation covers
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_rl import verifiers
from megatron_rl.data.stream import PromptStream
from megatron_rl.loops.conductor import Conductor
from megatron_rl.loops.journal import Journal
from megatron_rl.loops.signals import StopFlag
from megatron_rl.loops.verdicts import Verdicts
from megatron_rl.ports import Rewards
from megatron_rl.rewards.pool import RewardPool
from megatron_rl.scheduler.messages import Settings
from megatron_rl.simulation.lengths import Pmf, built_in, scaled
from megatron_rl.types import GenerateRequest, Progress, Prompt, Rollout, SamplingParams, Score

GROUP, POOL, BUDGET, RATE = 4, 16, 6400, 200.0  # rollouts, rollouts, tokens a phase, tokens a second and rollout
MEAN, LONGEST, TICK_S = 400, 1200, 0.05
WARM_UP = 2  # phases, until as much is scored ahead as was before
COLUMNS = ("generation", "rewards", "floor", "after", "groups", "tail", "beside", "tail")


def verify(response: str, prompt: Prompt) -> Score:
    """The verifier `wait`."""
    time.sleep(int(prompt.answer) / 1000)
    return Score(1.0, "correct")


@cache
def lengths() -> Pmf:
    return scaled(built_in(), MEAN / built_in().all.mean, LONGEST).all


@cache
def length_of(rollout_id: str) -> int:
    """Of the response, and the prompt's one token."""
    return 2 + lengths().draw(random.Random(rollout_id))


class Clock:
    """ports.Engine and ports.Engines."""

    name = "clock"

    def __init__(self) -> None:
        self._aborted: set[str] = set()
        self.running: set[str] = set()

    @property
    def alive(self) -> Sequence[Clock]:
        return [self]

    async def generate(self, requests: Sequence[GenerateRequest]) -> AsyncIterator[Sequence[Progress]]:
        started = time.monotonic()
        begun = {request.rollout_id: len(request.tokens) for request in requests}
        sent = dict.fromkeys(begun, 0)
        self.running |= sent.keys()
        while sent:
            await asyncio.sleep(TICK_S)
            due = int((time.monotonic() - started) * RATE)
            messages = []
            for name, before in list(sent.items()):
                rest = length_of(name) - begun[name]
                count = min(due, rest) - before
                ended = before + count == rest
                if ended or name in self._aborted:
                    del sent[name]
                    self.running.discard(name)
                    self._aborted.discard(name)
                else:
                    sent[name] += count
                messages.append(Progress(name, (0,) * count, (0.0,) * count, (0,) * count, "stop" if ended else None))
            yield messages

    async def abort(self, rollout_ids: Iterable[str] | None = None) -> None:
        self._aborted |= self.running


@dataclass
class Counted:
    """Hands on, and adds up what the workers were busy."""

    pool: Rewards
    seconds: float = 0.0

    async def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        scores = await self.pool.score(rollouts)
        self.seconds += sum(score.seconds for score in scores)
        assert all(score.status == "correct" for score in scores), scores
        return scores

    def close(self) -> None: ...


@dataclass
class Later:
    """Costs nothing and keeps what it would have judged."""

    rollouts: list[Rollout] = field(default_factory=list)

    async def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        self.rollouts += rollouts
        return [Score(0.0, "wrong") for _ in rollouts]

    def close(self) -> None: ...


class WholeGroups(Verdicts):
    def expect(self, rollouts: Sequence[Rollout]) -> None: ...

    async def of(self, rollouts: Sequence[Rollout]) -> list[Score]:
        return await self._rewards.score(rollouts)


@dataclass(frozen=True)
class Work:
    name: str
    workers: int
    scheduler: str
    prompt: Prompt
    response: str


def phases(
    work: Work, rewards: Rewards, verdicts: type[Verdicts], runner: asyncio.Runner, count: int
) -> Iterator[dict[str, float]]:
    settings = Settings(BUDGET, POOL, GROUP, retention_bound=100, policy=work.scheduler)  # type: ignore[arg-type]
    sampling = SamplingParams(max_response_tokens=2 * LONGEST)
    with tempfile.TemporaryDirectory() as folder:
        parts = (Clock(), rewards, PromptStream([work.prompt], seed=0), Journal(Path(folder), {}), StopFlag(), runner)
        conductor = Conductor(settings, sampling, *parts, timeout_s=600, is_useful=lambda group: True)  # type: ignore[arg-type]
        conductor.verdicts = verdicts(rewards)
        conductor.restarted(0)
        for version in range(count):
            yield dict(conductor.phase(version).metrics)


def measured(work: Work, count: int) -> list[float]:
    """The seconds of each of COLUMNS."""
    pool = RewardPool(work.workers, 60.0, lambda tokens: work.response, verifiers.MODULES | {"wait": "reward_overlap"})
    with closing(pool), asyncio.Runner() as runner:
        warm = [Rollout(f"0:warm#{i}", work.prompt, i, (0,), (0.0,), (0,), "stop") for i in range(2 * work.workers)]
        runner.run(pool.score(warm))
        later, generation, after = Later(), 0.0, 0.0
        for version, metrics in enumerate(phases(work, later, WholeGroups, runner, WARM_UP + count)):
            if version >= WARM_UP:
                started = time.monotonic()
                runner.run(pool.score(later.rollouts))
                generation += metrics["time/rollout_s"]
                after += metrics["time/rollout_s"] + time.monotonic() - started
            later.rollouts.clear()
        counted, seconds = Counted(pool), []
        for verdicts in (WholeGroups, Verdicts):
            rows = list(phases(work, counted, verdicts, runner, WARM_UP + count))[WARM_UP:]
            seconds += [sum(row[name] for row in rows) for name in ("time/rollout_s", "time/reward_tail_s")]
    rewards = counted.seconds / 2 / (WARM_UP + count) * count
    return [total / count for total in (generation, rewards, max(generation, rewards / work.workers), after, *seconds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phases", type=int, default=6)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--wait-ms", type=int, default=150, help="of a score by `wait` (default 150)")
    args = parser.parse_args()
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # where workers find `verify`
    case = {"input": "1\n", "output": "1\n"}
    math = Prompt("math", "", (0,), "6/8", "math"), r"so it is \boxed{\frac{3}{4}}"
    code = Prompt("code", "", (0,), "", "code", metadata={"cases": [case]}), "```python\nprint(input())\n```"
    wait = Prompt("wait", "", (0,), str(args.wait_ms), "wait"), ""
    lengths()
    print(f"load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores")
    print(f"{'rewards':20}{'workers':>8}" + "".join(f"{column:>12}" for column in (*COLUMNS, "hidden")))
    for name, (prompt, response), workers, scheduler in (
        ("math", math, 1, "c3po_pp"),
        ("code", code, 2, "c3po_pp"),
        ("wait", wait, 1, "c3po_pp"),
        ("wait", wait, 2, "c3po_pp"),
        ("wait, synchronous", wait, 2, "synchronous"),
    ):
        if args.only in f"{name} {workers}":
            row = measured(Work(name, workers, scheduler, prompt, response), args.phases)
            generation, after, beside = row[0], row[3], row[6]
            hidden = (after - beside) / (after - generation)
            print(f"{name:20}{workers:8}" + "".join(f"{seconds:12.2f}" for seconds in row) + f"{hidden:12.0%}", flush=True)


if __name__ == "__main__":
    main()
