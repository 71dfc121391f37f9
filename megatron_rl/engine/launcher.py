"""The fleet of SGLang servers of one run: starts them, watches them, brings dead ones back, ends them.

Invariants: `start` returns when every server has generated a token; a server that fails to start is reported with its own last
words, and no server is left running then; whatever is not `alive` comes back with `recover`, up to `engine.max_restarts` times in
a run.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_rl.config.errors import UserError
from megatron_rl.config.rollout import EngineConfig
from megatron_rl.engine import server
from megatron_rl.engine.arguments import server_arguments, server_environment
from megatron_rl.engine.client import SglangEngine
from megatron_rl.engine.process import ServerProcess, free_ports, is_port_free
from megatron_rl.types import EngineLost, RoutingShape

log = logging.getLogger(__name__)
POLL_S = 0.1
PROGRESS_S = 10.0  # between two lines that say what we wait for
START_ATTEMPTS = 3
STOPPED = 128 + signal.SIGTERM  # exit status
WEIGHTS, OTHERS = "weights", ("kv_cache", "cuda_graph")  # what SGLang can put to sleep (srt/constants.py)


class StartFailed(EngineLost):
    def __init__(self, message: str, by_signal: bool = False) -> None:
        super().__init__(message)
        self.by_signal = by_signal  # somebody killed it: it may well start the next time


class SglangEngines:
    """Implements `ports.Engines`. With `routing` the servers record experts, for requests that ask for them; `stop_requested` ends
    a start that is going on."""

    def __init__(
        self,
        config: EngineConfig,
        model_path: str,
        run_dir: Path,
        context_length: int,
        seed: int,
        routing: RoutingShape | None = None,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        if routing:
            config = config.model_copy(update={"server_args": {"enable_return_routed_experts": True} | config.server_args})
        self._config, self._model_path, self._run_dir, self._routing = config, model_path, run_dir, routing
        self._context_length, self._seed, self._stop_requested = context_length, seed, stop_requested
        self._device = _resolve(config.device)
        self._api_key = config.api_key or secrets.token_hex(16)
        self._vocab_size = _vocab_size(model_path)
        self._servers: dict[str, tuple[ServerProcess, SglangEngine]] = {}
        self._restarts = 0
        self._asleep: dict[str, tuple[str, ...]] = {}  # by server, what of it

    @property
    def alive(self) -> Sequence[SglangEngine]:
        return [engine for process, engine in self._servers.values() if process.exit_code is None and engine.lost is None]

    def start(self) -> None:
        self.recover()

    def recover(self) -> list[str]:
        first = not self._servers
        if first:
            self._check_ports()
        started: list[str] = []
        for attempt in range(1, START_ATTEMPTS + 1):
            alive = {engine.name for engine in self.alive}
            dead = [index for index in range(self._config.count) if _name(index) not in alive]
            if not dead:
                break
            self._bury([_name(index) for index in dead if _name(index) in self._servers])
            try:
                self._launch(dead)
            except StartFailed as error:
                if attempt == START_ATTEMPTS or (first and not error.by_signal):  # it would not start the next time either
                    raise
                log.warning("%s", error)
            started += [_name(index) for index in dead]
        return sorted(set(started))

    def _bury(self, names: Sequence[str]) -> None:
        """End what is left of dead servers; each counts as a restart."""
        limit = self._config.max_restarts
        self._restarts += len(names)
        if self._restarts > limit:
            raise EngineLost(f"{names[0]} died, and engine.max_restarts={limit} are used up")
        for name in names:
            process, engine = self._servers[name]
            if engine.lost is None:  # nobody has met it dead: else whoever lost it has said so
                log.warning("%s ended with %s", name, process.exit_code)
            log.info("restarting %s; engine.max_restarts=%d leaves %d", name, limit, limit - self._restarts)
            process.kill()

    def sleep(self) -> None:
        """On CUDA the servers give their device memory back. On a CPU there is nothing to give: SGLang's pools stay."""
        if self._device == "cuda":
            for engine in self.alive:
                asleep = self._asleep.get(engine.name, ())
                if tags := [tag for tag in (WEIGHTS, *OTHERS) if tag not in asleep]:
                    with _reported_if_lost():
                        engine.call("/release_memory_occupation", {"tags": tags})
                        self._asleep[engine.name] = (WEIGHTS, *OTHERS)

    def wake(self, *, for_push: bool) -> None:
        for engine in self.alive:
            asleep = self._asleep.get(engine.name, ())
            if tags := [tag for tag in asleep if tag == WEIGHTS or not for_push]:
                with _reported_if_lost():
                    engine.call("/resume_memory_occupation", {"tags": tags})
                    self._asleep[engine.name] = tuple(tag for tag in asleep if tag not in tags)

    def stop(self) -> None:
        """By SIGKILL: a server holds nothing that is worth keeping, and SGLang looks at a SIGTERM only every five seconds."""
        for process, _ in self._servers.values():
            process.kill()
        self._servers.clear()

    def _check_ports(self) -> None:
        if self._config.port == 0:
            return
        for index in range(self._config.count):
            port = self._config.port + index
            if port > 65_535 or not is_port_free(self._config.host, port):
                raise UserError(f"engine.port={self._config.port}: {_name(index)} needs port {port}, which is in use")

    def _launch(self, indices: Sequence[int]) -> None:
        """Start these servers side by side, and wait for them. If one fails all of these are ended."""
        for index in indices:
            self._servers[_name(index)] = self._spawn(index)
            self._asleep.pop(_name(index), None)
        try:
            self._wait([_name(index) for index in indices])
        except BaseException:
            for index in indices:
                self._servers[_name(index)][0].kill()
            raise

    def _spawn(self, index: int) -> tuple[ServerProcess, SglangEngine]:
        config = self._config
        internal_port, port = free_ports(config.host, 2)
        if config.port:
            port = config.port + index
        process = ServerProcess(
            server_arguments(config, self._device, self._model_path, self._context_length, self._seed, index, port, internal_port),
            server_environment(
                os.environ,
                config,
                self._device,
                {server.API_KEY: self._api_key, server.AUTHKEY: multiprocessing.current_process().authkey.hex()},
                index,
            ),
            self._run_dir / "engines" / f"{_name(index)}.log",
        )
        host = "127.0.0.1" if config.host == "0.0.0.0" else config.host
        engine = SglangEngine(
            _name(index),
            host,
            port,
            self._api_key,
            self._vocab_size,
            config.request_timeout_s,
            config.stall_timeout_s,
            self._routing,
        )
        return process, engine

    def _wait(self, names: Sequence[str]) -> None:
        started = said = time.monotonic()
        waiting = list(names)
        while waiting:
            for name in list(waiting):
                process, engine = self._servers[name]
                if process.exit_code is not None:
                    message = f"{name} ended with {process.exit_code} as it started; last words:\n{process.last_words()}"
                    raise StartFailed(message, by_signal=process.exit_code < 0)
                if engine.answers():
                    waiting.remove(name)
            if self._stop_requested():
                raise UserError("stopped while engines started: the same command goes on from the last checkpoint", STOPPED)
            now = time.monotonic()
            if waiting and now - started > self._config.startup_timeout_s:
                name = waiting[0]
                raise StartFailed(
                    f"{name} does not answer after engine.startup_timeout_s={self._config.startup_timeout_s:g}; "
                    f"last words:\n{self._servers[name][0].last_words()}"
                )
            if waiting and now - said > PROGRESS_S:
                log.info("waiting for %s to load %s (%.0f s)", ", ".join(waiting), self._model_path, now - started)
                said = now
            if waiting:
                time.sleep(POLL_S)
        for name in names:
            self._servers[name][1].warm_up(self._config.startup_timeout_s)
        log.info("%s up after %.1f s", ", ".join(names), time.monotonic() - started)


def _name(index: int) -> str:
    return f"engine_{index}"


@contextmanager
def _reported_if_lost() -> Iterator[None]:
    """An engine that is lost in here is not alive any more, and so `recover`'s."""
    try:
        yield
    except EngineLost as error:
        log.warning("%s", error)


def _resolve(device: str) -> str:
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _vocab_size(model_path: str) -> int:
    path = Path(model_path) / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; engines start from a Hugging Face checkpoint")
    config: dict[str, Any] = json.loads(path.read_text())
    return int(config["vocab_size"])
