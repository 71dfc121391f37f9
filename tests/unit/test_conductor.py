"""The conductor against scripted engines: nothing lost, nothing twice, whatever dies."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import CountedPrompts, ParityRewards, ScriptedEngine, ScriptedEngines, length_of, scripted_support

from megatron_rl.config import UserError
from megatron_rl.loops.conductor import Conductor, Phase
from megatron_rl.loops.journal import Journal
from megatron_rl.loops.pool import Growing
from megatron_rl.loops.serial import from_json, to_json
from megatron_rl.loops.signals import StopFlag
from megatron_rl.loops.verdicts import Verdicts
from megatron_rl.scheduler.c3po_pp import Settings
from megatron_rl.types import Progress, Rollout, SamplingParams, Score

GROUP, POOL, BUDGET = 4, 24, 100


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


def conductor(
    runner: asyncio.Runner, engines: ScriptedEngines, folder: Path | None = None, saved: Any = None, **settings: object
) -> Conductor:
    values = {"token_budget": BUDGET, "pool_capacity": POOL, "group_size": GROUP, "retention_bound": 100, **settings}
    sampling = SamplingParams(max_response_tokens=64, report_support=True)
    parts = (engines, ParityRewards(), CountedPrompts(), Journal(folder or Path(tempfile.mkdtemp()), {}), StopFlag(), runner)
    c = Conductor(
        Settings(**values),
        sampling,
        *parts,
        timeout_s=20,
        is_useful=lambda group: len(set(group.rewards)) > 1,
        record_experts=lambda version: True,
    )
    if saved is not None:
        c.load_state_dict(saved)
    c.restarted(0)
    return c


def two_engines() -> ScriptedEngines:
    return ScriptedEngines([ScriptedEngine("a", prompt_tokens=2), ScriptedEngine("b", prompt_tokens=2, chunk=1)])


def check_groups(phase: Phase) -> None:
    """Every member is whole: its own tokens in order, though several engines and versions made them."""
    for group in phase.groups:
        assert [r.sample for r in group.rollouts] == list(range(GROUP))
        for rollout in group.rollouts:
            n = length_of(rollout.id)
            assert rollout.tokens == tuple(p % 50 for p in range(n))
            assert rollout.engine_logprobs == tuple(-p / 100 for p in range(n))
            assert rollout.finish_reason == "stop"
            assert list(rollout.versions) == sorted(rollout.versions)
            assert rollout.support == tuple(map(scripted_support, rollout.tokens, rollout.versions))
            positions, versions = rollout.experts[::2], rollout.experts[1::2]
            assert list(positions) == list(range(2 + n - 1)), "the prompt's, and all but the last token's"
            assert set(versions) == {rollout.versions[-1]}, "the last engine's, which computed them all"


def test_every_prompt_is_handed_out_once_over_many_phases(runner: asyncio.Runner) -> None:
    engines = two_engines()
    c = conductor(runner, engines)
    seen: list[str] = []
    carried = 0
    for version in range(30):
        for engine in engines.engines:
            engine.version = version
        phase = c.phase(version)
        assert phase.status == "done"
        check_groups(phase)
        assert len(c.pool.rollouts) <= POOL + POOL * (GROUP - 1)  # unfinished ones and finished siblings that wait for them
        carried += phase.metrics["rollout/carried"] > 0
        seen += [group.prompt.id for group in phase.groups]
    open_prompts = {rollout.prompt.id for rollout in c.pool.rollouts.values()}
    assert len(seen) == len(set(seen))
    assert set(seen) | open_prompts == {f"p{i}" for i in range(c.pool.prompts.next)}  # type: ignore[attr-defined]
    assert carried > 15


def test_tokens_carried_over_keep_the_version_that_made_them(runner: asyncio.Runner) -> None:
    engines = two_engines()
    c = conductor(runner, engines)
    mixed = 0
    for version in range(10):
        for engine in engines.engines:
            engine.version = version
        mixed += sum(len(set(r.versions)) > 1 for group in c.phase(version).groups for r in group.rollouts)
    assert mixed > 0


def test_tokens_without_a_support_among_those_with_one_keep_their_place() -> None:
    """Of a run that changed rollout.keep_sampling_mask and changed it back."""
    parts = [((1, 2), ()), ((3, 4), (b"333a", b"4444")), ((5,), ()), ((6,), (b"666a666b",)), ((7, 8), ())]
    messages = [Progress("0:p#0", t, (-0.5,) * len(t), (0,) * len(t), support=support) for t, support in parts]
    prompt = CountedPrompts().take()[1]
    rollout, growing = Rollout("0:p#0", prompt, 0), Growing(prompt, 0)
    for message in messages:
        rollout = rollout.extended(message)
        growing.extend(message)
    assert rollout.support == (b"", b"", b"333a", b"4444", b"", b"666a666b")
    assert growing.rollout("0:p#0") == rollout == Growing.of(rollout).rollout("0:p#0")
    assert from_json(Rollout, json.loads(json.dumps(to_json(rollout)))) == rollout
    with pytest.raises(ValueError, match="1 supports for 2 tokens"):
        growing.extend(replace(messages[0], support=(b"1111",)))


def test_a_lost_engines_rollouts_go_on_elsewhere_from_their_last_token(runner: asyncio.Runner) -> None:
    engines = two_engines()
    engines.engines[0].dies_after = 2
    c = conductor(runner, engines)
    phase = c.phase(0)
    assert phase.status == "done"
    check_groups(phase)
    assert len(engines.engines[1].served) > len(set(engines.engines[1].served)) - 1
    assert set(engines.engines[0].served) & set(engines.engines[1].served)


def test_a_rollout_that_is_cut_at_its_very_end_is_finished(runner: asyncio.Runner) -> None:
    """By its length, or by a stop token as its last."""
    engines = two_engines()
    for engine in engines.engines:
        engine.hides_ends, engine.length = True, lambda rollout_id: 7 if rollout_id.endswith("#0") else 64
    c = conductor(runner, engines)
    c.pool.sampling = replace(c.pool.sampling, stop_token_ids=(6,))
    phase = c.phase(0)
    assert phase.groups
    for group in phase.groups:
        assert [r.finish_reason for r in group.rollouts] == ["stop", "length", "length", "length"]
        assert [len(r.tokens) for r in group.rollouts] == [7, 64, 64, 64]


def test_a_phase_may_end_with_the_batch_of_messages_that_ends_its_last_rollouts(runner: asyncio.Runner) -> None:
    """Three tokens each, all in one message: the answers to the scheduler's wants must not come after the end of the phase."""
    engines = ScriptedEngines([ScriptedEngine("a", prompt_tokens=2, length=lambda _: 3)])
    c = conductor(runner, engines, token_budget=50)
    groups = [group for version in range(4) for group in c.phase(version).groups]
    assert len(groups) == len({group.id for group in groups}) >= 20


def test_a_stop_while_no_engine_is_alive_loses_nothing(runner: asyncio.Runner) -> None:
    engines = two_engines()
    for engine in engines.engines:
        engine.dies_after = 2
    c = conductor(runner, engines)
    assert c.phase(0).status == "no_engine"
    c.stop.requested = True
    assert c.phase(0).status == "stopped"
    other = conductor(runner, two_engines())
    other.load_state_dict(json.loads(json.dumps(c.state_dict())))
    phase = other.phase(0)
    assert phase.status == "done"
    check_groups(phase)


def test_carried_rollouts_refuse_another_group_size(runner: asyncio.Runner) -> None:
    c = conductor(runner, two_engines())
    c.phase(0)
    with pytest.raises(UserError, match=r"rollout.group_size=2: .* begun with 4"):
        conductor(runner, two_engines(), group_size=2).load_state_dict(c.state_dict())


def test_without_engines_the_phase_waits_to_go_on(runner: asyncio.Runner) -> None:
    engines = two_engines()
    for engine in engines.engines:
        engine.dies_after = 2
    c = conductor(runner, engines)
    assert c.phase(0).status == "no_engine"
    assert engines.recover() == ["a", "b"]
    phase = c.phase(0)
    assert phase.status == "done"
    check_groups(phase)


def test_a_stopped_and_restored_conductor_loses_nothing(runner: asyncio.Runner) -> None:
    c = conductor(runner, two_engines())
    seen = [group.prompt.id for version in range(3) for group in c.phase(version).groups]
    c.stop.requested = True
    assert c.phase(3).status == "stopped"
    saved = json.loads(json.dumps(c.state_dict()))

    engines = two_engines()
    other = conductor(runner, engines)
    other.load_state_dict(saved)
    assert json.loads(json.dumps(other.state_dict())) == saved
    for version in range(3, 20):
        phase = other.phase(version)
        check_groups(phase)
        seen += [group.prompt.id for group in phase.groups]
    open_prompts = {rollout.prompt.id for rollout in other.pool.rollouts.values()}
    assert len(seen) == len(set(seen))
    assert set(seen) | open_prompts == {f"p{i}" for i in range(other.pool.prompts.next)}  # type: ignore[attr-defined]


def test_a_train_budget_leaves_whole_groups_for_the_next_step(runner: asyncio.Runner) -> None:
    c = conductor(runner, two_engines(), token_budget=400)
    first = c.phase(0, train_token_budget=30)
    waiting = [group.id for group in c.pool.scored]
    assert sum(len(r.tokens) for g in first.groups[:-1] for r in g.rollouts) < 30
    assert waiting
    assert c.phase(1, train_token_budget=30).groups[0].id == waiting[0]


def test_a_phase_beyond_its_limit_says_what_it_waited_for(runner: asyncio.Runner) -> None:
    class Silent(ScriptedEngine):
        async def generate(self, requests):  # type: ignore[no-untyped-def, override]
            await asyncio.sleep(60)
            yield []

    c = conductor(runner, ScriptedEngines([Silent("mute", 2)]))
    c.timeout_s = 0.2
    with pytest.raises(TimeoutError, match=r"phase 0 still waits for 24 rollouts on mute"):
        c.phase(0)


def test_the_wait_for_scores_after_the_last_token_is_told(runner: asyncio.Runner) -> None:
    class Slow(ParityRewards):
        async def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
            await asyncio.sleep(0.3)
            return await super().score(rollouts)

    quick, slow = (conductor(runner, two_engines()) for _ in range(2))
    slow.verdicts = Verdicts(Slow())
    assert quick.phase(0).metrics["time/reward_tail_s"] < 0.1
    metrics = slow.phase(0).metrics
    assert 0.2 < metrics["time/reward_tail_s"] <= metrics["time/rollout_s"]


def test_what_is_offered_again_is_judged_by_its_new_tokens(runner: asyncio.Runner) -> None:
    prompt = CountedPrompts().take()[1]
    old, new, other = (Rollout(name, prompt, 0, (7,) * n, (0.0,) * n, (0,) * n) for name, n in (("a", 3), ("a", 4), ("b", 5)))

    async def judged() -> list[Score]:
        verdicts = Verdicts(ParityRewards())
        verdicts.expect([other, old])
        return await verdicts.of([new, other])

    assert [score.value for score in runner.run(judged())] == [0.0, 1.0]


def test_complete_groups_are_scored_before_what_is_scored_ahead(runner: asyncio.Runner) -> None:
    prompt, asked = CountedPrompts().take()[1], []
    a, b, c, d, e = (Rollout(name, prompt, 0, (7,), (0.0,), (0,)) for name in "abcde")

    class Noting(ParityRewards):
        async def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
            asked.append("".join(rollout.id for rollout in rollouts))
            await asyncio.sleep(0.01)
            return await super().score(rollouts)

    async def judged() -> None:
        verdicts = Verdicts(Noting())
        verdicts.expect([a])
        verdicts.expect([b])  # one call at a time
        verdicts.expect([c])
        group = asyncio.create_task(verdicts.of([a, d]))
        await asyncio.sleep(0)
        verdicts.expect([e])
        await group
        await verdicts.of([b, c, e])

    runner.run(judged())
    assert asked == ["a", "d", "bce"]


def test_a_rollout_is_scored_once_and_ahead_of_its_group(runner: asyncio.Runner) -> None:
    asked: list[str] = []
    early: set[str] = set()  # before their groups were complete

    class Noting(ParityRewards):
        async def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
            asked.extend(rollout.id for rollout in rollouts)
            early.update(rollout.id for rollout in rollouts if rollout.id in c.pool.rollouts)
            return await super().score(rollouts)

    c = conductor(runner, two_engines())
    c.verdicts = Verdicts(Noting())
    phases = [c.phase(version) for version in range(10)]
    groups = [group for phase in phases for group in phase.groups]
    for group in groups:
        assert group.rewards == tuple(float(len(rollout.tokens) % 2) for rollout in group.rollouts)
    assert len(asked) == len(set(asked)) and len(early) > len(groups)
    assert set(asked) >= {rollout.id for group in groups for rollout in group.rollouts}


def test_a_wait_for_scores_that_is_given_up_leaves_nothing_behind() -> None:
    """Else a run that ends this way tells of tasks that were destroyed, after the line that says why it ended."""
    prompt, asked = CountedPrompts().take()[1], []
    a, b = (Rollout(name, prompt, 0, (7,), (0.0,), (0,)) for name in "ab")

    class Hanging(ParityRewards):
        async def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
            asked.append("".join(rollout.id for rollout in rollouts))
            await asyncio.sleep(60)
            return []

    async def given_up() -> None:
        verdicts = Verdicts(Hanging())
        group = asyncio.create_task(verdicts.of([a]))
        await asyncio.sleep(0.01)
        verdicts.expect([b])
        group.cancel()
        await asyncio.gather(group, return_exceptions=True)
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(given_up())
    assert asked == ["a"]


def test_what_a_train_budget_leaves_may_be_given_up(runner: asyncio.Runner) -> None:
    c = conductor(runner, two_engines(), token_budget=400)
    phase = c.phase(0, train_token_budget=30, overflow="discard")
    assert phase.metrics["rollout/given_up_groups"] >= 1
    assert not c.pool.scored and not c.pool.state.training_pool


def test_parts_of_groups_train_against_all_that_have_ended(runner: asyncio.Runner) -> None:
    c = conductor(runner, two_engines(), group_release="early")
    rewards: dict[str, list[float]] = {}
    members: dict[str, list[int]] = {}
    parts = 0
    for version in range(30):
        if version == 15:
            c = conductor(runner, two_engines(), saved=json.loads(json.dumps(c.state_dict())), group_release="early")
        for group in c.phase(version).groups:
            name = group.rollouts[0].id.rpartition("#")[0]
            assert sorted(group.earlier_rewards) == sorted(rewards.get(name, []))
            assert len(group.rewards) + len(group.earlier_rewards) > 1
            rewards.setdefault(name, []).extend(group.rewards)
            members.setdefault(name, []).extend(rollout.sample for rollout in group.rollouts)
            parts += group.id != name
    assert parts > 10
    assert all(len(set(samples)) == len(samples) for samples in members.values())
    assert sum(len(samples) == GROUP for samples in members.values()) > len(members) - 12


def test_dynamic_sampling_hands_out_useful_groups_alone(runner: asyncio.Runner) -> None:
    engines = ScriptedEngines(
        [ScriptedEngine("a", prompt_tokens=2, length=lambda name: 3 if "#" in name and name[3] in "13579" else length_of(name))]
    )
    c = conductor(runner, engines, policy="count", groups_per_phase=3, dynamic_sampling=True)
    useless = 0
    for version in range(4):
        phase = c.phase(version)
        assert len(phase.groups) >= 3 and all(len(set(group.rewards)) > 1 for group in phase.groups)
        assert all(len(set(group.rewards)) == 1 for group in phase.useless)
        assert phase.metrics["rollout/useless_groups"] == len(phase.useless)
        useless += len(phase.useless)
    assert useless > 0


def test_the_lengths_that_are_trained_are_held_against_all(runner: asyncio.Runner) -> None:
    c = conductor(runner, two_engines(), policy="count", groups_per_phase=1, unfinished="discard")
    biased = [c.phase(version).metrics for version in range(20)][-1]
    fair = conductor(runner, two_engines(), policy="synchronous")
    unbiased = [fair.phase(version).metrics for version in range(20)][-1]
    assert biased["rollout/length_bias"] < -0.1
    assert abs(unbiased["rollout/length_bias"]) < 0.02
