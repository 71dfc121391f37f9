"""The rollout scheduler: hand-computed scenes, then any interleaving of events against a model that keeps its own books."""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from megatron_rl.scheduler.c3po_pp import (
    DropGroup,
    Event,
    Finished,
    Generated,
    GroupOffered,
    Interrupted,
    Judged,
    PhaseDone,
    PhaseStarted,
    Release,
    Restart,
    Settings,
    Start,
    State,
    Stop,
    StopAll,
    Trained,
    WantGroup,
    group_of,
    metrics,
    rollout_id,
    spent,
    step,
)

PAIRS = Settings(token_budget=10, pool_capacity=4, group_size=2, retention_bound=1)


def play(state: State, settings: Settings, *events: Event) -> list[object]:
    return [action for event in events for action in step(state, event, settings)]


def released(group: str) -> Release:
    return Release(group, (f"{group}#0", f"{group}#1"))


def started(settings: Settings = PAIRS, *groups: str) -> State:
    state = State()
    play(state, settings, PhaseStarted(0), *(GroupOffered(group) for group in groups))
    return state


def test_a_phase_asks_for_groups_while_a_whole_one_fits() -> None:
    state = State()
    settings = replace(PAIRS, pool_capacity=5)  # two pairs; the fifth place stays free
    assert step(state, PhaseStarted(0), settings) == [WantGroup(), WantGroup()]
    assert step(state, GroupOffered("a"), settings) == [Start("a#0"), Start("a#1")]
    assert step(state, GroupOffered("b"), settings) == [Start("b#0"), Start("b#1")]
    # One finished: pool 3, a pair makes 5. Capacity 4 would have to wait for the second.
    assert play(state, settings, Generated("a#0", 1), Finished("a#0")) == [WantGroup()]


def test_the_budget_ends_a_phase_and_the_rest_is_carried_oldest_first() -> None:
    state = started(PAIRS, "a", "b")
    assert play(state, PAIRS, Generated("a#0", 2), Finished("a#0"), Generated("a#1", 3)) == []
    assert step(state, Finished("a#1"), PAIRS) == [released("a"), WantGroup()]  # 5 of 10 spent, pool 2: room for a pair
    assert step(state, Generated("b#1", 5), PAIRS) == [StopAll()]  # 5 + 5 = 10
    assert step(state, Generated("b#1", 2), PAIRS) == []  # what was on its way still counts
    assert step(state, Interrupted("b#0"), PAIRS) == []
    assert step(state, Interrupted("b#1"), PAIRS) == [PhaseDone()]
    assert metrics(state, PAIRS) == {
        "rollout/generated_tokens": 12.0,  # 2 + 3 + 5 + 2
        "rollout/finished_tokens": 5.0,
        "rollout/released_groups": 1.0,
        "rollout/useless_groups": 0.0,
        "rollout/budget_overshoot": 2.0,
        "rollout/pool_occupancy": 2.0,
        "rollout/carried": 1.0,  # b#0 has no token yet
        "rollout/resumed": 0.0,
        "rollout/restarted": 0.0,
        "rollout/dropped_stale": 0.0,
        "rollout/discarded_tokens": 0.0,
        "rollout/retention_max": 0.0,
        "rollout/retention_mean": 0.0,
        "rollout/pool_retention_max": 0.0,
    }
    # b#1 has tokens, b#0 has none: the older goes first, and before anything new.
    assert play(state, PAIRS, Trained(("a",)), PhaseStarted(1)) == [Start("b#1"), Start("b#0"), WantGroup()]
    assert state.counts.resumed == 1 and spent(state, PAIRS) == 0


def test_a_spent_budget_waits_for_a_first_complete_group() -> None:
    state = started(PAIRS, "a", "b")
    assert play(state, PAIRS, Generated("a#0", 50), Generated("b#0", 50), Finished("b#0")) == []  # spent: no stop, and no wants
    assert step(state, Finished("a#0"), PAIRS) == []
    assert play(state, PAIRS, Generated("b#1", 1), Finished("b#1")) == [released("b"), StopAll()]
    assert step(state, Finished("a#1"), PAIRS) == [released("a"), PhaseDone()]  # finished before the abort reached it


def test_finished_budget_counts_whole_rollouts_when_they_end() -> None:
    settings = replace(PAIRS, budget_counts="finished")
    state = started(settings, "a", "b")
    assert play(state, settings, Generated("a#0", 6), Generated("b#0", 9), Generated("a#1", 4)) == []
    assert step(state, Finished("a#0"), settings) == []  # 6 of 10
    assert step(state, Finished("a#1"), settings) == [released("a"), StopAll()]  # 6 + 4 = 10
    assert play(state, settings, Interrupted("b#0"), Interrupted("b#1"))[-1] == PhaseDone()
    play(state, settings, Trained(("a",)), PhaseStarted(1), Generated("b#0", 1), Finished("b#0"))
    assert spent(state, settings) == 10  # 9 tokens of the phase before, 1 of this


def test_a_lost_engines_rollouts_start_again_at_once() -> None:
    state = started(PAIRS, "a", "b")
    step(state, Generated("a#0", 3), PAIRS)
    assert play(state, PAIRS, Interrupted("a#0"), Interrupted("b#1")) == [Start("a#0"), Start("b#1")]
    assert state.groups["a"][0].tokens == 3


def aged(settings: Settings) -> State:
    """Version 2 is next; a#0 (4 tokens) is of version 0, a#1 finished then with 1, b#0 (3) is of version 1, b#1 has not begun."""
    settings = replace(settings, on_stale="finish")
    state = started(settings, "a", "b")
    play(state, settings, Generated("a#0", 4), Generated("a#1", 1), Finished("a#1"), Stop())
    play(state, settings, Interrupted("a#0"), Interrupted("b#0"), Interrupted("b#1"), PhaseStarted(1))
    play(state, settings, Generated("b#0", 3), Stop(), Interrupted("a#0"), Interrupted("b#0"), Interrupted("b#1"))
    assert state.phase == "idle" and state.unfinished == 3
    return state


def test_stale_rollouts_finish_restart_or_leave_with_their_group() -> None:
    settings = replace(PAIRS, retention_bound=1)
    state = aged(settings)
    assert step(state, PhaseStarted(2), settings) == [Start("a#0"), Start("b#0"), Start("b#1")]
    assert metrics(state, settings)["rollout/pool_retention_max"] == 2.0

    restart = replace(settings, on_stale="restart")
    state = aged(restart)
    assert step(state, PhaseStarted(2), restart) == [Restart("a#0"), Start("b#0"), Start("a#0"), Start("b#1")]
    assert metrics(state, restart)["rollout/restarted"] == 1.0
    assert metrics(state, restart)["rollout/discarded_tokens"] == 4.0

    drop = replace(settings, on_stale="drop_group")
    state = aged(drop)
    assert step(state, PhaseStarted(2), drop) == [DropGroup("a"), Start("b#0"), Start("b#1"), WantGroup()]
    assert metrics(state, drop)["rollout/dropped_stale"] == 2.0  # a#0 and its finished sibling
    assert metrics(state, drop)["rollout/discarded_tokens"] == 5.0
    assert state.unfinished == 2
    assert step(state, GroupOffered("a"), drop) == [Start("a#0"), Start("a#1")]  # its prompt, offered again


def test_a_group_with_two_stale_members_is_dropped_once() -> None:
    settings = replace(PAIRS, retention_bound=0, on_stale="drop_group", pool_capacity=2)
    state = started(settings, "a")
    play(state, settings, Generated("a#0", 1), Generated("a#1", 1), Stop(), Interrupted("a#0"), Interrupted("a#1"))
    assert step(state, PhaseStarted(1), settings) == [DropGroup("a"), WantGroup()]


def test_what_has_not_begun_does_not_age() -> None:
    settings = replace(PAIRS, retention_bound=0, on_stale="restart")
    state = started(settings, "a", "b")
    for version in range(1, 5):
        play(state, settings, Stop(), *(Interrupted(name) for name in ("a#0", "a#1", "b#0", "b#1")))
        assert Restart("a#0") not in step(state, PhaseStarted(version), settings)


def test_retention_of_trained_rollouts_counts_from_the_first_token() -> None:
    state = aged(PAIRS)
    play(state, PAIRS, PhaseStarted(2), Finished("a#0"))
    assert metrics(state, PAIRS)["rollout/retention_max"] == 2.0
    assert metrics(state, PAIRS)["rollout/retention_mean"] == 2.0
    play(state, PAIRS, Generated("b#1", 1), Finished("b#1"), Finished("b#0"))
    assert metrics(state, PAIRS)["rollout/retention_mean"] == (2 + 2 + 1 + 0) / 4


def test_a_phase_cut_short_goes_on_under_the_same_version() -> None:
    state = started(PAIRS, "a", "b")
    play(state, PAIRS, Generated("a#0", 4), Finished("a#0"), Finished("a#1"))
    assert play(state, PAIRS, Stop(), Interrupted("b#0"), Interrupted("b#1"))[-1] == PhaseDone()
    state = State.from_json(state.to_json())
    assert list(state.training_pool) == ["a"]  # a checkpoint taken now keeps what was released
    assert step(state, PhaseStarted(0), PAIRS) == [Start("b#0"), Start("b#1"), WantGroup()]
    assert step(state, Generated("b#0", 6), PAIRS) == [StopAll()]  # 4 + 6 = 10


def test_a_complete_phase_that_was_not_trained_is_done_again_at_once() -> None:
    state = started(PAIRS, "a", "b")
    play(state, PAIRS, Generated("a#0", 10), Finished("a#0"), Finished("a#1"), Interrupted("b#0"), Interrupted("b#1"))
    assert state.phase == "idle"
    assert step(state, PhaseStarted(0), PAIRS) == [PhaseDone()]


def test_a_spent_phase_with_nothing_left_asks_for_one_more_group() -> None:
    settings = replace(PAIRS, pool_capacity=2)
    state = started(settings, "a")
    play(state, settings, Generated("a#0", 10), Finished("a#0"), Finished("a#1"), Trained(("a",)))
    assert step(state, PhaseStarted(0), settings) == [WantGroup()]  # it would end empty-handed, or never


def test_a_group_that_comes_while_the_phase_ends_waits_in_the_pool() -> None:
    state = started(PAIRS, "a")
    play(state, PAIRS, Stop())
    assert step(state, GroupOffered("b"), PAIRS) == []
    assert play(state, PAIRS, Interrupted("a#0"), Interrupted("a#1")) == [PhaseDone()]
    assert step(state, PhaseStarted(0), PAIRS) == [Start("a#0"), Start("a#1"), Start("b#0"), Start("b#1")]


def test_synchronous_takes_a_poolful_of_groups_and_waits_for_all() -> None:
    settings = replace(PAIRS, policy="synchronous", pool_capacity=5)
    state = State()
    assert step(state, PhaseStarted(0), settings) == [WantGroup(), WantGroup()]
    play(state, settings, GroupOffered("a"), GroupOffered("b"))
    actions = play(state, settings, Generated("a#0", 99), Finished("a#0"), Finished("a#1"), Generated("b#0", 1), Finished("b#0"))
    assert actions == [released("a")]  # no budget stop, no refill
    assert step(state, Finished("b#1"), settings) == [released("b"), PhaseDone()]
    assert state.unfinished == 0 and metrics(state, settings)["rollout/budget_overshoot"] == 0.0


def test_synchronous_goes_on_after_a_stop_with_what_is_missing() -> None:
    settings = replace(PAIRS, policy="synchronous")
    state = State()
    play(state, settings, PhaseStarted(0), GroupOffered("a"), Finished("a#0"), Stop())
    assert step(state, Interrupted("a#1"), settings) == [PhaseDone()]
    assert step(state, PhaseStarted(0), settings) == [Start("a#1"), WantGroup()]
    play(state, settings, GroupOffered("b"), Finished("b#0"), Finished("b#1"))
    assert step(state, Finished("a#1"), settings) == [released("a"), PhaseDone()]


COUNT = replace(PAIRS, policy="count", pool_capacity=6, groups_per_phase=2)


def test_count_over_samples_and_stops_at_so_many_groups() -> None:
    state = State()
    assert step(state, PhaseStarted(0), COUNT) == [WantGroup()] * 3
    play(state, COUNT, *(GroupOffered(group) for group in "abc"))
    assert play(state, COUNT, Generated("c#0", 50), Finished("a#0"), Finished("a#1")) == [released("a")]  # no budget, no refill
    assert play(state, COUNT, Finished("b#0"), Finished("b#1")) == [released("b"), StopAll()]
    assert play(state, COUNT, Interrupted("c#0"), Interrupted("c#1"), Trained(("a", "b"))) == [PhaseDone()]
    assert step(state, PhaseStarted(1), COUNT) == [Start("c#0"), Start("c#1"), WantGroup(), WantGroup()]


def test_count_may_discard_what_it_did_not_wait_for() -> None:
    settings = replace(COUNT, unfinished="discard")
    state = started(settings, "a", "b", "c")
    play(state, settings, *(Finished(f"{group}#{sample}") for group in "ab" for sample in (0, 1)), Generated("c#1", 7))
    play(state, settings, Interrupted("c#0"), Interrupted("c#1"), Trained(("a", "b")))
    assert step(state, PhaseStarted(1), settings) == [DropGroup("c"), *[WantGroup()] * 3]
    assert state.counts.discarded == 7 and state.counts.dropped_stale == 0


EARLY = replace(PAIRS, group_size=3, pool_capacity=6, group_release="early")


def test_early_release_takes_what_has_finished_at_the_end_of_a_phase() -> None:
    state = started(EARLY, "a", "b")
    assert play(state, EARLY, Generated("a#0", 9), Finished("a#0"), Finished("a#2"), Finished("b#1")) == [WantGroup()]
    actions = step(state, Generated("a#1", 1), EARLY)
    assert actions == [Release("a+0", ("a#0", "a#2")), StopAll()]  # b's one member has nothing to be compared with
    play(state, EARLY, *(Interrupted(name) for name in ("a#1", "b#0", "b#2")), Trained(("a+0",)), PhaseStarted(1))
    assert play(state, EARLY, Finished("a#1")) == [Release("a+1", ("a#1",))]  # the last: its siblings have ended
    assert play(state, EARLY, Finished("b#0"), Finished("b#2"))[0] == Release("b", ("b#0", "b#1", "b#2"))


def test_early_release_is_refused_where_a_part_could_be_dropped() -> None:
    with pytest.raises(ValueError, match="group_release=early"):
        replace(EARLY, on_stale="drop_group")


def test_a_warm_start_waits_for_the_groups_that_it_began_with() -> None:
    settings = replace(PAIRS, warm_start=True)
    state = started(settings, "a", "b")
    assert play(state, settings, Generated("a#0", 3), Finished("a#0"), Finished("a#1")) == [released("a"), WantGroup()]
    play(state, settings, GroupOffered("c"), Generated("c#0", 50), Finished("c#0"), Finished("c#1"))
    assert state.phase == "running"  # spent, and two groups are complete
    assert play(state, settings, Finished("b#0"), Finished("b#1")) == [released("b"), PhaseDone()]
    play(state, settings, Trained(("a", "b", "c")), PhaseStarted(1), GroupOffered("d"), GroupOffered("e"))
    assert play(state, settings, Generated("d#0", 50), Finished("d#0"), Finished("d#1"))[-1] == StopAll()


DYNAMIC = replace(PAIRS, dynamic_sampling=True)


def test_a_useless_group_ends_no_phase_and_makes_room_for_another() -> None:
    settings = replace(COUNT, dynamic_sampling=True)
    state = started(settings, "a", "b", "c")
    play(state, settings, *(Finished(f"{group}#{sample}") for group in "ab" for sample in (0, 1)))
    assert state.phase == "running"  # two are complete, none is judged
    assert step(state, Judged("a", False), settings) == [WantGroup()]
    assert step(state, Judged("b", True), settings) == []
    assert play(state, settings, Finished("c#0"), Finished("c#1"), Judged("c", True)) == [released("c"), PhaseDone()]
    assert list(state.training_pool) == ["b", "c"] and metrics(state, settings)["rollout/useless_groups"] == 1.0


def test_a_spent_budget_waits_for_a_judgement_and_not_for_a_useful_group() -> None:
    state = started(DYNAMIC, "a", "b")
    play(state, DYNAMIC, Generated("a#0", 50), Finished("a#0"), Finished("a#1"))
    assert state.phase == "running"
    assert step(state, Judged("a", False), DYNAMIC) == [StopAll()]


@pytest.mark.parametrize("policy", ["synchronous", "count"])
def test_useless_groups_alone_do_not_keep_a_baseline_at_it_for_ever(policy: str) -> None:
    settings = replace(COUNT, policy=policy, pool_capacity=4, dynamic_sampling=True)
    state = started(settings)
    for number in range(20):
        assert state.phase == "running" and state.wants
        name = f"g{number}"
        play(state, settings, GroupOffered(name), Finished(f"{name}#0"), Finished(f"{name}#1"), Judged(name, False))
    assert state.phase == "idle" and not state.training_pool


def test_a_group_is_judged_once() -> None:
    state = started(DYNAMIC, "a", "b")
    play(state, DYNAMIC, Finished("a#0"), Finished("a#1"), Judged("a", True))
    with pytest.raises(ValueError, match="a was judged, but"):
        step(state, Judged("a", True), DYNAMIC)


def test_synchronous_finishes_what_another_policy_left() -> None:
    state = started(PAIRS, "a", "b")
    play(state, PAIRS, Finished("a#0"), Finished("b#0"), GroupOffered("c"), Stop())
    play(state, PAIRS, *(Interrupted(name) for name in ("a#1", "b#1", "c#0", "c#1")))
    settings = replace(PAIRS, policy="synchronous")  # two groups a phase; three are open
    assert step(state, PhaseStarted(1), settings) == [Start("a#1"), Start("b#1"), Start("c#0"), Start("c#1")]
    actions = play(state, settings, *(Finished(name) for name in ("a#1", "b#1", "c#0", "c#1")))
    assert actions == [released("a"), released("b"), released("c"), PhaseDone()]


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (GroupOffered("c"), "group c was offered, but none is wanted"),
        (Generated("c#0", 1), "rollout c#0 is not in the pool"),
        (Generated("a#2", 1), "rollout a#2 is not in the pool"),
        (Finished("b#0"), "rollout b#0 is finished, not running"),
        (Trained(("a",)), "a is not in the training pool"),
        (PhaseStarted(1), "phase 1 cannot start: phase 0 is running"),
    ],
)
def test_an_event_that_cannot_follow_is_refused(event: Event, message: str) -> None:
    state = started(PAIRS, "a", "b")
    step(state, Finished("b#0"), PAIRS)
    with pytest.raises(ValueError, match=message):
        step(state, event, PAIRS)


def test_a_group_is_offered_once() -> None:
    state = started(PAIRS, "a")
    with pytest.raises(ValueError, match="group a was offered twice"):
        step(state, GroupOffered("a"), PAIRS)


def test_settings_that_hold_no_group_are_refused() -> None:
    with pytest.raises(ValueError, match="group_size <= pool_capacity"):
        Settings(token_budget=1, pool_capacity=3, group_size=4, retention_bound=0)


def possible(spare: int, share: float, group_size: int, **keys: Any) -> Settings:
    if keys["policy"] != "c3po_pp" or keys["on_stale"] == "drop_group":
        keys["group_release"] = "complete"
    return Settings(
        pool_capacity=group_size + spare,
        group_size=group_size,
        groups_per_phase=1 + int(share * (spare // group_size)),
        **keys,
    )


SETTINGS = st.builds(
    possible,
    spare=st.integers(0, 9),
    group_release=st.sampled_from(["complete", "early"]),
    share=st.floats(0, 1),
    token_budget=st.integers(1, 40),
    group_size=st.integers(1, 4),
    retention_bound=st.integers(0, 3),
    budget_counts=st.sampled_from(["generated", "finished"]),
    on_stale=st.sampled_from(["finish", "restart", "drop_group"]),
    policy=st.sampled_from(["c3po_pp", "c3po_pp", "synchronous", "count"]),
    unfinished=st.sampled_from(["carry", "discard"]),
    dynamic_sampling=st.booleans(),
    warm_start=st.booleans(),
)


class Interleavings(RuleBasedStateMachine):
    """A driver with books of its own: tokens by rollout and version, who runs, what was released and trained."""

    @initialize(settings=SETTINGS)
    def begin(self, settings: Settings) -> None:
        self.settings, self.state, self.log = settings, State(), []
        self.tokens: dict[str, list[int]] = {}  # unreleased rollouts: the version of each token
        self.running: set[str] = set()
        self.ended: set[str] = set()  # finished, group not released
        self.released: list[str] = []
        self.trained: list[str] = []
        self.unjudged: list[str] = []
        self.useless: list[str] = []
        self.parts: dict[str, tuple[str, ...]] = {}  # all that was ever released
        self.gone: Counter[str] = Counter()  # members released, by group
        self.dropped: deque[str] = deque()
        self.offered = self.wants = 0
        self.version, self.in_phase = -1, False
        self.generated = self.finished = 0

    def send(self, event: Event) -> None:
        twin = State.from_json(json.loads(json.dumps(self.state.to_json(), sort_keys=True)))
        assert twin == self.state
        actions = step(self.state, event, self.settings)
        assert step(twin, event, self.settings) == actions and twin == self.state
        self.log.append(event)
        for action in actions:
            self.do(action)

    def do(self, action: object) -> None:
        match action:
            case WantGroup():
                self.wants += 1
            case Start(name):
                assert name not in self.running and name not in self.ended and self.state.phase == "running"
                self.running.add(name)
            case StopAll():
                assert self.running
            case Release(part, members):
                assert set(members) <= self.ended and part not in self.parts
                if self.settings.group_release == "complete":
                    assert list(members) == self.members(part)
                else:
                    group = group_of(members[0])
                    ended = self.gone[group] + sum(name in self.ended for name in self.members(group))
                    assert ended == self.settings.group_size or (ended > 1 and self.state.phase != "running")
                self.parts[part] = members
                self.gone[group_of(members[0])] += len(members)
                self.forget(members)
                self.released.append(part)
                if self.settings.dynamic_sampling:
                    self.unjudged.append(part)
            case Restart(name):
                assert self.settings.on_stale == "restart" and self.age(name) > self.settings.retention_bound
                self.tokens[name] = []
            case DropGroup(group):
                members = self.members(group)
                if self.settings.policy != "count" or self.settings.unfinished == "carry":
                    assert self.settings.on_stale == "drop_group"
                    assert max(self.age(name) for name in members if name not in self.ended) > self.settings.retention_bound
                self.forget(members)
                self.dropped.append(group)
            case PhaseDone():
                assert self.in_phase and not self.running
                self.in_phase, self.wants = False, 0

    def members(self, group: str) -> list[str]:
        return [rollout_id(group, sample) for sample in range(self.settings.group_size)]

    def forget(self, members: Iterable[str]) -> None:
        for name in members:
            del self.tokens[name]
            self.ended.discard(name)

    def age(self, name: str) -> int:
        return self.version - self.tokens[name][0] if self.tokens[name] else 0

    def start_phase(self, version: int) -> None:
        if version > self.version:
            self.generated = self.finished = 0
        self.version, self.in_phase = version, True
        self.send(PhaseStarted(version))
        for name in self.running:
            if self.settings.on_stale != "finish":
                assert self.age(name) <= self.settings.retention_bound

    @precondition(lambda self: not self.in_phase and not self.unjudged)
    @rule(newer=st.integers(1, 2))
    def next_version(self, newer: int) -> None:
        self.start_phase(self.version + newer)

    @precondition(lambda self: not self.in_phase and self.version >= 0)
    @rule()
    def same_version(self) -> None:
        self.start_phase(self.version)

    @precondition(lambda self: self.wants)
    @rule()
    def offer(self) -> None:
        if self.dropped:
            group = self.dropped.popleft()
        else:
            group, self.offered = f"0:prompt#{self.offered}", self.offered + 1  # an id may hold the separator, too
        self.wants -= 1
        for name in self.members(group):
            self.tokens[name] = []
        self.send(GroupOffered(group))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), count=st.integers(0, 9))
    def generate(self, data: st.DataObject, count: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.running)))
        self.tokens[name] += [self.version] * count
        self.generated += count
        self.send(Generated(name, count))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self.end(data.draw(st.sampled_from(sorted(self.running))))

    def end(self, name: str) -> None:
        self.running.discard(name)
        self.ended.add(name)
        self.finished += len(self.tokens[name])
        self.send(Finished(name))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def interrupt(self, data: st.DataObject) -> None:
        """Aborted when the phase is ending, lost with an engine otherwise: then each goes on in the same phase."""
        names = data.draw(st.lists(st.sampled_from(sorted(self.running)), unique=True, min_size=1))
        goes_on = self.state.phase == "running"
        for name in names:
            self.running.discard(name)
            self.send(Interrupted(name))
        assert not goes_on or self.state.phase != "running" or set(names) <= self.running

    @rule()
    def stop(self) -> None:
        self.send(Stop())

    @precondition(lambda self: self.in_phase)
    @rule()
    def cut_short(self) -> None:
        self.send(Stop())
        for name in sorted(self.running):
            self.running.discard(name)
            self.send(Interrupted(name))
        assert not self.in_phase

    @precondition(lambda self: self.unjudged)
    @rule(data=st.data(), useful=st.booleans())
    def judge(self, data: st.DataObject, useful: bool) -> None:
        self.judged(data.draw(st.sampled_from(self.unjudged)), useful)

    def judged(self, group: str, useful: bool) -> None:
        self.unjudged.remove(group)
        if not useful:
            self.released.remove(group)
            self.useless.append(group)
        self.send(Judged(group, useful))

    @precondition(lambda self: self.released and not self.unjudged)
    @rule(data=st.data())
    def train(self, data: st.DataObject) -> None:
        groups = data.draw(st.lists(st.sampled_from(self.released), unique=True, min_size=1))
        self.released = [group for group in self.released if group not in groups]
        self.trained += groups
        self.send(Trained(tuple(groups)))

    @invariant()
    def conservation(self) -> None:
        here = [name for group in self.state.groups for name in self.members(group)]
        gone = [name for members in self.parts.values() for name in members]
        assert len(set(gone)) == len(gone)
        assert sorted(set(here) - set(gone)) == sorted(self.tokens)
        assert list(self.state.training_pool) == self.released
        assert len(set(self.trained)) == len(self.trained)
        assert len(self.parts) == len(self.released) + len(self.trained) + len(self.useless)
        whole = sum(count == self.settings.group_size for count in self.gone.values())
        assert len(self.state.groups) + whole + len(self.dropped) == self.offered

    @invariant()
    def capacity(self) -> None:
        pool = len(self.tokens) - len(self.ended)
        assert pool == self.state.unfinished
        assert pool + self.wants * self.settings.group_size <= self.settings.pool_capacity
        assert self.wants == self.state.wants and len(self.running) == self.state.running

    @invariant()
    def readiness(self) -> None:
        def ended(group: str) -> int:
            return self.gone[group] + len(self.ended & set(self.members(group)))

        ready = [group for group in self.state.groups if self.ended & set(self.members(group)) and ended(group) > 1]
        assert self.state.ready == (len(ready) if self.settings.group_release == "early" else 0)

    @invariant()
    def accounting(self) -> None:
        assert spent(self.state, self.settings) == (self.generated if self.settings.budget_counts == "generated" else self.finished)
        for group, members in self.state.groups.items():
            for member, name in zip(members, self.members(group), strict=True):
                assert (member.status == "released") == (name not in self.tokens)
                assert name not in self.tokens or member.tokens == len(self.tokens[name])
        if self.settings.policy == "c3po_pp":
            overshoot = max(0, spent(self.state, self.settings) - self.settings.token_budget)
            assert metrics(self.state, self.settings)["rollout/budget_overshoot"] == overshoot

    @invariant()
    def ageing(self) -> None:
        ages = [self.age(name) for name in self.tokens if name not in self.ended]
        assert metrics(self.state, self.settings)["rollout/pool_retention_max"] == max(ages, default=0)

    def teardown(self) -> None:
        """Durability: the log alone gives the state. Progress: a phase from here on ends, and brings something to train."""
        if not hasattr(self, "log"):
            return
        folded = State()
        for event in self.log:
            step(folded, event, self.settings)
        assert folded == self.state

        while self.in_phase:
            self.advance()
        while self.unjudged:
            self.judged(self.unjudged[0], useful=True)
        self.start_phase(self.version + 1)
        while self.in_phase:
            self.advance()
        assert self.released or self.state.counts.useless
        if self.settings.policy == "c3po_pp":
            assert spent(self.state, self.settings) >= self.settings.token_budget
        elif self.settings.policy == "count":
            assert self.state.counts.released >= self.settings.groups_per_phase
        else:
            assert not self.tokens

    def advance(self) -> None:
        while self.wants:
            self.offer()
        if self.unjudged:
            self.judged(self.unjudged[0], useful=True)
            return
        assert self.running, "a phase that nothing can end"
        name = min(self.running)
        self.tokens[name].append(self.version)
        self.generated += 1
        self.send(Generated(name, 1))
        if name in self.running:
            self.end(name)
        self.conservation()
        self.capacity()


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = hypothesis_settings(max_examples=200, stateful_step_count=50, deadline=None)
