"""Invariants of megatron_rl/data/stream.py: stages, curriculum, and what a resumed stream goes on with."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.config import UserError
from megatron_rl.config.data import Curriculum, Stage
from megatron_rl.data.order import shuffled
from megatron_rl.data.stages import stage_at
from megatron_rl.data.stream import PromptStream
from megatron_rl.types import Prompt, Score

DOMAINS = ("math", "code", "science")
STAGES = (Stage(steps=2, domains=("math",)), Stage(steps=1), Stage(steps=3, domains=("code", "science")), Stage(domains=("math",)))
SCORES = {"right": Score(1.0, "correct"), "wrong": Score(0.0, "wrong"), "late": Score(0.0, "timeout")}


def prompts(count: int, domains: Sequence[str] = ("default",)) -> list[Prompt]:
    return [Prompt(f"p:{i}", str(i), (i,), str(i), "exact", domains[i % len(domains)]) for i in range(count)]


def judge(stream: PromptStream, group_id: str, *names: str) -> None:
    stream.judged(group_id, [SCORES[name] for name in names])


def take(stream: PromptStream, count: int) -> list[str]:
    return [stream.take()[0] for _ in range(count)]


def test_an_order_depends_on_seed_epoch_and_ids_alone() -> None:
    def order(items: list[Prompt], seed: int, takes: int) -> list[str]:
        stream = PromptStream(items, seed)
        return [stream.take()[1].id for _ in range(takes)]

    items = prompts(20)
    both = order(items, 0, 40)
    assert both == order(items[::-1], 0, 40)
    assert both[:20] != both[20:]
    assert both[:20] != order(items, 1, 20)
    assert both[:20] != [p.id for p in items]
    assert shuffled(["a", "b", "c", "d", "e"], 0, 0) == [1, 0, 2, 3, 4]  # pinned: old checkpoints rely on it


def test_without_shuffle_the_file_order_stays() -> None:
    stream = PromptStream(prompts(11)[::-1], seed=0, shuffle=False)
    assert [stream.take()[0] for _ in range(12)] == [*(f"0:p:{i}" for i in range(10, -1, -1)), "1:p:10"]


def test_a_group_that_was_not_taken_cannot_come_back() -> None:
    stream = PromptStream(prompts(3), seed=0)
    taken, _ = stream.take()
    stream.give_back(taken)
    rest = sorted({f"0:p:{i}" for i in range(3)} - {taken})
    for group_id in (taken, rest[0], rest[1], "0:p:9", "7:p:1", "nonsense"):
        with pytest.raises(ValueError, match="not taken"):
            stream.give_back(group_id)
    assert stream.take()[0] == taken


def test_a_stream_goes_on_only_over_what_it_was_saved_with() -> None:
    state = PromptStream(prompts(5), seed=0).state_dict()
    with pytest.raises(UserError, match=r"data\.train.*not those of the checkpoint"):
        PromptStream(prompts(6), seed=0).load_state_dict(state)
    with pytest.raises(UserError, match=r"run\.seed=1"):
        PromptStream(prompts(5), seed=1).load_state_dict(state)
    with pytest.raises(UserError, match=r"data\.shuffle=False"):
        PromptStream(prompts(5), seed=0, shuffle=False).load_state_dict(state)


# Stages.


def test_the_stage_in_force_depends_on_the_version_alone() -> None:
    assert [stage_at(STAGES, version) for version in range(9)] == [0, 0, 1, 2, 2, 2, 3, 3, 3]
    closed = (Stage(steps=2), Stage(steps=1))
    assert [stage_at(closed, version) for version in range(5)] == [0, 0, 1, 1, 1]


def test_a_stage_starts_with_an_epoch_of_its_own() -> None:
    stream = PromptStream(prompts(9, DOMAINS), seed=0, stages=STAGES)
    seen = []
    for version, takes in enumerate((2, 2, 4, 6, 2, 1, 4)):
        stream.begin(version)
        seen.append([stream.take() for _ in range(takes)])
        stream.begin(version)  # the same phase goes on
    epochs = [sorted({int(group_id.partition(":")[0]) for group_id, _ in phase}) for phase in seen]
    assert epochs == [[0], [0, 1], [2], [3], [4], [4], [5, 6]], "three maths prompts an epoch, nine, six, three"
    assert {prompt.domain for _, prompt in seen[0] + seen[1] + seen[6]} == {"math"}
    assert {prompt.domain for phase in seen[3:6] for _, prompt in phase} == {"code", "science"}
    assert stream.metrics()["data/stage"] == 3.0


def test_a_group_of_a_former_stage_is_not_offered_again() -> None:
    """Not even where the present stage has its domain: it has another group of the prompt."""
    stream = PromptStream(prompts(3, DOMAINS), seed=0, stages=[Stage(steps=1, domains=("math",)), Stage()])
    early, _ = stream.take()
    late, _ = stream.take()
    stream.give_back(early)
    stream.begin(1)
    stream.give_back(late)
    offered = [stream.take() for _ in range(3)]
    assert {group_id.partition(":")[0] for group_id, _ in offered} == {"2"}
    assert {prompt.domain for _, prompt in offered} == set(DOMAINS)


def test_a_domain_that_no_prompt_has_is_refused_with_those_there_are() -> None:
    words = r"data\.stages\.1\.domains: no prompt is of domain 'sciense'; there are code, math, science$"
    with pytest.raises(UserError, match=words):
        PromptStream(prompts(3, DOMAINS), 0, stages=[Stage(steps=1), Stage(domains=("code", "sciense"))])


def test_other_domains_for_the_stage_of_a_checkpoint_begin_in_the_next_phase() -> None:
    stream = PromptStream(prompts(9, DOMAINS), seed=0, stages=[Stage(domains=("math",))])
    stream.take()
    again = PromptStream(prompts(9, DOMAINS), seed=0, stages=[Stage(domains=("code",))])
    again.load_state_dict(stream.state_dict())
    again.begin(1)
    group_id, prompt = again.take()
    assert group_id.startswith("1:") and prompt.domain == "code"


# Curriculum.

BAND = Curriculum(pass_rate=(0.25, 0.75), revisit=3)


def test_prompts_outside_the_band_rest_until_their_time_comes() -> None:
    stream = PromptStream(prompts(6), seed=0, curriculum=BAND)
    assert sorted(take(stream, 6)) == [f"0:p:{i}" for i in range(6)]
    judge(stream, "0:p:0", "right", "right")
    judge(stream, "0:p:1", "wrong", "wrong")
    judge(stream, "0:p:2", "right", "wrong")
    judge(stream, "0:p:3", "right", "wrong", "wrong", "wrong")  # at the edge, which is inside
    judge(stream, "0:p:4", "late", "late")  # no judgement
    for epoch in (1, 2):
        assert sorted(take(stream, 4)) == [f"{epoch}:p:{i}" for i in (2, 3, 4, 5)]
        assert stream.metrics() == {"data/epoch": epoch, "data/prompts_seen_fraction": 4 / 6, "data/left_out": 2.0}
    assert sorted(take(stream, 6)) == [f"3:p:{i}" for i in range(6)]
    assert stream.metrics()["data/left_out"] == 0.0


def test_the_latest_group_decides_and_an_epoch_is_made_when_it_starts() -> None:
    stream = PromptStream(prompts(2), seed=0, curriculum=BAND)
    take(stream, 3)  # epoch 1 has started
    judge(stream, "0:p:0", "right", "right")
    judge(stream, "0:p:1", "right", "right")
    assert stream.metrics()["data/left_out"] == 0.0
    take(stream, 1)
    judge(stream, "1:p:1", "right", "wrong")
    assert take(stream, 1) == ["2:p:1"], "p:0 was solved by its latest group, p:1 not always"
    assert sorted(take(stream, 2)) == ["3:p:0", "3:p:1"]


def test_an_epoch_that_would_be_empty_offers_all_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    stream = PromptStream(prompts(2), seed=0, curriculum=BAND)
    for group_id in take(stream, 2):
        judge(stream, group_id, "wrong")
    with caplog.at_level(logging.WARNING):
        assert sorted(take(stream, 2)) == ["1:p:0", "1:p:1"]
    assert caplog.messages == ["data.curriculum: epoch 1 would be empty; it offers all prompts of the stage"]


# All of it at once.


class Expected:
    """What a stream has to be made of, told in sets."""

    def __init__(self, items: list[Prompt], stages: Sequence[Stage], curriculum: Curriculum | None) -> None:
        self.items, self.stages, self.curriculum = items, stages, curriculum
        self.latest: dict[str, tuple[int, list[str]]] = {}  # prompt -> (epoch, judgements)
        self.offered: dict[int, list[str]] = {-1: []}  # for the first time
        self.members: dict[int, set[str]] = {-1: set()}
        self.returned: list[str] = []
        self.stage_epoch = 0
        self.start_epoch(0)

    def start_epoch(self, version: int) -> None:
        self.stage = stage_at(self.stages, version)
        domains = self.stages[self.stage].domains
        everything = {item.id for item in self.items if domains is None or item.domain in domains}
        epoch = max(self.members) + 1
        self.members[epoch] = {id for id in everything if not self.rests(id, epoch)} or everything
        self.offered[epoch] = []

    def rests(self, id: str, epoch: int) -> bool:
        if self.curriculum is None or id not in self.latest:
            return False
        last, judgements = self.latest[id]
        low, high = self.curriculum.pass_rate
        return epoch < last + self.curriculum.revisit and not low <= judgements.count("right") / len(judgements) <= high

    def begin(self, version: int) -> None:
        if stage_at(self.stages, version) != self.stage:
            self.returned.clear()
            self.stage_epoch = max(self.members) + 1
            self.start_epoch(version)

    def take(self, group_id: str, version: int) -> None:
        if self.returned:
            assert group_id == self.returned.pop(0)
            return
        epoch = max(self.members)
        if len(self.offered[epoch]) == len(self.members[epoch]):
            assert set(self.offered[epoch]) == self.members[epoch], "each once"
            self.start_epoch(version)
            epoch += 1
        at, _, id = group_id.partition(":")
        assert int(at) == epoch and id in self.members[epoch] - set(self.offered[epoch])
        self.offered[epoch].append(id)

    def judged(self, group_id: str, names: Sequence[str]) -> None:
        judgements = [name for name in names if name != "late"]
        at, _, id = group_id.partition(":")
        last, before = self.latest.get(id, (-1, []))
        if judgements and int(at) >= last:
            self.latest[id] = (int(at), judgements + (before if int(at) == last else []))


MOVES = st.one_of(
    st.just(("take",)),
    st.just(("take",)),
    st.tuples(st.just("judged"), st.integers(0, 50), st.lists(st.sampled_from(sorted(SCORES)), min_size=1, max_size=4)),
    st.tuples(st.just("give_back"), st.integers(0, 50)),
    st.just(("begin",)),
    st.just(("reload",)),
)


@given(
    count=st.integers(3, 9),
    seed=st.integers(0, 3),
    stages=st.sampled_from([STAGES, (Stage(),), (Stage(steps=3), Stage(domains=("code",)))]),
    curriculum=st.sampled_from([None, BAND, Curriculum(pass_rate=(0.0, 0.9), revisit=2)]),
    moves=st.lists(MOVES, max_size=120),
)
@settings(max_examples=200, deadline=None)
def test_whatever_happens_to_a_stream(
    count: int, seed: int, stages: Sequence[Stage], curriculum: Curriculum | None, moves: list[tuple[Any, ...]]
) -> None:
    """Groups are unique, stages and epochs are made of what they should be, and a stream that is saved and loaded all the time goes
    on like its twin that is not."""
    items = prompts(count, DOMAINS)
    stream, twin = (PromptStream(items, seed, stages=stages, curriculum=curriculum) for _ in range(2))
    expected, version, held = Expected(items, stages, curriculum), 0, list[str]()
    for move, *values in moves:
        if move == "take":
            group_id, prompt = stream.take()
            assert (group_id, prompt) == twin.take() and group_id.partition(":")[2] == prompt.id
            expected.take(group_id, version)
            assert group_id not in held
            held.append(group_id)
        elif move == "judged" and held:
            group_id = held[values[0] % len(held)]
            for each in (stream, twin):
                judge(each, group_id, *values[1])
            expected.judged(group_id, values[1])
        elif move == "give_back" and held:
            group_id = held.pop(values[0] % len(held))
            for each in (stream, twin):
                each.give_back(group_id)
            if int(group_id.partition(":")[0]) >= expected.stage_epoch:
                expected.returned.append(group_id)
        elif move == "begin":
            version += 1
            for each in (stream, twin):
                each.begin(version)
            expected.begin(version)
        elif move == "reload":
            state = json.loads(json.dumps(stream.state_dict()))
            stream = PromptStream(items[::-1], seed, stages=stages, curriculum=curriculum)  # the file may be in another order
            stream.load_state_dict(state)
        assert stream.metrics() == twin.metrics()
    assert json.dumps(stream.state_dict()) == json.dumps(twin.state_dict())
