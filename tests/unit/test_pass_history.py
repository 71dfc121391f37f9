"""The pass history of prompts: what counts, what a checkpoint and a journal bring back, what a run leaves behind."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fakes import ParityRewards, ScriptedEngine, ScriptedEngines

from megatron_rl.config.data import Curriculum, Stage
from megatron_rl.data.history import PassHistory
from megatron_rl.data.stream import PromptStream
from megatron_rl.loops.conductor import Conductor, Phase
from megatron_rl.loops.journal import Journal
from megatron_rl.loops.signals import StopFlag
from megatron_rl.scheduler.c3po_pp import Settings
from megatron_rl.types import Group, Prompt, Rollout, SamplingParams, Score

RIGHT, WRONG, UNREADABLE = Score(1.0, "correct"), Score(0.0, "wrong"), Score(0.0, "unparsable")
LATE, BROKEN = Score(0.0, "timeout"), Score(0.0, "error")


def prompts(count: int, domains: Sequence[str] = ("default",)) -> list[Prompt]:
    return [Prompt(f"p{i}", f"text {i}", (1, 1), "a", "exact", domains[i % len(domains)]) for i in range(count)]


def rows(history: PassHistory, items: Sequence[Prompt], folder: Path) -> dict[str, Any]:
    history.write(folder / "pass_history.jsonl", items)
    lines = (folder / "pass_history.jsonl").read_text().splitlines()
    return {row["id"]: row for row in map(json.loads, lines)}


def test_by_hand(tmp_path: Path) -> None:
    history = PassHistory(4)
    history.record(0, 0, [RIGHT, WRONG, UNREADABLE, LATE, BROKEN])
    history.record(2, 1, [RIGHT, RIGHT])
    history.record(2, 0, [WRONG])  # of an earlier epoch, and ended later
    history.record(2, 1, [WRONG, LATE])  # the rest of a group that was released early
    history.record(3, 5, [LATE, BROKEN])
    assert history.seen == 2
    assert rows(history, prompts(4, ["math", "code"]), tmp_path) == {
        "p0": {
            "id": "p0",
            "domain": "math",
            "pass_rate": 0.3333,
            "samples": 3,
            "correct": 1,
            "latest": {"epoch": 0, "pass_rate": 0.3333, "samples": 3, "correct": 1},
        },
        "p2": {
            "id": "p2",
            "domain": "math",
            "pass_rate": 0.5,
            "samples": 4,
            "correct": 2,
            "latest": {"epoch": 1, "pass_rate": 0.6667, "samples": 3, "correct": 2},
        },
    }
    assert history.outside(0.4, 1.0, since=0).tolist() == [True, False, False, False]
    assert history.outside(0.0, 0.5, since=0).tolist() == [False, False, True, False]
    assert history.outside(1 / 3, 2 / 3, since=0).tolist() == [False] * 4, "both ends are inside"
    assert history.outside(0.4, 0.5, since=1).tolist() == [False, False, True, False]
    assert history.outside(0.4, 0.5, since=2).tolist() == [False] * 4


def test_a_checkpoint_brings_it_back_and_is_small() -> None:
    history = PassHistory(100_000)
    for number in range(0, 100_000, 2):
        history.record(number, number % 7, [RIGHT] * (number % 5) + [WRONG] * 4)
    state = json.loads(json.dumps(history.state_dict()))
    assert len(json.dumps(state)) < 5 * 100_000
    again = PassHistory(100_000)
    again.load_state_dict(state)
    assert again.state_dict() == history.state_dict() and again.seen == 50_000
    again.record(1, 3, [RIGHT])
    assert again.seen == 50_001


def test_a_run_that_judged_nothing_leaves_the_file_of_an_earlier_one_alone(tmp_path: Path) -> None:
    file = tmp_path / "pass_history.jsonl"
    file.write_text("earlier")
    PassHistory(3).write(file, prompts(3))
    assert file.read_text() == "earlier"


def test_a_disk_that_takes_no_more_does_not_hide_how_a_run_ended(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    history = PassHistory(1)
    history.record(0, 0, [RIGHT])
    with pytest.raises(SystemExit) as ended, ExitStack() as stack:
        stack.callback(history.write, tmp_path / "nowhere" / "pass_history.jsonl", prompts(1))
        sys.exit(143)
    assert ended.value.code == 143
    assert "nowhere/pass_history.jsonl: cannot write: No such file" in caplog.text


# In the pool, under everything that happens to groups.

SAMPLING = SamplingParams(max_response_tokens=64)
BASE = {"token_budget": 100, "pool_capacity": 24, "group_size": 4, "retention_bound": 100}
STAGES = (Stage(steps=3, domains=("math",)), Stage(domains=("math", "code")))
CURRICULUM = Curriculum(pass_rate=(0.3, 0.7), revisit=3)


class SometimesLate(ParityRewards):
    """Odd lengths are right, some are judged too late."""

    async def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        scores = await super().score(rollouts)
        return [LATE if len(rollout.tokens) == 7 else score for rollout, score in zip(rollouts, scores, strict=True)]


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


def has_both(group: Group) -> bool:
    return len(set(group.rewards)) > 1


class Run:
    def __init__(self, runner: asyncio.Runner, folder: Path, settings: Settings) -> None:
        self.engine = ScriptedEngine("a", prompt_tokens=2)
        self.stream = PromptStream(prompts(16, ["math", "code"]), 0, stages=STAGES, curriculum=CURRICULUM)
        parts = (ScriptedEngines([self.engine]), SometimesLate(), self.stream, Journal(folder, {}), StopFlag(), runner)
        self.conductor = Conductor(settings, SAMPLING, *parts, timeout_s=20, is_useful=has_both)

    def phases(self, versions: range) -> list[Phase]:
        found = []
        for version in versions:
            self.engine.version = version
            found.append(self.conductor.phase(version, train_token_budget=60))
        return found


@pytest.mark.parametrize("settings", [{}, {"dynamic_sampling": True}, {"group_release": "early"}], ids=str)
def test_every_judgement_counts_once_and_a_journal_brings_all_back(
    runner: asyncio.Runner, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Whether a group trained, was useless to dynamic sampling, was released in parts or waits for its update."""
    first = Run(runner, tmp_path, Settings(**BASE, **settings))
    first.conductor.restarted(0)
    phases = first.phases(range(12))
    if settings.get("dynamic_sampling"):
        assert any(phase.useless for phase in phases)
    if settings.get("group_release"):
        assert any("+" in group.id for phase in phases for group in phase.groups)
    assert LATE in [score for phase in phases for group in phase.groups for score in group.scores]
    metrics = phases[-1].metrics
    assert metrics["data/epoch"] > 2 and metrics["data/stage"] == 1 and max(p.metrics["data/left_out"] for p in phases) > 0

    found = rows(first.stream.history, first.stream.prompts, tmp_path)
    groups = [group for phase in phases for group in (*phase.groups, *phase.useless)] + first.conductor.pool.scored
    judged, correct = (Counter[tuple[str, int]]() for _ in range(2))  # by prompt and epoch
    for group in groups:
        key = group.prompt.id, int(group.id.partition(":")[0])
        judged[key] += sum(score.is_judgement for score in group.scores)
        correct[key] += sum(score.status == "correct" for score in group.scores)
    judged = +judged  # a group that was judged too late in whole is not there
    assert found.keys() == {id for id, _ in judged}
    for id, row in found.items():
        epochs = [epoch for prompt, epoch in judged if prompt == id]
        assert row["latest"]["epoch"] == max(epochs)
        for name, counted in (("samples", judged), ("correct", correct)):
            assert row["latest"][name] == counted[id, max(epochs)]
            assert row[name] == sum(counted[id, epoch] for epoch in epochs)

    again = Run(runner, tmp_path, Settings(**BASE, **settings))
    again.conductor.restarted(0)
    replayed = again.phases(range(12))
    assert not again.engine.served
    assert again.conductor.state_dict() == first.conductor.state_dict()
    keys = [key for key in metrics if key.startswith("data/")]
    assert [[p.metrics[key] for key in keys] for p in replayed] == [[p.metrics[key] for key in keys] for p in phases]


def test_a_checkpoint_in_the_middle_changes_nothing(runner: asyncio.Runner, tmp_path: Path) -> None:
    whole = Run(runner, tmp_path / "whole", Settings(**BASE))
    whole.phases(range(9))
    begun = Run(runner, tmp_path / "begun", Settings(**BASE))
    begun.phases(range(5))
    state = json.loads(json.dumps(begun.conductor.state_dict()))
    resumed = Run(runner, tmp_path / "resumed", Settings(**BASE))
    resumed.conductor.load_state_dict(state)
    resumed.phases(range(5, 9))
    assert json.dumps(resumed.conductor.state_dict()) == json.dumps(whole.conductor.state_dict())
