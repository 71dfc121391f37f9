"""Untrusted programs in sandboxes: bubblewrap where it works, and nothing where it does not, unless `unsafe` says so.

A `Cell` is one sandbox (bubblewrap.py), behind a filter of system calls (seccomp.py), and a role of `rewards.cell` in it that has
set hard limits before it reads the first line of a response.

With `unsafe` and no bubblewrap these still hold: the limits on time, on each process's CPU and memory, on a file's and a message's
size; an empty environment; a working directory that is removed, and the end of the process group. All that the user running this
may read, write, reach or kill is open to the program.

Invariants:
- nothing of the host is writable from a cell, and of its files the interpreter and the shared libraries alone are readable;
- when `close` returns, every process that was started in the cell is gone, and with the process that made it, it dies too;
- a cell costs the host at most `memory_mb` of resident memory (looked at five times a second) and `processes` processes, and the
  caller at most `seconds` per conversation;
- without a sandbox and without `unsafe` no program is started.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import psutil  # type: ignore[import-untyped]

from megatron_rl.config.errors import UserError
from megatron_rl.rewards import seccomp
from megatron_rl.rewards.bubblewrap import MESSAGE_LIMIT, Limits, bundle, sandboxed, unprotected
from megatron_rl.rewards.cell.channel import Channel

LOOK_S = 0.2  # between two looks at a cell's memory
END_S = 10.0  # for a killed cell's processes to be gone
START_S = 60.0  # for a cell to start, on a machine where everything else does
REFUSAL = "reward.code.unsafe=true runs the programs of responses all the same, with this machine's files and network open to them"


class OutOfTime(Exception):
    pass


class Ended(Exception):
    """The cell's process is gone, or it was killed for what it used."""


class _TimedChannel(Channel):
    """Its reads and writes raise TimeoutError at a deadline."""

    def __init__(self, end: socket.socket) -> None:
        super().__init__(end.fileno(), MESSAGE_LIMIT)
        self.deadline = 0.0
        self._end = end

    def read(self, count: int) -> bytes:
        self._end.settimeout(self._left())
        return self._end.recv(count)

    def write(self, data: memoryview) -> int:
        self._end.settimeout(self._left())
        return self._end.send(data)

    def is_readable_within(self, seconds: float) -> bool:
        """True at the deadline, too: a read raises then."""
        return bool(select.select([self._end], [], [], min(seconds, self._left()))[0]) or time.monotonic() >= self.deadline

    def close(self) -> None:
        self._end.close()

    def _left(self) -> float:
        return max(0.001, self.deadline - time.monotonic())


class Cell:
    """A context manager. `role` is a module of `rewards.cell`, `peers` further sockets for it."""

    def __init__(self, role: str, limits: Limits, peers: tuple[socket.socket, ...] = (), unsafe: bool = False) -> None:
        self._limits = limits
        self._fault = ""
        self._home: tempfile.TemporaryDirectory[str] | None = None
        self._info = -1
        ours, theirs = socket.socketpair()
        with contextlib.ExitStack() as opened:
            opened.callback(theirs.close)
            sockets = [theirs.fileno(), *(peer.fileno() for peer in peers)]
            code = _pipe_with(bundle(role), opened)
            fds = [*sockets, code]
            if missing():
                require(unsafe)
                self._home = tempfile.TemporaryDirectory(prefix="unsafe-")
                command = unprotected(role, limits, code, sockets)
            else:
                self._info, info = os.pipe()
                opened.callback(os.close, info)
                filter = _pipe_with(seccomp.program(), opened)
                fds += [info, filter]
                command = sandboxed(role, limits, filter, code, sockets, info)
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={} if self._home else {"PATH": os.environ.get("PATH", os.defpath)},
                cwd=self._home.name if self._home else "/",
                pass_fds=fds,
                start_new_session=True,
            )
        self._channel = _TimedChannel(ours)

    def __enter__(self) -> Cell:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ready(self) -> None:
        """Wait until its limits are set and it waits for a message: what time that takes is not the response's."""
        try:
            self.receive(time.monotonic() + START_S)
        except (Ended, OutOfTime) as error:
            raise DoesNotStart(str(error) or f"nothing heard of it within {START_S:g} s") from None

    def send(self, message: Any, deadline: float) -> None:
        self._channel.deadline = deadline
        try:
            self._channel.send(message)
        except TimeoutError:
            raise OutOfTime from None
        except OSError:
            raise Ended(self.end()) from None

    def receive(self, deadline: float, watched: tuple[Cell, ...] = ()) -> Any:
        """The next message. The memory of this cell and of those `watched` is looked at meanwhile."""
        self._channel.deadline = deadline
        while not self._channel.is_readable_within(LOOK_S):
            for one in (self, *watched):
                if one.is_over_its_memory():
                    raise Ended(one.end())
        try:
            return self._channel.receive()
        except TimeoutError:
            raise OutOfTime from None
        except (EOFError, OSError):
            raise Ended(self.end()) from None
        except ValueError as error:
            raise Ended(f"its sandbox said something else than an answer: {error}") from None

    def is_over_its_memory(self) -> bool:
        total = 0
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self._process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    total += process.memory_info().rss
        if total > self._limits.memory_mb * 2**20:
            self._fault = f"it took more than {self._limits.memory_mb} MB of memory"
        return bool(self._fault)

    def end(self) -> str:
        """How it ended, in words; ends it where it has not."""
        code = None
        if not self._fault and self._ends_within(1.0):
            self._sweep()
            code = self._process.wait()
        self.close()
        if self._fault or code is None:
            return self._fault or "it closed its channel"
        number = code - 128 if code > 128 else -code  # bubblewrap says how its child ended as a shell does
        if number == signal.SIGXCPU:
            raise OutOfTime
        return f"its process was killed by signal {number}" if number > 0 else f"its process ended with exit code {code}"

    def close(self) -> None:
        """Kill whatever runs in it, and wait until that is gone."""
        self._channel.close()
        if self._process.returncode is None:
            self._kill()
        if self._info >= 0:
            os.close(self._info)
            self._info = -1
        if self._home:
            self._home.cleanup()

    def _kill(self) -> None:
        """The first process of the namespace takes all others with it, and bubblewrap ends once it is gone. Killing bubblewrap
        itself would do the same, but some time after this returns."""
        if self._info >= 0:
            ready, _, _ = select.select([self._info], [], [], END_S)
            said = os.read(self._info, 4096) if ready else b""
            if said and self._process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(json.loads(said)["child-pid"], signal.SIGKILL)
        self._sweep()
        if not self._ends_within(END_S):
            self._process.kill()
        self._process.wait()

    def _sweep(self) -> None:
        """Without a sandbox: kill the process group, while its first process is still there to hold the number."""
        if self._home:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _ends_within(self, seconds: float) -> bool:
        """`Popen.wait` with a timeout looks every few milliseconds; this is told."""
        if self._process.returncode is not None:
            return True
        handle = os.pidfd_open(self._process.pid)
        try:
            return bool(select.select([handle], [], [], seconds)[0])
        finally:
            os.close(handle)


class DoesNotStart(RuntimeError):
    """A sandbox failed, before it had seen a response."""


@contextlib.contextmanager
def linked() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The ends of a socket for two cells to talk over. Both must be theirs before the first message, so this end closes them."""
    pair = socket.socketpair()
    try:
        yield pair
    finally:
        for end in pair:
            end.close()


def require(unsafe: bool) -> None:
    if not unsafe and (why := missing()):
        raise UserError(f"verifier 'code' needs a sandbox: {why}; {REFUSAL}")


@lru_cache(maxsize=1)
def missing() -> str:
    """Why no sandbox can be made here, or "". Makes one."""
    if not shutil.which("bwrap"):
        return "bubblewrap is not installed (Debian and Ubuntu: apt-get install bubblewrap)"
    ours, theirs = socket.socketpair()
    with contextlib.ExitStack() as opened:
        for end in (ours, theirs):
            opened.callback(end.close)
        try:
            filter = _pipe_with(seccomp.program(), opened)
        except LookupError as error:
            return str(error)
        code = _pipe_with(bundle("stdio"), opened)
        Channel(ours.fileno(), MESSAGE_LIMIT).send({"program": ""})  # and no input: it starts, and ends
        ours.shutdown(socket.SHUT_WR)
        command = sandboxed("stdio", Limits(), filter, code, [theirs.fileno()])
        fds = (filter, code, theirs.fileno())
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", pass_fds=fds, timeout=START_S, check=False
            )
        except subprocess.TimeoutExpired:
            return f"a trial of bubblewrap did not end within {START_S:g} s"
    words = done.stderr.strip().splitlines()
    return "" if done.returncode == 0 else f"bubblewrap cannot make one: {words[-1] if words else f'exit code {done.returncode}'}"


def _pipe_with(data: bytes, opened: contextlib.ExitStack) -> int:
    """The reading end of a pipe that holds `data` (less than a pipe's 64 KiB)."""
    reader, writer = os.pipe()
    opened.callback(os.close, reader)
    with os.fdopen(writer, "wb") as pipe:
        pipe.write(data)
    return reader
