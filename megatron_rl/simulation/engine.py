"""One engine on paper: continuous batching, in which every running rollout gets one token a decode step.

A decode step of b rollouts takes step_s + step_s_per_rollout * b. Between two changes of its batch an engine moves at one rate, so
that its clock, in steps, says for every rollout where it is: an event costs O(log b), a token nothing. Prefill goes first and
decoding pauses for it, as in SGLang without mixed chunks. A rollout is admitted in order of arrival, when a slot is free and its
tokens fit into the KV cache; when the cache is full, those with the fewest tokens of their own make room (SGLang's retraction) and
are prefilled again later.

Invariants (tests/unit/test_simulation.py):
- never more running than slots, never more tokens in the cache than it holds;
- a batch of given lengths takes the sum of its steps.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass, field

ADMIT_BELOW = 0.9  # of the KV cache: what runs already needs room to grow, else each admission is a retraction soon after
RETRACT_STEPS = 20  # decode steps that a retraction makes room for; SGLang's SGLANG_RETRACT_DECODE_STEPS
STEP = 1e-6  # of a decode step: what rounding may cost


@dataclass(frozen=True, slots=True)
class EngineModel:
    slots: int
    step_s: float
    step_s_per_rollout: float
    prefill_tokens_per_s: float  # inf: free
    kv_tokens: float  # inf: as many as it takes
    prompt_tokens: int

    def throughput(self, batch: float) -> float:
        """Tokens per second."""
        return batch / (self.step_s + self.step_s_per_rollout * batch)


@dataclass(slots=True, eq=False)
class Rollout:
    id: str
    length: int  # at which it will end
    tokens: int = 0  # when it last began to run
    reported: int = 0  # tokens that the scheduler knows of
    segments: list[tuple[int, int]] = field(default_factory=list)  # (weight version, tokens)
    pays_prompt: bool = True  # False: a sibling on the same engine has had the prompt prefilled
    ends_at: float = 0.0  # on its engine's clock


class Engine:
    def __init__(self, number: int, model: EngineModel) -> None:
        self.number, self.model = number, model
        self.now = self.decodes_from = 0.0  # seconds
        self.clock = 0.0  # decode steps
        self.kv = 0.0  # tokens in the cache
        self.running: list[tuple[float, int, Rollout]] = []  # a heap, by the end
        self.waiting: deque[Rollout] = deque()
        self.waiting_tokens = 0  # that those will need in the cache
        self.generated = 0.0  # tokens; busy and prefilling in seconds
        self.busy_s = self.prefill_s = 0.0
        self.kv_seconds = self.kv_peak = 0.0
        self.retracted = 0
        self._admitted = 0

    @property
    def step_time(self) -> float:
        return self.model.step_s + self.model.step_s_per_rollout * len(self.running)

    @property
    def held(self) -> float:
        """Tokens of all that it has, running or waiting, prompts included."""
        return self.kv + self.waiting_tokens

    def queue(self, rollout: Rollout) -> None:
        """Runs from the next `admit` that has room."""
        self.waiting.append(rollout)
        self.waiting_tokens += self._context(rollout, rollout.tokens)

    def rate(self) -> float:
        """Tokens per second from `now` to the next event."""
        return 0.0 if not self.running or self.decodes_from > self.now else len(self.running) / self.step_time

    def next_event(self) -> float:
        """When its rate changes if nobody interferes: prefill done, a rollout at its end, the cache full."""
        if not self.running:
            return math.inf
        if self.decodes_from > self.now:
            return self.decodes_from
        steps = min(self.running[0][0] - self.clock, (self.model.kv_tokens - self.kv) / len(self.running))
        return self.now + max(0.0, steps) * self.step_time

    def advance(self, now: float) -> None:
        """Let the time pass; at most up to the next event."""
        batch, before = len(self.running), self.kv
        if batch:
            self.busy_s += now - self.now
            decoding = now - max(self.now, self.decodes_from)
            self.prefill_s += now - self.now - max(0.0, decoding)
            if decoding > 0:
                steps = decoding / self.step_time
                self.clock += steps
                self.kv += steps * batch
                self.generated += steps * batch
            self.kv_seconds += (now - self.now) * (before + self.kv) / 2
            self.kv_peak = max(self.kv_peak, self.kv)
        self.now = now

    def ended(self) -> list[Rollout]:
        """Those at their end now, taken off the batch."""
        done = []
        while self.running and self.running[0][0] <= self.clock + STEP:
            rollout = heapq.heappop(self.running)[2]
            self.kv -= self._context(rollout, rollout.length)
            rollout.tokens = rollout.length
            done.append(rollout)
        if not self.running:
            self.kv = 0.0  # and no remainder of rounding
        return done

    def admit(self) -> None:
        """Fill free slots, oldest arrival first; before that, make room where the cache is full."""
        if self.kv + len(self.running) > self.model.kv_tokens:
            self._retract()
        limit = self.model.kv_tokens * ADMIT_BELOW
        while self.waiting and len(self.running) < self.model.slots:
            rollout = self.waiting[0]
            need = self._context(rollout, rollout.tokens)
            if self.running and self.kv + need > limit:
                return
            self.waiting.popleft()
            self.waiting_tokens -= need
            prefill = rollout.tokens + (self.model.prompt_tokens if rollout.pays_prompt else 0)
            self.decodes_from = max(self.decodes_from, self.now) + prefill / self.model.prefill_tokens_per_s
            rollout.ends_at = self.clock + rollout.length - rollout.tokens
            self._admitted += 1
            heapq.heappush(self.running, (rollout.ends_at, self._admitted, rollout))
            self.kv += need
            self.kv_peak = max(self.kv_peak, self.kv)

    def tokens(self, rollout: Rollout) -> int:
        """Of a running one, now."""
        return max(rollout.tokens, rollout.length - math.ceil(rollout.ends_at - self.clock - STEP))

    def stop(self) -> list[Rollout]:
        """Everything leaves; each rollout's tokens are what it has now."""
        left = []
        for _, _, rollout in self.running:
            rollout.tokens = self.tokens(rollout)
            left.append(rollout)
        left.extend(self.waiting)
        self.running, self.kv, self.decodes_from = [], 0.0, self.now
        self.waiting.clear()
        self.waiting_tokens = 0
        return left

    def _retract(self) -> None:
        by_tokens = sorted(self.running, key=lambda entry: -self.tokens(entry[2]))
        while len(by_tokens) > 1 and self.kv + len(by_tokens) * RETRACT_STEPS > self.model.kv_tokens:
            rollout = by_tokens.pop()[2]
            rollout.tokens = self.tokens(rollout)
            rollout.pays_prompt = True
            self.kv -= self._context(rollout, rollout.tokens)
            self.waiting.appendleft(rollout)
            self.waiting_tokens += self._context(rollout, rollout.tokens)
            self.retracted += 1
        self.running = by_tokens
        heapq.heapify(self.running)

    def _context(self, rollout: Rollout, tokens: int) -> int:
        return self.model.prompt_tokens + tokens  # a shared prompt counts for each: an upper bound, by little
