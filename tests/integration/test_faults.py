"""Faults of real servers in the middle of a phase: the phase ends on its budget, what was streamed is kept and nothing else, every
group is handed out once, and each fault is one line of the log.

Two SGLang servers under a real conductor; the second is met through a proxy that can be late, break, garble and swallow. The pool
is carried from test to test, and the servers are stopped and killed last.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from fakes import CountedPrompts, ParityRewards
from tcp_proxy import TcpProxy
from tiny_checkpoint import TINY_CONFIG, manifest_of, random_weights, write_checkpoint

from megatron_rl.config.rollout import EngineConfig
from megatron_rl.engine.client import SglangEngine
from megatron_rl.engine.launcher import SglangEngines
from megatron_rl.engine.process import free_ports, is_port_free
from megatron_rl.engine.weights import EngineWeights
from megatron_rl.loops.conductor import Conductor, Phase
from megatron_rl.loops.journal import Journal
from megatron_rl.loops.signals import StopFlag
from megatron_rl.scheduler.messages import Settings
from megatron_rl.types import GenerateRequest, Progress, SamplingParams

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(300)]
HOST, KEY, STALL_S, STREAM_INTERVAL = "127.0.0.1", "secret", 3.0, 4
GROUP, POOL, BUDGET, LONGEST = 4, 32, 2_000, 300  # a random model of 64 tokens ends after 64 on average
PATIENCE_S = 40.0  # of a slow machine
FIRST, SECOND = "engine_0", "engine_1"


@dataclass(frozen=True)
class Fault:
    """Done to `engine` once it has streamed 100 tokens of a phase. The other one's tokens beyond a quarter of the budget are
    not read until the fault `shows`: however fast it is, the phase does not end before."""

    engine: str
    do: Callable[[], None] = lambda: None
    shows: Callable[[], bool] = lambda: True


class Recorder:
    """An engine, and what it streamed. A request must go on exactly from there."""

    def __init__(self, engine: SglangEngine, fleet: Fleet) -> None:
        self.engine, self.fleet, self.name = engine, fleet, engine.name

    async def generate(self, requests: Sequence[GenerateRequest]) -> AsyncIterator[Sequence[Progress]]:
        fleet = self.fleet
        for request in requests:
            assert request.tokens == (1, 1, *fleet.streamed[request.rollout_id]), "a gap, or a token twice"
        async for messages in self.engine.generate(requests):
            for message in messages:
                fleet.streamed[message.rollout_id] += message.tokens
                fleet.tokens[self.name] += len(message.tokens)
            yield messages
            if fleet.fault and not fleet.fault_done and self.name == fleet.fault.engine and fleet.tokens[self.name] >= 100:
                fleet.fault.do()
                fleet.fault_done = True
            while fleet.holds_back(self.name):
                await asyncio.sleep(0.01)

    async def abort(self, rollout_ids: Iterable[str] | None = None) -> None:
        await self.engine.abort(rollout_ids)


class Fleet:
    """The launcher's servers; the second by way of the proxy while there is one."""

    def __init__(self, servers: SglangEngines, run_dir: Path) -> None:
        self.servers = servers
        self.proxy: TcpProxy | None = None
        self.streamed: dict[str, tuple[int, ...]] = defaultdict(tuple)
        self.tokens: dict[str, int] = defaultdict(int)  # of the present phase, by engine
        self.fault: Fault | None = None  # of the present phase
        self.fault_done = False
        self._run_dir = run_dir
        self._through: SglangEngine | None = None

    def put_proxy(self, port: int) -> TcpProxy:
        """In front of the second engine: a client that has met no fault yet."""
        self.remove_proxy()
        self.proxy = TcpProxy((HOST, port))
        self._through = SglangEngine(SECOND, HOST, self.proxy.port, KEY, TINY_CONFIG["vocab_size"], 60.0, STALL_S)
        return self.proxy

    def remove_proxy(self) -> None:
        if self.proxy:
            self.proxy.close()
        self.proxy = self._through = None

    @property
    def alive(self) -> list[Recorder]:
        engines = [self._through if self._through and e.name == SECOND else e for e in self.servers.alive]
        return [Recorder(engine, self) for engine in engines if engine.lost is None]

    def holds_back(self, name: str) -> bool:
        waits = self.fault is not None and not (self.fault_done and self.fault.shows())
        return waits and name != self.fault.engine and self.tokens[name] >= BUDGET / 4

    def is_lost(self, name: str) -> bool:
        return name not in {engine.name for engine in self.alive}

    def processes(self, name: str) -> list[psutil.Process]:
        """The HTTP server, then its scheduler."""
        log = self._run_dir / "engines" / f"{name}.log"
        ours = psutil.Process().children(recursive=True)
        return [p for p in ours if Path(f"/proc/{p.pid}/fd/1").readlink() == log]


@pytest.fixture(scope="module")
def port() -> int:
    """Of the first engine; the second has the next."""
    return next(port for port in free_ports(HOST, 50) if is_port_free(HOST, port + 1))


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, port: int) -> Iterator[Fleet]:
    run_dir = tmp_path_factory.mktemp("engines")
    config = EngineConfig(
        device="cpu",
        count=2,
        port=port,
        api_key=KEY,
        max_total_tokens=16_384,
        stream_interval=STREAM_INTERVAL,
        stall_timeout_s=STALL_S,
    )
    servers = SglangEngines(config, str(write_checkpoint(run_dir / "hf")), run_dir, context_length=512, seed=0)
    try:
        servers.start()
        yield Fleet(servers, run_dir)
    finally:
        servers.stop()


@pytest.fixture(scope="module")
def conductor(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Conductor]:
    settings = Settings(token_budget=BUDGET, pool_capacity=POOL, group_size=GROUP, retention_bound=100)
    sampling = SamplingParams(max_response_tokens=LONGEST, stop_token_ids=(TINY_CONFIG["eos_token_id"],))
    with asyncio.Runner() as runner:
        journal = Journal(tmp_path_factory.mktemp("journal"), {})
        yield Conductor(
            settings, sampling, fleet, ParityRewards(), CountedPrompts(), journal, StopFlag(), runner, 60, lambda group: True
        )  # type: ignore[arg-type]


class Story:
    """The phases so far, and the checks that hold after each."""

    def __init__(self, fleet: Fleet, conductor: Conductor) -> None:
        self.fleet, self.conductor = fleet, conductor
        self.version = -1
        self.trained: list[str] = []

    def push(self) -> None:
        weights = list(random_weights(TINY_CONFIG, seed=self.version).items())
        sink = EngineWeights(self.fleet.servers)
        sink.begin(manifest_of(weights))
        sink.send(weights)
        sink.end(self.version)

    def phase(self, fault: Fault) -> Phase:
        self.version += 1
        self.fleet.tokens.clear()
        self.fleet.fault, self.fleet.fault_done = fault, False
        self.push()
        return self.go_on()

    def go_on(self) -> Phase:
        phase = self.conductor.phase(self.version)
        assert self.fleet.fault_done, "it never came to the fault"
        if phase.status == "done":
            assert phase.metrics["rollout/generated_tokens"] == sum(self.fleet.tokens.values())
            self.check(phase)
        return phase

    def check(self, phase: Phase) -> None:
        assert phase.metrics["rollout/generated_tokens"] >= BUDGET  # by how much more depends on the machine
        self.trained += [group.id for group in phase.groups]
        assert phase.groups and len(self.trained) == len(set(self.trained))
        for group in phase.groups:
            for rollout in group.rollouts:
                assert rollout.tokens == self.fleet.streamed[rollout.id]
                assert rollout.finish_reason == ("stop" if rollout.tokens[-1] == TINY_CONFIG["eos_token_id"] else "length")
                assert rollout.finish_reason == "stop" or len(rollout.tokens) == LONGEST
                assert list(rollout.versions) == sorted(rollout.versions) and set(rollout.versions) <= set(range(self.version + 1))
        state = json.loads(json.dumps(self.conductor.state_dict()))
        carried = {rollout["id"]: tuple(rollout["tokens"]) for rollout in state["rollouts"]}
        assert carried == {name: self.fleet.streamed[name] for name in carried}
        open_groups = {name.rpartition("#")[0] for name in carried}
        assert len(self.trained) + len(open_groups | {g["id"] for g in state["scored"]}) == state["prompts"]["next"]


@pytest.fixture(scope="module")
def story(fleet: Fleet, conductor: Conductor) -> Story:
    return Story(fleet, conductor)


def warnings(log: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in log.records if record.levelno >= logging.WARNING]


def test_without_a_fault_there_is_no_line(story: Story, caplog: pytest.LogCaptureFixture) -> None:
    assert story.phase(Fault(SECOND)).status == "done"
    assert warnings(caplog) == []


def test_answers_that_are_late_are_waited_for(story: Story, port: int, caplog: pytest.LogCaptureFixture) -> None:
    proxy = story.fleet.put_proxy(port + 1)

    def delay() -> None:
        proxy.delay_s = STALL_S / 6

    assert story.phase(Fault(SECOND, delay)).status == "done"
    assert warnings(caplog) == []


@pytest.mark.parametrize(("instead", "cause"), [(b"?", " sent garbage"), (b"[?", ": the connection broke")], ids=["json", "chunks"])
def test_garbage_in_the_stream_loses_the_engine(
    story: Story, port: int, caplog: pytest.LogCaptureFixture, instead: bytes, cause: str
) -> None:
    """A byte of another value, and one too many: the chunks of the answer no longer fit their lengths."""
    proxy = story.fleet.put_proxy(port + 1)

    def garble() -> None:
        proxy.garble = (b'"output_ids":[', b'"output_ids":' + instead)

    assert story.phase(Fault(SECOND, garble)).status == "done"
    [line] = warnings(caplog)
    assert line.startswith(f"{SECOND} ({HOST}:{proxy.port}): /generate{cause}") and line.endswith("rollouts go on elsewhere")


def test_a_broken_connection_loses_the_engine(story: Story, port: int, caplog: pytest.LogCaptureFixture) -> None:
    proxy = story.fleet.put_proxy(port + 1)
    assert story.phase(Fault(SECOND, proxy.cut)).status == "done"
    [line] = warnings(caplog)
    assert line.startswith(f"{SECOND} ({HOST}:{proxy.port}): /generate: the connection broke; its ")


def test_an_abort_without_an_answer_ends_within_its_limit(story: Story, port: int, caplog: pytest.LogCaptureFixture) -> None:
    proxy = story.fleet.put_proxy(port + 1)
    started = time.monotonic()
    assert story.phase(Fault(SECOND, lambda: proxy.swallows.add(b"POST /abort_request"))).status == "done"
    assert STALL_S < time.monotonic() - started < STALL_S + PATIENCE_S
    [line] = warnings(caplog)
    assert line.startswith(f"{SECOND} ({HOST}:{proxy.port}): /abort_request was not answered for engine.stall_timeout_s=3; its ")


def test_a_server_that_stands_still(story: Story, caplog: pytest.LogCaptureFixture) -> None:
    """All its processes: it accepts connections and never answers. The other ends the phase alone."""
    story.fleet.remove_proxy()
    group = os.getpgid(story.fleet.processes(SECOND)[0].pid)
    started = time.monotonic()
    fault = Fault(SECOND, lambda: os.killpg(group, signal.SIGSTOP), lambda: story.fleet.is_lost(SECOND))
    assert story.phase(fault).status == "done"
    assert 2 * STALL_S < time.monotonic() - started < 2 * STALL_S + PATIENCE_S
    [line] = warnings(caplog)
    assert re.match(
        rf"{SECOND} \({HOST}:\d+\): wedged: it sent nothing for engine.stall_timeout_s=3, .*; its \d+ rollouts go on", line
    )
    assert [engine.name for engine in story.fleet.alive] == [FIRST]


def test_a_killed_server_was_the_last_and_both_come_back(story: Story, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    server = story.fleet.processes(FIRST)[0]
    assert story.phase(Fault(FIRST, server.kill)).status == "no_engine"
    [line] = warnings(caplog)
    assert re.match(rf"{FIRST} \({HOST}:\d+\): /generate: the connection broke; its \d+ rollouts go on", line)
    assert story.fleet.servers.recover() == [FIRST, SECOND]
    story.fleet.fault, story.fleet.fault_done = Fault(SECOND), False
    story.push()
    assert story.go_on().status == "done"
    assert warnings(caplog) == [line]


@pytest.mark.slow
def test_a_scheduler_that_stands_still_behind_its_server(story: Story, caplog: pytest.LogCaptureFixture) -> None:
    """The HTTP server goes on answering, an abort among others."""
    scheduler = story.fleet.processes(SECOND)[1]
    assert story.phase(Fault(SECOND, scheduler.suspend, lambda: story.fleet.is_lost(SECOND))).status == "done"
    [line] = warnings(caplog)
    assert line.startswith(f"{SECOND} ({HOST}:") and ": wedged: it sent nothing for" in line
    assert story.fleet.servers.recover() == [SECOND]
    assert story.phase(Fault(SECOND)).status == "done"
