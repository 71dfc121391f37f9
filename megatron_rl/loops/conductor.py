"""Rank 0's event loop: it tells the pool what engines report, and does what the scheduler decides.

Invariants:
- a phase returns only when no request is in flight and every released group has its scores;
- a lost engine costs no token that it had streamed: its rollouts go on elsewhere from there;
- what the pool was told is in the journal first: after a restart a phase that was complete is not generated again, and one that was
  not goes on from there.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from megatron_rl.loops.dispatch import Dispatch
from megatron_rl.loops.journal import Journal
from megatron_rl.loops.pool import Began, Cut, Entry, Overflow, Pool, Scored, Stopped, Streamed, Taken
from megatron_rl.loops.signals import StopFlag
from megatron_rl.loops.verdicts import Verdicts
from megatron_rl.ports import Engine, Engines, Prompts, Rewards
from megatron_rl.scheduler import c3po_pp as sched
from megatron_rl.types import EngineLost, GenerateRequest, Group, SamplingParams

log = logging.getLogger(__name__)
ABORT_REPEAT_S = 0.5  # a request that was on its way while we aborted is caught by the next abort
STOP_POLL_S = 0.1  # a signal handler cannot wake an idle event loop


@dataclass(frozen=True)
class Phase:
    """`done`: train on `groups`. `no_engine`: bring engines back, then call again. `stopped`: save and leave."""

    status: Literal["done", "no_engine", "stopped"]
    groups: tuple[Group, ...] = ()
    useless: tuple[Group, ...] = ()  # of dynamic sampling
    metrics: Mapping[str, float] = field(default_factory=dict)


class Conductor:
    def __init__(
        self,
        settings: sched.Settings,
        sampling: SamplingParams,
        engines: Engines,
        rewards: Rewards,
        prompts: Prompts,
        journal: Journal,
        stop: StopFlag,
        runner: asyncio.Runner,
        timeout_s: float,
        is_useful: Callable[[Group], bool],
        record_experts: Callable[[int], bool] = lambda version: False,
    ) -> None:
        """`record_experts`: whether the phase of these weights keeps the engines' routed experts."""
        self.pool = Pool(settings, sampling, prompts, is_useful)
        self.record_experts = record_experts
        self.engines, self.verdicts, self.journal = engines, Verdicts(rewards), journal
        self.stop, self.runner, self.timeout_s = stop, runner, timeout_s
        self.dispatch = Dispatch()
        self._recorded: deque[Entry] = deque()  # of the journal, not entered yet

    def phase(self, version: int, train_token_budget: int | None = None, overflow: Overflow = "carry") -> Phase:
        """Generate with weights `version` until the scheduler ends the phase; hand out finished groups, at most about
        `train_token_budget` response tokens of them (`overflow`: the rest waits for the next step, or is given up). Raises
        TimeoutError."""
        started = time.monotonic()
        recorded = self._replay(version)
        if recorded is None:
            work = _PhaseWork(self)
            status = self.runner.run(self._limited(work, version))
            if status != "done":
                return Phase(status)
            taken, idle, tail_s = self.pool.next_groups(train_token_budget, overflow), work.idle_fraction, work.reward_tail_s
        else:
            taken, idle, tail_s = recorded, 0.0, 0.0
        groups, useless = tuple(self.pool.scored[: taken.count]), tuple(self.pool.useless)
        metrics = self.pool.metrics() | {
            "rollout/given_up_groups": float(taken.given_up),
            "time/rollout_s": time.monotonic() - started,
            "time/reward_tail_s": tail_s,
            "rollout/engine_idle_fraction": idle,
            "rollout/from_journal": float(recorded is not None),
        }
        metrics["rollout/tail_saved_s"] = _tail_s(metrics)
        if recorded is None:
            self.tell(taken)
            self.journal.sync()
        else:
            self.pool.enter(recorded)
        return Phase("done", groups, useless, metrics)

    def tell(self, entry: Entry) -> list[sched.Action]:
        self.journal.append(entry)
        return self.pool.enter(entry)

    def state_dict(self) -> dict[str, Any]:
        return self.pool.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.pool.load_state_dict(state)

    def checkpointed(self, step: int) -> None:
        """The state is in the checkpoint of `step`, which is on disk."""
        self.journal.begin(step, self._fingerprint())

    def restarted(self, step: int) -> None:
        """The state is that of the checkpoint of `step`, or of a new run at 0: go on with what was generated after it."""
        self._recorded = deque(self.journal.reopen(step, self._fingerprint()))
        if self._recorded:
            steps = sum(isinstance(entry, Taken) for entry in self._recorded)
            tokens = sum(len(m.tokens) for entry in self._recorded if isinstance(entry, Streamed) for m in entry.messages)
            log.info(
                "the journal holds the rollouts of %d steps after step %d, %d tokens: not generated again", steps, step, tokens
            )

    def _fingerprint(self) -> dict[str, Any]:
        pool = self.pool
        return {"settings": asdict(pool.settings), "sampling": asdict(pool.sampling), "prompts": pool.prompts.state_dict()}

    def _replay(self, version: int) -> Taken | None:
        """Enter what the journal has of this phase; its end if it was complete."""
        if self._recorded and self._recorded[0] != Began(version):
            raise RuntimeError(f"the journal goes on with {self._recorded[0]}, and not with phase {version}")
        while self._recorded:
            entry = self._recorded.popleft()
            if isinstance(entry, Taken):
                return entry
            self.pool.enter(entry)
            if not self._recorded and (running := self.pool.running):
                self.tell(Cut(running))
        return None

    async def _limited(self, work: _PhaseWork, version: int) -> Literal["done", "no_engine", "stopped"]:
        try:
            async with asyncio.timeout(self.timeout_s):
                return await work.run(version)
        except TimeoutError:
            raise TimeoutError(f"rollout.timeout_s={self.timeout_s}: phase {version} still waits for {work.waits_for()}") from None


def _tail_s(metrics: Mapping[str, float]) -> float:
    """How much longer a phase that waits for its slowest rollout would have taken, at the pace of this one: about, and at most,
    since an engine with few rollouts is faster."""
    per_token_s = metrics["time/rollout_s"] * metrics["rollout/carried"] / max(1.0, metrics["rollout/generated_tokens"])
    return metrics.get("rollout/tail_tokens", 0.0) * per_token_s


class _PhaseWork:
    """One call of `phase`: the streams in flight and what they bring."""

    def __init__(self, conductor: Conductor) -> None:
        self.c, self.pool, self.dispatch = conductor, conductor.pool, conductor.dispatch
        self.entries: asyncio.Queue[Entry | BaseException | None] = asyncio.Queue()
        self.tasks: set[asyncio.Task[None]] = set()
        self.lost: set[str] = set()
        self.records_experts = False
        self._idle_s = self._seconds = 0.0  # of engines, and of the phase
        self.reward_tail_s = 0.0  # with nothing in flight, while scores were missing

    async def run(self, version: int) -> Literal["done", "no_engine", "stopped"]:
        if self.c.stop.requested:
            self._tell(Stopped())  # of a phase that ran out of engines; nothing else is running yet
            return "stopped"
        self.dispatch.forget_prefixes()
        self.c.verdicts.keep(self.pool.rollouts)
        self.records_experts = self.c.record_experts(version)
        for part_id in self.pool.unscored:  # of a journal that ended before their scores
            self._spawn(self._score(part_id))
        if self.pool.state.phase == "idle":  # else that phase goes on
            self._tell(Began(version))
        watcher = asyncio.create_task(self._watch_for_stop())
        try:
            while True:
                self._start_waiting()
                if not self.tasks and self.entries.empty():
                    if self.pool.state.phase == "idle":
                        return "stopped" if self.c.stop.requested else "done"
                    if not self._alive():
                        return "no_engine"
                entry = await self._next()
                if isinstance(entry, BaseException):
                    raise entry
                if entry is not None:
                    self._tell(entry)
        finally:
            for task in (watcher, *self.tasks):
                task.cancel()

    @property
    def idle_fraction(self) -> float:
        """The share of the phase's engine seconds in which an engine had nothing to do."""
        return self._idle_s / self._seconds if self._seconds else 0.0

    def waits_for(self) -> str:
        running = ", ".join(f"{len(ids)} rollouts on {name}" for name, ids in self.dispatch.in_flight.items() if ids)
        return running or f"{len(self.tasks)} unfinished scores"

    async def _next(self) -> Entry | BaseException | None:
        started, alive = time.monotonic(), self._alive()
        idle = sum(not self.dispatch.in_flight[engine.name] for engine in alive)
        waits = bool(self.pool.unscored) and not self.dispatch.any_in_flight
        entry = await self.entries.get()
        seconds = time.monotonic() - started
        self._seconds += seconds
        self._idle_s += seconds * idle / max(1, len(alive))
        self.reward_tail_s += seconds if waits else 0.0
        return entry

    def _tell(self, entry: Entry) -> None:
        for action in self.c.tell(entry):
            match action:
                case sched.StopAll():
                    if self.pool.starting:  # on no engine
                        self._tell(Cut(list(self.pool.starting)))
                    if self.dispatch.any_in_flight:
                        self._spawn(self._abort_until_quiet())
                case sched.Release(part_id):
                    self._spawn(self._score(part_id))
        if isinstance(entry, Streamed):
            ended = [message.rollout_id for message in entry.messages if message.finish_reason]
            if waiting := [name for name in ended if name in self.pool.rollouts]:  # for the others of their groups
                self.c.verdicts.expect([self.pool.rollouts[name].rollout(name) for name in waiting])

    def _alive(self) -> list[Engine]:
        return [engine for engine in self.c.engines.alive if engine.name not in self.lost]

    def _start_waiting(self) -> None:
        engines = {engine.name: engine for engine in self._alive()}
        if not self.pool.starting or not engines:
            return
        requests = {name: self._request(name) for name in self.pool.starting}
        self.pool.starting.clear()
        assigned = self.dispatch.assign({name: len(request.tokens) for name, request in requests.items()}, list(engines))
        for name, rollout_ids in assigned.items():
            self._spawn(self._stream(engines[name], [requests[rollout_id] for rollout_id in rollout_ids]))

    def _request(self, rollout_id: str) -> GenerateRequest:
        growing, sampling = self.pool.rollouts[rollout_id], self.pool.sampling
        room = sampling.max_response_tokens - len(growing.tokens)
        return GenerateRequest(rollout_id, growing.prompt.tokens + tuple(growing.tokens), room, sampling, self.records_experts)

    async def _stream(self, engine: Engine, requests: list[GenerateRequest]) -> None:
        unfinished = {request.rollout_id for request in requests}
        try:
            async for messages in engine.generate(requests):
                self.entries.put_nowait(Streamed(tuple(messages)))
                for message in messages:
                    self.dispatch.grew(engine.name, message.rollout_id, len(message.tokens))
                    if message.finish_reason:
                        unfinished.discard(message.rollout_id)
                        self.dispatch.left(engine.name, message.rollout_id, at_its_end=True)
        except EngineLost as error:
            self._lose(engine, error)
        for rollout_id in unfinished:
            self.dispatch.left(engine.name, rollout_id, at_its_end=False)
        if unfinished:
            self.entries.put_nowait(Cut(sorted(unfinished)))

    async def _score(self, part_id: str) -> None:
        scores = await self.c.verdicts.of(self.pool.unscored[part_id])
        self.entries.put_nowait(Scored(part_id, tuple(scores)))

    async def _abort_until_quiet(self) -> None:
        while self.dispatch.any_in_flight:
            await asyncio.gather(*(self._abort(engine) for engine in self._alive()))
            deadline = time.monotonic() + ABORT_REPEAT_S
            while self.dispatch.any_in_flight and time.monotonic() < deadline:
                await asyncio.sleep(0.002)

    async def _abort(self, engine: Engine) -> None:
        try:
            await engine.abort()
        except EngineLost as error:  # its streams end by themselves, if they have not yet
            self._lose(engine, error)

    def _lose(self, engine: Engine, error: EngineLost) -> None:
        if engine.name not in self.lost:
            log.warning("%s; its %d rollouts go on elsewhere", error, len(self.dispatch.in_flight[engine.name]))
        self.lost.add(engine.name)

    async def _watch_for_stop(self) -> None:
        while not self.c.stop.requested:
            await asyncio.sleep(STOP_POLL_S)
        self.entries.put_nowait(Stopped())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        self.entries.put_nowait(None if task.cancelled() else task.exception())  # wakes the loop, which may have waited for it
