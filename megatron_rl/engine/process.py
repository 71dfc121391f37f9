"""One server process: its ports, its log, its life.

A server gets a session of its own: Ctrl-C in the trainer's terminal does not reach it, and one signal ends it with all its
children.

Invariants: `kill` returns when no process of the server is left; the trainer's end ends the server (engine/server.py), whichever
thread of the trainer started it.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from megatron_rl.engine import server

KILL_TIMEOUT_S = 10.0
LAST_WORDS = 20  # lines
# Below the ports that Linux hands to outgoing connections, which could take one between our choice and the server's bind.
FREE_PORTS = range(20_000, 32_000)

# The kernel counts the thread that forked as the parent: it must live as long as the trainer does.
_spawner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine-spawner")


class ServerProcess:
    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch(mode=0o600)  # SGLang logs its arguments, the API key among them
        command = [sys.executable, "-P", "-m", server.__name__, *arguments]  # -P: the working directory shadows no package
        env = {**environment, server.PARENT_PID: str(os.getpid())}
        with log.open("ab") as output:
            self._log_start = output.tell()
            self._process = _spawner.submit(
                subprocess.Popen, command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            ).result()
        self.pid = self._process.pid

    @property
    def exit_code(self) -> int | None:
        return self._process.poll()

    def last_words(self) -> str:
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            lines = log.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-LAST_WORDS:])

    def kill(self) -> None:
        deadline = time.monotonic() + KILL_TIMEOUT_S
        while members := _living_members(self.pid):
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise RuntimeError(f"processes {members} survive SIGKILL for {KILL_TIMEOUT_S:g} s")
            time.sleep(0.01)
        self._process.wait()


def is_port_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server will
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def free_ports(host: str, count: int) -> list[int]:
    candidates = random.SystemRandom().sample(FREE_PORTS, len(FREE_PORTS))
    return [port for port, _ in zip((port for port in candidates if is_port_free(host, port)), range(count), strict=False)]


def _living_members(group: int) -> list[int]:
    """Without zombies: orphans of a dead server stay until init looks at them, in a container perhaps for ever."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended while we looked
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                members.append(int(stat.parent.name))
    return members
