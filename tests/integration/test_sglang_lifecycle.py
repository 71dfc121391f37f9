"""A server's processes never outlive what they belong to, and a dead server comes back.

The trainer is a script of its own here, so that it can be killed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny_checkpoint import write_checkpoint

from megatron_rl.config import UserError
from megatron_rl.config.rollout import EngineConfig
from megatron_rl.engine.launcher import SglangEngines
from megatron_rl.types import EngineLost

pytestmark = pytest.mark.sglang

TRAINER = """
import asyncio, json, sys
from pathlib import Path
import psutil
from megatron_rl.config.rollout import EngineConfig
from megatron_rl.engine.launcher import SglangEngines
from megatron_rl.engine.weights import EngineWeights
from megatron_rl.types import EngineLost, GenerateRequest, SamplingParams
from tiny_checkpoint import TINY_CONFIG, manifest_of, random_weights

def say(**what):
    print(json.dumps(what), flush=True)

model, run_dir = sys.argv[1:]
engines = SglangEngines(EngineConfig(device="cpu", max_total_tokens=4096), model, Path(run_dir), 256, 0)
say(processes=[])
engines.start()

def push(version):
    weights = list(random_weights(TINY_CONFIG, seed=1).items())
    sink = EngineWeights(engines)
    sink.begin(manifest_of(weights))
    sink.send(weights)
    sink.end(version)

async def stream():
    tokens = 0
    async for messages in engines.alive[0].generate([GenerateRequest("0:a#0", (3, 4), 240, SamplingParams(temperature=0.0))]):
        if not tokens:
            say(processes=[p.pid for p in psutil.Process().children(recursive=True)])
        tokens += sum(len(message.tokens) for message in messages)
    return tokens

push(1)
while True:
    try:
        say(tokens=asyncio.run(stream()))
    except EngineLost as error:
        say(lost=str(error), alive=len(engines.alive))
        say(recovered=engines.recover(), alive=len(engines.alive))
        push(2)
    sys.stdin.readline()
"""


class Trainer:
    def __init__(self, path: Path, support: Path) -> None:
        script = path / "trainer.py"
        script.write_text(TRAINER)
        self.log = path / "run" / "engines" / "engine_0.log"
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(script), str(write_checkpoint(path / "hf")), str(path / "run")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(support)},
        )
        self.pid = self._process.pid

    def said(self, key: str) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if key in (message := json.loads(line)):
                return message[key]
        raise AssertionError(f"the trainer ended with {self._process.wait()} before it said {key!r}")

    def go_on(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture
def trainer(tmp_path: Path, repo_root: Path) -> Iterator[Trainer]:
    trainer = Trainer(tmp_path, repo_root / "tests" / "support")
    yield trainer
    trainer.kill()


def eventually(condition: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def servers_of(log: Path) -> list[int]:
    """Every process that writes to this log, whoever its parent is by now."""
    found = []
    for process in psutil.process_iter():
        try:
            if Path(f"/proc/{process.pid}/fd/1").readlink() == log:
                found.append(process.pid)
        except OSError:
            continue
    return found


def test_a_killed_server_is_lost_leaves_nothing_and_comes_back(trainer: Trainer) -> None:
    processes = trainer.said("processes") or trainer.said("processes")
    assert len(processes) >= 2  # the HTTP server and the scheduler at least
    server = processes[0]
    assert psutil.Process(server).ppid() == trainer.pid
    os.kill(server, signal.SIGKILL)  # in the middle of a generation
    assert trainer.said("lost").startswith("engine_0 (127.0.0.1:")
    assert eventually(lambda: all(is_gone(pid) for pid in processes))
    assert trainer.said("recovered") == ["engine_0"]

    trainer.go_on()
    processes = trainer.said("processes")
    assert trainer.said("tokens") == 240
    trainer.kill()  # SIGKILL: no clean-up of its own
    assert eventually(lambda: all(is_gone(pid) for pid in processes) and not servers_of(trainer.log))


def test_servers_that_still_start_die_with_the_trainer(trainer: Trainer) -> None:
    assert trainer.said("processes") == []
    assert eventually(lambda: len(servers_of(trainer.log)) > 1, timeout_s=60)  # SGLang has begun to start its children
    trainer.kill()
    assert eventually(lambda: not servers_of(trainer.log))


def test_a_server_that_fails_to_start_is_reported_with_its_last_words(tmp_path: Path) -> None:
    config = EngineConfig(device="cpu", max_restarts=0, server_args={"no_such_flag": 1})
    engines = SglangEngines(config, str(write_checkpoint(tmp_path / "hf")), tmp_path, 256, 0)
    with pytest.raises(EngineLost, match=r"(?s)engine_0 ended with 2 as it started; last words:.*--no-such-flag=1"):
        engines.start()
    assert servers_of(tmp_path / "engines" / "engine_0.log") == [] and engines.alive == []
    with pytest.raises(EngineLost, match=r"engine_0 died, and engine\.max_restarts=0"):
        engines.recover()


def test_a_stop_ends_a_start_that_is_going_on(tmp_path: Path) -> None:
    path, config = write_checkpoint(tmp_path / "hf"), EngineConfig(device="cpu", count=2)
    engines = SglangEngines(config, str(path), tmp_path, 256, 0, stop_requested=lambda: True)
    with pytest.raises(UserError, match="stopped while engines started: the same command goes on"):
        engines.start()
    assert engines.alive == []
    assert not any(servers_of(tmp_path / "engines" / f"engine_{index}.log") for index in range(2))
