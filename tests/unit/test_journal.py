"""A restarted conductor keeps what was generated after its checkpoint, wherever the journal was torn."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from disk_limit import files_at_most
from fakes import CountedPrompts, ParityRewards, ScriptedEngine, ScriptedEngines
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.loops.conductor import Conductor, Phase
from megatron_rl.loops.journal import Journal
from megatron_rl.loops.pool import Began, Cut, Entry, Scored, Stopped, Streamed, Taken
from megatron_rl.loops.signals import StopFlag
from megatron_rl.scheduler.c3po_pp import Settings
from megatron_rl.types import Progress, SamplingParams, Score

SETTINGS = Settings(token_budget=100, pool_capacity=24, group_size=4, retention_bound=100)
FINGERPRINT = {"settings": asdict(SETTINGS)}


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


def conductor(runner: asyncio.Runner, folder: Path, settings: Settings = SETTINGS) -> tuple[Conductor, ScriptedEngine]:
    engine = ScriptedEngine("a", prompt_tokens=2)
    parts = (ScriptedEngines([engine]), ParityRewards(), CountedPrompts(), Journal(folder, {}), StopFlag(), runner)
    sampling = SamplingParams(max_response_tokens=64, report_support=True)
    record = {"is_useful": lambda group: True, "record_experts": lambda version: True}
    return Conductor(settings, sampling, *parts, timeout_s=20, **record), engine  # type: ignore[arg-type]


def run(c: Conductor, engine: ScriptedEngine, versions: range) -> list[Phase]:
    phases = []
    for version in versions:
        engine.version = version
        phases.append(c.phase(version, train_token_budget=60))
    return phases


def groups(phases: list[Phase]) -> list[object]:
    return [group for phase in phases for group in phase.groups]


def test_complete_phases_come_back_as_they_were_and_no_engine_is_asked(runner: asyncio.Runner, tmp_path: Path) -> None:
    c, engine = conductor(runner, tmp_path)
    c.restarted(0)
    before = run(c, engine, range(5))
    assert c.pool.scored, "a group has to wait for its update, for the test to see it wait again"

    again, engine = conductor(runner, tmp_path)
    again.restarted(0)
    after = run(again, engine, range(5))
    assert groups(after) == groups(before) and not engine.served
    assert [phase.metrics["rollout/from_journal"] for phase in after] == [1.0] * 5
    assert again.state_dict() == c.state_dict()
    (phase,) = run(again, engine, range(5, 6))
    assert engine.served and phase.metrics["rollout/from_journal"] == 0.0


def test_a_journal_begins_with_its_checkpoint(runner: asyncio.Runner, tmp_path: Path) -> None:
    c, engine = conductor(runner, tmp_path)
    c.restarted(0)
    run(c, engine, range(3))
    saved = c.state_dict()
    c.checkpointed(3)
    assert [path.name for path in tmp_path.iterdir()] == ["step_3.log"]
    before = run(c, engine, range(3, 5))

    again, engine = conductor(runner, tmp_path)
    again.load_state_dict(saved)
    again.restarted(3)
    assert groups(run(again, engine, range(3, 5))) == groups(before) and not engine.served


@pytest.mark.parametrize("share", [0.03, 0.2, 0.5, 0.77, 0.999])
def test_a_journal_torn_anywhere_loses_nothing_and_doubles_nothing(
    runner: asyncio.Runner, tmp_path: Path, caplog: pytest.LogCaptureFixture, share: float
) -> None:
    c, engine = conductor(runner, tmp_path / "before")
    c.restarted(0)
    before = run(c, engine, range(4))
    (tmp_path / "after").mkdir()
    log = shutil.copy(tmp_path / "before/step_0.log", tmp_path / "after/step_0.log")
    size = Path(log).stat().st_size
    with Path(log).open("r+b") as file:
        file.truncate(int(size * share))

    for _ in range(2):  # and killed once more after going on
        again, engine = conductor(runner, tmp_path / "after")
        again.restarted(0)
        after = run(again, engine, range(8))
        kept = sum(phase.metrics["rollout/from_journal"] for phase in after)
        done = [group.id for phase in after for group in phase.groups]
        assert len(done) == len(set(done))
        assert set(done) | {group.id for group in again.pool.scored} | again.pool.state.groups.keys() == {
            f"0:p{number}"
            for number in range(again.pool.prompts.next)  # type: ignore[attr-defined]
        }
        for phase in after:
            for group in phase.groups:
                for rollout in group.rollouts:
                    assert rollout.tokens == tuple(position % 50 for position in range(engine.length(rollout.id)))
                    assert list(rollout.versions) == sorted(rollout.versions)
        whole = int(kept)
        assert groups(after[:whole])[: len(groups(before[:whole]))] == groups(before[: min(whole, 4)])
    assert kept == 8


def test_a_torn_tail_is_cut_off_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(tmp_path, {})
    assert journal.reopen(0, FINGERPRINT) == []
    entries: list[Entry] = [Began(0), Taken(1), Began(1)]
    for entry in entries:
        journal.append(entry)
    for damage in (b"\x07", b"\xff" * 100):
        with (tmp_path / "step_0.log").open("ab") as file:
            file.write(damage)
        caplog.clear()
        assert Journal(tmp_path, {}).reopen(0, FINGERPRINT) == entries
    assert "ends in a torn record" in caplog.text
    assert Journal(tmp_path, {}).reopen(0, FINGERPRINT) == entries


def test_other_settings_leave_it_out_in_one_line(runner: asyncio.Runner, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    c, engine = conductor(runner, tmp_path)
    c.restarted(0)
    run(c, engine, range(2))
    other, engine = conductor(runner, tmp_path, Settings(token_budget=200, pool_capacity=24, group_size=4, retention_bound=100))
    with caplog.at_level(logging.WARNING):
        other.restarted(0)
    assert caplog.messages == [f"{tmp_path / 'step_0.log'} was written under other settings: what it holds is generated again"]
    assert run(other, engine, range(1)) and engine.served


def test_a_full_disk_ends_the_journal_and_not_the_run(
    runner: asyncio.Runner, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    c, engine = conductor(runner, tmp_path)
    c.restarted(0)
    with files_at_most(5000):
        run(c, engine, range(4))
    assert len([message for message in caplog.messages if "A killed run will generate again" in message]) == 1
    again, engine = conductor(runner, tmp_path)
    again.restarted(0)
    assert groups(run(again, engine, range(4)))


NAMES = st.text(min_size=1, max_size=8)
MESSAGES = st.integers(0, 5).flatmap(
    lambda count: st.builds(
        Progress,
        NAMES,
        st.tuples(*[st.integers(0, 200_000)] * count),
        st.tuples(*[st.floats(allow_nan=False, max_value=0)] * count),
        st.tuples(*[st.integers(0, 10_000)] * count),
        st.sampled_from([None, "stop", "length"]),
        st.binary(max_size=6),
        st.tuples(*[st.binary(max_size=3)] * count) | st.just(()),
    )
)
ENTRIES = st.one_of(
    st.builds(Began, st.integers(0, 9)),
    st.builds(Streamed, st.lists(MESSAGES, max_size=4).map(tuple)),
    st.builds(Cut, st.lists(NAMES)),
    st.builds(Scored, NAMES, st.lists(st.builds(Score, st.floats(0, 1), st.just("correct"), st.none() | NAMES)).map(tuple)),
    st.builds(Stopped),
    st.builds(Taken, st.integers(0, 9)),
)


@settings(deadline=None)
@given(entries=st.lists(ENTRIES))
def test_entries_come_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, entries: list[Entry]) -> None:
    folder = tmp_path_factory.mktemp("journal")
    journal = Journal(folder, {})
    journal.begin(4, FINGERPRINT)
    for entry in entries:
        journal.append(entry)
    journal.sync()
    assert Journal(folder, {}).reopen(4, FINGERPRINT) == entries
