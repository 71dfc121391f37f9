"""Scripted stand-ins for the ports: engines that emit known tokens, rewards that follow a rule, prompts without a file."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any

from megatron_rl.types import EngineLost, GenerateRequest, Progress, Prompt, Rollout, RoutingShape, Score


def length_of(rollout_id: str) -> int:
    """A long tail that depends on the id alone."""
    seed = sum(rollout_id.encode()) * 7919 % 97
    return 3 + seed % 9 + (40 if seed % 11 == 0 else 0)


ROUTING = RoutingShape(layers=2, first_dense=1, top_k=2, experts=256)


def scripted_support(token: int, version: int) -> bytes:
    """So many more ids than the token as the version says, up to three."""
    return array("i", [token, *range(50, 50 + version % 4)]).tobytes()


class ScriptedEngine:
    """Emits token `position % 50` with log-prob -position/100, `chunk` tokens of every request per turn of the event loop, beside
    them the support (`scripted_support`) if that is asked for, and at the end of a request that asks for experts
    (position % 256, version) for each position."""

    def __init__(self, name: str, prompt_tokens: int, length: Callable[[str], int] = length_of, chunk: int = 4) -> None:
        self.name, self.prompt_tokens, self.length, self.chunk = name, prompt_tokens, length, chunk
        self.version = 0
        self.dies_after: int | None = None  # messages until EngineLost
        self.hides_ends = False  # an abort that arrives with the last token takes its finish reason
        self.dead = False
        self.served: list[str] = []
        self._aborted: set[str] = set()
        self._running: set[str] = set()
        self._reporting: set[str] = set()
        self._supporting: set[str] = set()

    async def generate(self, requests: Sequence[GenerateRequest]) -> AsyncIterator[Sequence[Progress]]:
        at = {r.rollout_id: len(r.tokens) - self.prompt_tokens for r in requests}
        room = {r.rollout_id: r.max_new_tokens for r in requests}
        self._reporting |= {r.rollout_id for r in requests if r.report_experts}
        self._supporting |= {r.rollout_id for r in requests if r.sampling.report_support}
        self._running |= set(at)
        self.served += list(at)
        while at:
            await asyncio.sleep(0)
            if self.dead or self.dies_after == 0:
                self.dead = True
                self._running -= set(at)
                raise EngineLost(f"{self.name}: scripted death")
            if self.dies_after is not None:
                self.dies_after -= 1
            for rollout_id in [r for r in at if r in self._aborted]:
                self._finish(rollout_id, at)
            messages = [self._advance(rollout_id, at, room) for rollout_id in list(at)]
            if messages:
                yield messages

    def _advance(self, rollout_id: str, at: dict[str, int], room: dict[str, int]) -> Progress:
        begin = at[rollout_id]
        count = min(self.chunk, self.length(rollout_id) - begin, room[rollout_id])
        room[rollout_id] -= count
        end = at[rollout_id] = begin + count
        reason = "stop" if end == self.length(rollout_id) else "length" if room[rollout_id] == 0 else None
        experts = self._experts(rollout_id, end) if reason else b""
        if reason:
            self._finish(rollout_id, at)
        if reason and self.hides_ends:
            reason = None
        positions = range(begin, end)
        logprobs = tuple(-p / 100 for p in positions)
        support = tuple(scripted_support(p % 50, self.version) for p in positions) if rollout_id in self._supporting else ()
        return Progress(rollout_id, tuple(p % 50 for p in positions), logprobs, (self.version,) * count, reason, experts, support)

    def _experts(self, rollout_id: str, end: int) -> bytes:
        if rollout_id not in self._reporting:
            return b""
        self._reporting.discard(rollout_id)
        return b"".join(bytes((p % 256, self.version)) for p in range(self.prompt_tokens + end - 1))

    def _finish(self, rollout_id: str, at: dict[str, int]) -> None:
        del at[rollout_id]
        self._aborted.discard(rollout_id)
        self._running.discard(rollout_id)

    async def abort(self, rollout_ids: Iterable[str] | None = None) -> None:
        if self.dead:
            raise EngineLost(f"{self.name}: scripted death")
        self._aborted |= self._running if rollout_ids is None else set(rollout_ids) & self._running


class ScriptedEngines:
    def __init__(self, engines: Sequence[ScriptedEngine]) -> None:
        self.engines = list(engines)

    @property
    def alive(self) -> list[ScriptedEngine]:
        return [engine for engine in self.engines if not engine.dead]

    def start(self) -> None: ...

    def sleep(self) -> None: ...

    def wake(self, *, for_push: bool) -> None: ...

    def stop(self) -> None: ...

    def recover(self) -> list[str]:
        dead = [engine for engine in self.engines if engine.dead]
        for engine in dead:
            engine.dead, engine.dies_after = False, None
        return [engine.name for engine in dead]


class ParityRewards:
    """Odd lengths are right."""

    async def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        await asyncio.sleep(0)
        return [Score(1.0, "correct") if len(r.tokens) % 2 else Score(0.0, "wrong") for r in rollouts]

    def close(self) -> None: ...


class CountedPrompts:
    """Prompts p0, p1, ... of one epoch without end; dropped ones are offered again."""

    def __init__(self, tokens: int = 2) -> None:
        self.next, self.tokens, self.returned = 0, tokens, []  # type: ignore[var-annotated]

    def begin(self, version: int) -> None: ...

    def judged(self, group_id: str, scores: Sequence[Score]) -> None: ...

    def metrics(self) -> dict[str, float]:
        return {}

    def take(self) -> tuple[str, Prompt]:
        number = self.returned.pop() if self.returned else self.next
        self.next += number == self.next
        return f"0:p{number}", Prompt(f"p{number}", f"text {number}", (1,) * self.tokens, "a", "exact")

    def give_back(self, group_id: str) -> None:
        self.returned.append(int(group_id.removeprefix("0:p")))

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next, "returned": list(self.returned)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.next, self.returned = state["next"], list(state["returned"])
