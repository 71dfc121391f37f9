"""What a rollout phase knows: the scheduler's state, and the tokens of every rollout that it has in hand.

All that reaches it is one of the `Entry`s below. A run is a fold over them: the same entries over the same state give the same
state, which is how the journal (journal.py) brings back what was generated after the last checkpoint.

Invariants:
- an action's answers come before the next event: an offer never outlives the phase that wanted it;
- a rollout is in `rollouts` until its group is complete, then in `unscored`, then in `scored`, and gone when it was taken;
- nothing here knows engines, workers, files or time.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_rl.config import UserError
from megatron_rl.loops.serial import from_json, to_json
from megatron_rl.ports import Prompts
from megatron_rl.scheduler import c3po_pp as sched
from megatron_rl.scheduler.outlook import length_metrics
from megatron_rl.types import FinishReason, Group, Progress, Prompt, Rollout, SamplingParams, Score

MANY, STRETCH = 1000, 4  # rollouts, or poolfuls of them, that the metrics of lengths look back


@dataclass(frozen=True, slots=True)
class Began:
    version: int


@dataclass(frozen=True, slots=True)
class Streamed:
    messages: Sequence[Progress]


@dataclass(frozen=True, slots=True)
class Cut:
    """Their streams ended without a reason: aborted, or the engine was lost."""

    rollout_ids: Sequence[str]


@dataclass(frozen=True, slots=True)
class Scored:
    part_id: str  # a group, or under early release a part of one
    scores: Sequence[Score]


@dataclass(frozen=True, slots=True)
class Stopped:
    """A signal asked for the end."""


@dataclass(frozen=True, slots=True)
class Taken:
    """The first so many scored groups go to the update, as many more are given up."""

    count: int
    given_up: int = 0


Overflow = Literal["carry", "discard"]  # of scored groups beyond the training budget
Entry = Began | Streamed | Cut | Scored | Stopped | Taken


@dataclass(slots=True)
class Growing:
    """An unfinished rollout, or a finished one whose siblings are not: 16 bytes a token, and its experts and supports if they are
    recorded."""

    prompt: Prompt
    sample: int
    tokens: array[int] = field(default_factory=lambda: array("i"))
    engine_logprobs: array[float] = field(default_factory=lambda: array("d"))
    versions: array[int] = field(default_factory=lambda: array("i"))
    finish_reason: FinishReason | None = None
    experts: bytes = b""
    support: list[bytes] = field(default_factory=list)

    def extend(self, progress: Progress) -> None:
        if not len(progress.tokens) == len(progress.engine_logprobs) == len(progress.versions):
            raise ValueError(f"{progress.rollout_id}: tokens, log-probs and versions of a message differ in number")
        if len(progress.support) not in (0, len(progress.tokens)):
            raise ValueError(f"{progress.rollout_id}: {len(progress.support)} supports for {len(progress.tokens)} tokens")
        self.support += progress.support_after(len(self.tokens) - len(self.support))
        self.tokens.extend(progress.tokens)
        self.engine_logprobs.extend(progress.engine_logprobs)
        self.versions.extend(progress.versions)
        self.experts = progress.experts or self.experts
        self.finish_reason = progress.finish_reason

    def rollout(self, name: str) -> Rollout:
        values = (tuple(self.tokens), tuple(self.engine_logprobs), tuple(self.versions))
        return Rollout(name, self.prompt, self.sample, *values, self.finish_reason, self.experts, tuple(self.support))

    @classmethod
    def of(cls, rollout: Rollout) -> Growing:
        values = (array("i", rollout.tokens), array("d", rollout.engine_logprobs), array("i", rollout.versions))
        return cls(rollout.prompt, rollout.sample, *values, rollout.finish_reason, rollout.experts, list(rollout.support))


class Pool:
    """`is_useful`, of dynamic sampling: whether a scored group carries a gradient."""

    def __init__(
        self, settings: sched.Settings, sampling: SamplingParams, prompts: Prompts, is_useful: Callable[[Group], bool]
    ) -> None:
        self.settings, self.sampling, self.prompts, self._is_useful = settings, sampling, prompts, is_useful
        self.state = sched.State()
        self.rollouts: dict[str, Growing] = {}  # members of groups that are not complete
        self.unscored: dict[str, tuple[Rollout, ...]] = {}  # released, not judged yet
        self._rewards: dict[str, tuple[float | None, ...]] = {}  # of open groups that were released in part; None: not judged
        self.scored: list[Group] = []  # judged, not taken yet
        self.useless: list[Group] = []  # of dynamic sampling, since the last update
        self.starting: dict[str, None] = {}  # in order: started by the scheduler, on no engine
        stretch = max(MANY, STRETCH * settings.pool_capacity)
        self._ended, self._given_up, self._trained = (deque[int](maxlen=stretch) for _ in range(3))  # tokens, lately

    def enter(self, entry: Entry) -> list[sched.Action]:
        """What is left to do outside: StopAll and Release."""
        match entry:
            case Began(version):
                self.prompts.begin(version)
                return self._apply([sched.PhaseStarted(version)])
            case Streamed(messages):
                return self._apply([event for message in messages for event in self._extend(message)])
            case Cut(rollout_ids):
                return self._apply([self._cut(name) for name in rollout_ids])
            case Scored(part_id, scores):
                return self._judge(part_id, self.unscored.pop(part_id), tuple(scores))
            case Stopped():
                return self._apply([sched.Stop()])
            case Taken(count, given_up):
                self._trained.extend(len(rollout.tokens) for group in self.scored[:count] for rollout in group.rollouts)
                gone = tuple(group.id for group in self.scored[: count + given_up])
                del self.scored[: count + given_up]
                self.useless.clear()
                return self._apply([sched.Trained(gone)])

    def next_groups(self, train_token_budget: int | None, overflow: Overflow) -> Taken:
        """The first scored groups that have about `train_token_budget` response tokens."""
        count = tokens = 0
        for group in self.scored:
            if train_token_budget is not None and tokens >= train_token_budget:
                break
            count += 1
            tokens += sum(len(rollout.tokens) for rollout in group.rollouts)
        return Taken(count, given_up=len(self.scored) - count if overflow == "discard" else 0)

    def metrics(self) -> dict[str, float]:
        """Of the phase just done, before its groups are taken."""
        growing = [len(each.tokens) for each in self.rollouts.values() if each.finish_reason is None]
        lengths = length_metrics(self.settings, self._ended, growing, self._given_up, self._trained)
        return sched.metrics(self.state, self.settings) | lengths | self.prompts.metrics()

    @property
    def running(self) -> list[str]:
        """What the scheduler takes to be running, on an engine or not."""
        return [
            sched.rollout_id(group_id, sample)
            for group_id, members in self.state.groups.items()
            for sample, member in enumerate(members)
            if member.status == "running"
        ]

    def state_dict(self) -> dict[str, Any]:
        return {
            "scheduler": self.state.to_json(),
            "rollouts": [to_json(growing.rollout(name)) for name, growing in self.rollouts.items()],
            "scored": [to_json(group) for group in self.scored],
            "rewards": self._rewards,
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
        rollouts = (from_json(Rollout, value) for value in state["rollouts"])
        self.rollouts = {rollout.id: Growing.of(rollout) for rollout in rollouts}
        self.scored = [from_json(Group, value) for value in state["scored"]]
        self._rewards = {group_id: tuple(rewards) for group_id, rewards in state["rewards"].items()}
        self.prompts.load_state_dict(state["prompts"])

    def _apply(self, events: Iterable[sched.Event]) -> list[sched.Action]:
        queue = deque(events)
        outside: list[sched.Action] = []
        while queue:
            actions = sched.step(self.state, queue.popleft(), self.settings)
            outside += [action for action in actions if isinstance(action, sched.StopAll | sched.Release)]
            queue.extendleft(reversed([answer for action in actions for answer in self._do(action)]))
        return outside

    def _do(self, action: sched.Action) -> list[sched.Event]:
        match action:
            case sched.WantGroup():
                group_id, prompt = self.prompts.take()
                for sample, name in enumerate(self._members(group_id)):
                    self.rollouts[name] = Growing(prompt, sample)
                return [sched.GroupOffered(group_id)]
            case sched.Start(name):
                self.starting[name] = None
            case sched.Restart(name):
                old = self.rollouts[name]
                self._given_up.append(len(old.tokens))
                self.rollouts[name] = Growing(old.prompt, old.sample)
            case sched.DropGroup(group_id):
                for name in self._members(group_id):
                    growing = self.rollouts.pop(name)
                    if growing.finish_reason is None:
                        self._given_up.append(len(growing.tokens))
                self.prompts.give_back(group_id)
            case sched.Release(part_id, names):
                self.unscored[part_id] = tuple(self.rollouts.pop(name).rollout(name) for name in names)
        return []

    def _judge(self, part_id: str, members: tuple[Rollout, ...], scores: tuple[Score, ...]) -> list[sched.Action]:
        group_id = sched.group_of(members[0].id)
        self.prompts.judged(group_id, scores)
        earlier = self._rewards.pop(group_id, ())
        group = Group(part_id, members[0].prompt, members, scores, tuple(reward for reward in earlier if reward is not None))
        if len(earlier) + len(members) < self.settings.group_size:
            self._rewards[group_id] = earlier + tuple(score.value if score.is_judgement else None for score in scores)
        useful = not self.settings.dynamic_sampling or self._is_useful(group)
        (self.scored if useful else self.useless).append(group)
        return self._apply([sched.Judged(group.id, useful)] if self.settings.dynamic_sampling else [])

    def _members(self, group_id: str) -> list[str]:
        return [sched.rollout_id(group_id, sample) for sample in range(self.settings.group_size)]

    def _extend(self, message: Progress) -> list[sched.Event]:
        self.rollouts[message.rollout_id].extend(message)
        self.starting.pop(message.rollout_id, None)
        events: list[sched.Event] = [sched.Generated(message.rollout_id, len(message.tokens))] if message.tokens else []
        if message.finish_reason:
            self._ended.append(len(self.rollouts[message.rollout_id].tokens))
            events.append(sched.Finished(message.rollout_id))
        return events

    def _cut(self, name: str) -> sched.Event:
        """It may have been at its end just then: an abort hides that."""
        growing, sampling = self.rollouts[name], self.sampling
        self.starting.pop(name, None)
        stopped = bool(growing.tokens) and growing.tokens[-1] in sampling.stop_token_ids
        if not stopped and len(growing.tokens) < sampling.max_response_tokens:
            return sched.Interrupted(name)
        growing.finish_reason = "stop" if stopped else "length"
        self._ended.append(len(growing.tokens))
        return sched.Finished(name)
