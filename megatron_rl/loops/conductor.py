"""Rank 0's event loop: it tells the scheduler what engines report, and does what the scheduler decides.

The scheduler sees ids and token counts; the tokens themselves live here, as `Rollout`s. Everything that must survive a crash is in
`state_dict()`: the scheduler's state, every unfinished rollout with its tokens so far, groups that wait for their update, and
the prompt cursor.

Invariants:
- a phase returns only when no request is in flight and every released group has its scores;
- a lost engine costs no token that it had streamed: its rollouts go on elsewhere from there.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict, deque
from collections.abc import Coroutine, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from megatron_rl.config import UserError
from megatron_rl.loops.serial import from_json, to_json
from megatron_rl.loops.signals import StopFlag
from megatron_rl.ports import Engine, Engines, Prompts, Rewards
from megatron_rl.scheduler import c3po_pp as sched
from megatron_rl.types import EngineLost, GenerateRequest, Group, Progress, Rollout, SamplingParams

log = logging.getLogger(__name__)
ABORT_REPEAT_S = 0.5  # a request that was on its way while we aborted is caught by the next abort
STOP_POLL_S = 0.1  # a signal handler cannot wake an idle event loop


@dataclass(frozen=True)
class Phase:
    """`done`: train on `groups`. `no_engine`: bring engines back, then call again. `stopped`: save and leave."""

    status: Literal["done", "no_engine", "stopped"]
    groups: tuple[Group, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)


class Conductor:
    def __init__(
        self,
        settings: sched.Settings,
        sampling: SamplingParams,
        engines: Engines,
        rewards: Rewards,
        prompts: Prompts,
        stop: StopFlag,
        runner: asyncio.Runner,
        timeout_s: float,
    ) -> None:
        self.settings, self.sampling = settings, sampling
        self.engines, self.rewards, self.prompts = engines, rewards, prompts
        self.stop, self.runner, self.timeout_s = stop, runner, timeout_s
        self.state = sched.State()
        self.rollouts: dict[str, Rollout] = {}  # members of groups that are not released yet
        self.scored: list[Group] = []  # released and judged, not trained yet
        self._waiting: list[str] = []  # rollouts the scheduler started and no engine has yet

    def phase(self, version: int, train_token_budget: int | None = None) -> Phase:
        """Generate with weights `version` until the scheduler ends the phase; hand out finished groups, at most about
        `train_token_budget` response tokens of them (the rest stays for the next step). Raises TimeoutError."""
        started = time.monotonic()
        status = self.runner.run(self._phase(version))
        if status != "done":
            return Phase(status)
        metrics = sched.metrics(self.state, self.settings) | {"time/rollout_s": time.monotonic() - started}
        groups = self._take(train_token_budget)
        sched.step(self.state, sched.Trained(tuple(group.id for group in groups)), self.settings)
        return Phase("done", groups, metrics)

    async def _phase(self, version: int) -> Literal["done", "no_engine", "stopped"]:
        work = _PhaseWork(self)
        try:
            async with asyncio.timeout(self.timeout_s):
                return await work.run(version)
        except TimeoutError:
            raise TimeoutError(f"rollout.timeout_s={self.timeout_s}: phase {version} still waits for {work.waits_for()}") from None

    def _take(self, train_token_budget: int | None) -> tuple[Group, ...]:
        taken, tokens = 0, 0
        for group in self.scored:
            if train_token_budget is not None and tokens >= train_token_budget:
                break
            taken += 1
            tokens += sum(len(rollout.tokens) for rollout in group.rollouts)
        groups, self.scored = tuple(self.scored[:taken]), self.scored[taken:]
        return groups

    def state_dict(self) -> dict[str, Any]:
        return {
            "scheduler": self.state.to_json(),
            "rollouts": [to_json(rollout) for rollout in self.rollouts.values()],
            "scored": [to_json(group) for group in self.scored],
            "prompts": self.prompts.state_dict(),
            "group_size": self.settings.group_size,
            "max_response_tokens": self.sampling.max_response_tokens,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises UserError where a setting has changed that the carried rollouts depend on."""
        for key, now in (("group_size", self.settings.group_size), ("max_response_tokens", self.sampling.max_response_tokens)):
            if state[key] != now:
                raise UserError(f"rollout.{key}={now}: the rollouts that the checkpoint carries were begun with {state[key]}")
        self.state = sched.State.from_json(state["scheduler"])
        self.rollouts = {rollout.id: rollout for rollout in (from_json(Rollout, value) for value in state["rollouts"])}
        self.scored = [from_json(Group, value) for value in state["scored"]]
        self.prompts.load_state_dict(state["prompts"])


class _PhaseWork:
    """One call of `phase`: the streams in flight and the events they bring."""

    def __init__(self, conductor: Conductor) -> None:
        self.c = conductor
        self.events: asyncio.Queue[list[sched.Event] | BaseException] = asyncio.Queue()
        self.tasks: set[asyncio.Task[None]] = set()
        self.in_flight: dict[str, set[str]] = defaultdict(set)  # engine name -> rollout ids
        self.lost: set[str] = set()

    async def run(self, version: int) -> Literal["done", "no_engine", "stopped"]:
        c = self.c
        if c.stop.requested:
            self._apply([sched.Stop()])  # of a phase that ran out of engines; nothing else is running yet
            return "stopped"
        if c.state.phase == "idle":  # else that phase goes on
            self._apply([sched.PhaseStarted(version)])
        watcher = asyncio.create_task(self._watch_for_stop())
        try:
            while True:
                self._dispatch()
                if not self.tasks and c.state.phase == "idle":
                    return "stopped" if c.stop.requested else "done"
                if not self.tasks and not self._alive():
                    return "no_engine"
                event = await self.events.get()
                if isinstance(event, BaseException):
                    raise event
                self._apply(event)
        finally:
            for task in (watcher, *self.tasks):
                task.cancel()

    def waits_for(self) -> str:
        running = ", ".join(f"{len(ids)} rollouts on {name}" for name, ids in self.in_flight.items() if ids)
        return running or f"{len(self.tasks)} unfinished scores"

    def _apply(self, events: Iterable[sched.Event]) -> None:
        """An action's answers come before the next event: an offer must not outlive the phase that wanted it."""
        queue = deque(events)
        while queue:
            actions = sched.step(self.c.state, queue.popleft(), self.c.settings)
            queue.extendleft(reversed([answer for action in actions for answer in self._do(action)]))

    def _do(self, action: sched.Action) -> list[sched.Event]:
        c = self.c
        match action:
            case sched.WantGroup():
                group_id, prompt = c.prompts.take()
                for sample, name in enumerate(self._members(group_id)):
                    c.rollouts[name] = Rollout(id=name, prompt=prompt, sample=sample)
                return [sched.GroupOffered(group_id)]
            case sched.Start(rollout_id):
                c._waiting.append(rollout_id)
            case sched.StopAll():
                held_back, c._waiting = c._waiting, []
                if any(self.in_flight.values()):
                    self._spawn(self._abort_until_quiet())
                return [sched.Interrupted(rollout_id) for rollout_id in held_back]
            case sched.Restart(rollout_id):
                old = c.rollouts[rollout_id]
                c.rollouts[rollout_id] = Rollout(id=old.id, prompt=old.prompt, sample=old.sample)
            case sched.DropGroup(group_id):
                for name in self._members(group_id):
                    del c.rollouts[name]
                c.prompts.give_back(group_id)
            case sched.Release(group_id):
                members = tuple(c.rollouts.pop(name) for name in self._members(group_id))
                self._spawn(self._score(group_id, members))
            case sched.PhaseDone():
                pass  # the state says so
        return []

    def _members(self, group_id: str) -> list[str]:
        return [sched.rollout_id(group_id, sample) for sample in range(self.c.settings.group_size)]

    def _alive(self) -> list[Engine]:
        return [engine for engine in self.c.engines.alive if engine.name not in self.lost]

    def _dispatch(self) -> None:
        """Hand waiting rollouts to engines, a group to one engine (its members share the prompt's KV), least loaded first."""
        engines = self._alive()
        if not self.c._waiting or not engines:
            return
        by_group: dict[str, list[str]] = defaultdict(list)
        for rollout_id in self.c._waiting:
            by_group[rollout_id.rpartition("#")[0]].append(rollout_id)
        self.c._waiting = []
        batches: dict[str, list[str]] = defaultdict(list)
        for members in by_group.values():
            engine = min(engines, key=lambda e: len(self.in_flight[e.name]))
            self.in_flight[engine.name].update(members)
            batches[engine.name].extend(members)
        for engine in engines:
            if batches[engine.name]:
                self._spawn(self._stream(engine, [self._request(rollout_id) for rollout_id in batches[engine.name]]))

    def _request(self, rollout_id: str) -> GenerateRequest:
        rollout, sampling = self.c.rollouts[rollout_id], self.c.sampling
        room = sampling.max_response_tokens - len(rollout.tokens)
        return GenerateRequest(rollout_id, rollout.prompt.tokens + rollout.tokens, room, sampling)

    async def _stream(self, engine: Engine, requests: list[GenerateRequest]) -> None:
        unfinished = {request.rollout_id for request in requests}
        try:
            async for messages in engine.generate(requests):
                self.events.put_nowait(self._record(messages))
                finished = {message.rollout_id for message in messages if message.finish_reason}
                unfinished -= finished
                self.in_flight[engine.name] -= finished
        except EngineLost as error:
            if engine.name not in self.lost:
                log.warning("%s; its %d rollouts go on elsewhere", error, len(self.in_flight[engine.name]))
            self.lost.add(engine.name)
        self.in_flight[engine.name] -= unfinished
        self.events.put_nowait([self._cut(rollout_id) for rollout_id in sorted(unfinished)])

    def _cut(self, rollout_id: str) -> sched.Event:
        """A rollout whose stream ended without a reason. It may have been at its end just then: an abort hides that."""
        rollout, sampling = self.c.rollouts[rollout_id], self.c.sampling
        stopped = bool(rollout.tokens) and rollout.tokens[-1] in sampling.stop_token_ids
        if not stopped and len(rollout.tokens) < sampling.max_response_tokens:
            return sched.Interrupted(rollout_id)
        self.c.rollouts[rollout_id] = replace(rollout, finish_reason="stop" if stopped else "length")
        return sched.Finished(rollout_id)

    def _record(self, messages: Iterable[Progress]) -> list[sched.Event]:
        events: list[sched.Event] = []
        for message in messages:
            self.c.rollouts[message.rollout_id] = self.c.rollouts[message.rollout_id].extended(message)
            if message.tokens:
                events.append(sched.Generated(message.rollout_id, len(message.tokens)))
            if message.finish_reason:
                events.append(sched.Finished(message.rollout_id))
        return events

    async def _score(self, group_id: str, members: tuple[Rollout, ...]) -> None:
        scores = await self.c.rewards.score(members)
        self.c.scored.append(Group(group_id, members[0].prompt, members, tuple(scores)))
        self.events.put_nowait([])

    async def _abort_until_quiet(self) -> None:
        while any(self.in_flight.values()):
            results = await asyncio.gather(*(engine.abort() for engine in self._alive()), return_exceptions=True)
            for error in results:
                if isinstance(error, BaseException) and not isinstance(error, EngineLost):  # a lost one ends its streams itself
                    raise error
            deadline = time.monotonic() + ABORT_REPEAT_S
            while any(self.in_flight.values()) and time.monotonic() < deadline:
                await asyncio.sleep(0.002)
        self.events.put_nowait([])

    async def _watch_for_stop(self) -> None:
        while not self.c.stop.requested:
            await asyncio.sleep(STOP_POLL_S)
        self.events.put_nowait([sched.Stop()])

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        self.events.put_nowait(error if error is not None else [])
