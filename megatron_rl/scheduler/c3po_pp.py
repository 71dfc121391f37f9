"""C3PO++ as a pure state machine: which rollouts run, when a phase ends, which groups may be trained.

Ring-1T report, arXiv 2510.18855, section 2.3.3 and Algorithm 1. The machine sees ids and token counts; prompts, tokens, engines and
time belong to its driver, which reports `Event`s to `step` and does the `Action`s that it returns, in order. `step` changes the
state in place, so that an event costs O(1) (the start of a phase: O(pool log pool)). All that the machine knows is in the state: a
run is a fold over its event log, and production, replay and simulation are the same code.

The pool is the unfinished rollouts, running or carried; finished members wait beside it for their siblings. A phase belongs to one
weight version. It ends when its budget is spent *and* a group waits for training. With the budget spent no further group is
wanted, but what is in the pool goes on until a group is complete: since the pool is not empty then, no phase ends empty-handed and
none lives for ever.

Two baselines are policies of the same machine. "synchronous": pool_capacity // group_size groups, all waited for, nothing carried.
"count" over-samples: pool_capacity // group_size groups at the start of a phase, which ends when groups_per_phase of them are
complete (slime's way: rollout/sglang_rollout.py, generate_rollout_async); the rest is carried, or dropped and offered again.

A group trains when all its members have finished; under early release what has finished of it by the end of a phase, if that is
more than one member, trains as a part, against the rewards of all that have ended.

A pool that starts empty trains its short rollouts first. A warm start lets the first phase, whatever its budget, wait for the
groups that it began with.

Under dynamic sampling (DAPO, arXiv 2503.14476, section 3.2) a group without a gradient leaves the training pool when it is judged,
and makes room for another: within the budget, or in the baselines until RESAMPLE times a phase's groups were useless. What can only
produce such groups does not keep a phase from ending.

Invariants (tests/property/test_c3po_pp.py):
- conservation: each member of each offered group is in the pool, waits finished for its siblings, is in the training pool, or has
  been trained or judged useless, exactly one of these; a dropped group has left whole and may be offered again; nothing is trained
  twice;
- capacity: the pool and what it has asked for never exceed pool_capacity;
- accounting: the budget's count is the sum of what was generated (or finished) in the phase, to the token;
- ageing: retention is version - version at the first token; what has no token does not age;
- durability: from_json(to_json(state)) == state, and both go on identically; the fold over the event log gives the state;
- progress: any phase ends after finitely many events if rollouts do; a phase cut short by Stop goes on with the same count
  when PhaseStarted names the same version again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import assert_never

from megatron_rl.scheduler.messages import (
    Action,
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
    Stop,
    StopAll,
    Trained,
    WantGroup,
    group_of,
    rollout_id,
)
from megatron_rl.scheduler.state import ENDED, Counts, Member, State

__all__ = [
    "Action",
    "DropGroup",
    "Event",
    "Finished",
    "Generated",
    "GroupOffered",
    "Interrupted",
    "Judged",
    "PhaseDone",
    "PhaseStarted",
    "Release",
    "Restart",
    "Settings",
    "Start",
    "State",
    "Stop",
    "StopAll",
    "Trained",
    "WantGroup",
    "group_of",
    "metrics",
    "rollout_id",
    "spent",
    "step",
]

RESAMPLE = 10


def step(state: State, event: Event, settings: Settings) -> list[Action]:
    """Take in one event; what the driver must do now. Raises ValueError for an event that cannot follow this state."""
    actions: list[Action] = []
    match event:
        case Generated(name, tokens):
            member = _running(state, name)
            if member.first_version is None and tokens:
                member.first_version = state.version
            member.tokens += tokens
            state.counts.generated += tokens
        case Finished(name):
            _finish(state, name, settings, actions)
        case Interrupted(name):
            _running(state, name).status = "waiting"
            state.running -= 1
            if state.phase == "running":
                _start(state, name, actions)
        case GroupOffered(group_id):
            _admit(state, group_id, settings, actions)
        case PhaseStarted(version):
            _open_phase(state, version, settings, actions)
        case Stop():
            if state.phase == "running":
                _stop(state, settings, actions)
        case Judged(part_id, useful):
            _judge(state, part_id, useful)
        case Trained(part_ids):
            for part_id in part_ids:
                if part_id not in state.training_pool:
                    raise ValueError(f"{event}: {part_id} is not in the training pool")
                del state.training_pool[part_id]
        case _:
            assert_never(event)

    if state.phase == "running":
        if _complete(state, settings):
            _stop(state, settings, actions)
        else:
            _refill(state, settings, actions)
    if state.phase == "stopping" and not state.running:
        state.phase, state.wants = "idle", 0
        actions.append(PhaseDone())
    return actions


def spent(state: State, settings: Settings) -> int:
    """C, the tokens that count against this phase's budget."""
    return state.counts.generated if settings.budget_counts == "generated" else state.counts.finished


def metrics(state: State, settings: Settings) -> dict[str, float]:
    """Of the phase just done, before its groups are reported Trained. Retention is that of the rollouts in the training pool,
    in versions since their first token."""
    counts = state.counts
    unfinished = [m for _, m in _members(state) if m.status not in ENDED]
    ages = [state.version - first for versions in state.training_pool.values() for first in versions]
    numbers = {
        "generated_tokens": counts.generated,
        "finished_tokens": counts.finished,
        "released_groups": counts.released,
        "useless_groups": counts.useless,
        "budget_overshoot": max(0, spent(state, settings) - settings.token_budget) if settings.policy == "c3po_pp" else 0,
        "pool_occupancy": len(unfinished),
        "carried": sum(m.tokens > 0 for m in unfinished),
        "resumed": counts.resumed,
        "restarted": counts.restarted,
        "dropped_stale": counts.dropped_stale,
        "discarded_tokens": counts.discarded,
        "retention_max": max(ages, default=0),
        "retention_mean": sum(ages) / len(ages) if ages else 0.0,
        "pool_retention_max": max((_retention(state, m) for m in unfinished), default=0),
    }
    return {f"rollout/{name}": float(number) for name, number in numbers.items()}


def _complete(state: State, settings: Settings) -> bool:
    useful = state.counts.released - state.counts.unjudged
    enough = useful >= settings.target or state.counts.useless >= RESAMPLE * settings.target
    if settings.policy == "synchronous":
        return not state.groups and enough
    if settings.policy == "count":
        return enough
    something = len(state.training_pool) > state.counts.unjudged or state.ready > 0 or state.counts.useless > 0
    return spent(state, settings) >= settings.token_budget and something and not state.first_fill


def _refill(state: State, settings: Settings, actions: list[Action]) -> None:
    while _has_room(state, settings):
        state.wants += 1
        actions.append(WantGroup())


def _has_room(state: State, settings: Settings) -> bool:
    if state.unfinished + (state.wants + 1) * settings.group_size > settings.pool_capacity:
        return False
    underway = len(state.groups) + state.wants
    if settings.policy == "count":  # a group keeps its places until it is complete, and then until the phase ends
        return underway + state.counts.released < settings.pool_capacity // settings.group_size
    if settings.policy == "synchronous":
        return underway + state.counts.released < settings.target and state.counts.useless < RESAMPLE * settings.target
    return spent(state, settings) < settings.token_budget or underway + state.counts.unjudged == 0


def _stop(state: State, settings: Settings, actions: list[Action]) -> None:
    state.phase = "stopping"
    if settings.group_release == "early":
        for group_id, members in state.groups.items():
            if _is_ready(members):
                _release(state, group_id, members, settings, actions)
        state.ready = 0
    if state.running:
        actions.append(StopAll())


def _open_phase(state: State, version: int, settings: Settings, actions: list[Action]) -> None:
    if state.phase != "idle" or version < state.version:
        raise ValueError(f"phase {version} cannot start: phase {state.version} is {state.phase}")
    if version > state.version:
        state.is_first_phase = state.version == -1
        state.version, state.counts = version, Counts()
        if settings.policy == "count" and settings.unfinished == "discard":
            for group_id in list(state.groups):
                _drop(state, group_id, actions)
        _retire_stale(state, settings, actions)
    state.phase = "running"
    if _complete(state, settings):  # cut short by a Stop just when it was complete
        return
    waiting = [(name, member) for name, member in _members(state) if member.status == "waiting"]
    waiting.sort(key=lambda item: version + 1 if item[1].first_version is None else item[1].first_version)  # stable: then admission
    for name, member in waiting:
        state.counts.resumed += member.tokens > 0
        _start(state, name, actions)


def _retire_stale(state: State, settings: Settings, actions: list[Action]) -> None:
    if settings.on_stale == "finish":
        return
    stale = [n for n, m in _members(state) if m.status == "waiting" and _retention(state, m) > settings.retention_bound]
    for name in stale:
        group_id = group_of(name)
        if settings.on_stale == "drop_group" and group_id in state.groups:
            state.counts.dropped_stale += _drop(state, group_id, actions)
        elif settings.on_stale == "restart":
            member = _member(state, name)
            state.counts.restarted += 1
            state.counts.discarded += member.tokens
            member.tokens, member.first_version = 0, None
            actions.append(Restart(name))


def _drop(state: State, group_id: str, actions: list[Action]) -> int:
    """How many of its members had tokens."""
    members = state.groups.pop(group_id)
    state.first_fill.pop(group_id, None)
    state.unfinished -= sum(m.status not in ENDED for m in members)
    state.counts.discarded += sum(m.tokens for m in members)
    actions.append(DropGroup(group_id))
    return sum(m.tokens > 0 for m in members)


def _admit(state: State, group_id: str, settings: Settings, actions: list[Action]) -> None:
    if not state.wants:
        raise ValueError(f"group {group_id} was offered, but none is wanted")
    if group_id in state.groups or group_id in state.training_pool:
        raise ValueError(f"group {group_id} was offered twice")
    state.wants -= 1
    size = settings.group_size
    state.groups[group_id] = [Member() for _ in range(size)]
    state.unfinished += size
    if settings.warm_start and state.is_first_phase and not state.counts.generated:
        state.first_fill[group_id] = None
    if state.phase == "running":
        for sample in range(size):
            _start(state, rollout_id(group_id, sample), actions)


def _start(state: State, name: str, actions: list[Action]) -> None:
    _member(state, name).status = "running"
    state.running += 1
    actions.append(Start(name))


def _finish(state: State, name: str, settings: Settings, actions: list[Action]) -> None:
    member = _running(state, name)
    member.status = "finished"
    state.running -= 1
    state.unfinished -= 1
    state.counts.finished += member.tokens
    group_id = group_of(name)
    members = state.groups[group_id]
    early = settings.group_release == "early"
    was_ready = early and _is_ready([m for m in members if m is not member])
    if all(m.status in ENDED for m in members):
        state.ready -= was_ready
        del state.groups[group_id]
        state.first_fill.pop(group_id, None)
        _release(state, group_id, members, settings, actions)
    elif early:
        state.ready += _is_ready(members) - was_ready


def _release(state: State, group_id: str, members: list[Member], settings: Settings, actions: list[Action]) -> None:
    """All that is finished and not yet released."""
    samples = [sample for sample, member in enumerate(members) if member.status == "finished"]
    is_whole = len(samples) == len(members)
    part_id = group_id if is_whole else f"{group_id}+{samples[0]}"  # of no other part: a sample is released once
    state.training_pool[part_id] = [state.version - _retention(state, members[sample]) for sample in samples]
    state.counts.released += 1
    state.counts.unjudged += settings.dynamic_sampling
    for sample in samples:
        members[sample].status = "released"
    actions.append(Release(part_id, tuple(rollout_id(group_id, sample) for sample in samples)))


def _is_ready(members: list[Member]) -> bool:
    """Whether early release may take what has finished: only beside siblings that ended has it an advantage."""
    return any(m.status == "finished" for m in members) and sum(m.status in ENDED for m in members) > 1


def _judge(state: State, group_id: str, useful: bool) -> None:
    if group_id not in state.training_pool or not state.counts.unjudged:
        raise ValueError(f"group {group_id} was judged, but it does not wait for that")
    state.counts.unjudged -= 1
    if not useful:
        del state.training_pool[group_id]
        state.counts.released -= 1
        state.counts.useless += 1


def _retention(state: State, member: Member) -> int:
    return 0 if member.first_version is None else state.version - member.first_version


def _members(state: State) -> Iterator[tuple[str, Member]]:
    for group_id, members in state.groups.items():
        for sample, member in enumerate(members):
            yield rollout_id(group_id, sample), member


def _member(state: State, name: str) -> Member:
    group_id, _, sample = name.rpartition("#")
    if group_id not in state.groups or int(sample) >= len(state.groups[group_id]):
        raise ValueError(f"rollout {name} is not in the pool")
    return state.groups[group_id][int(sample)]


def _running(state: State, name: str) -> Member:
    member = _member(state, name)
    if member.status != "running":
        raise ValueError(f"rollout {name} is {member.status}, not running")
    return member
