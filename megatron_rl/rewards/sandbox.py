"""Untrusted programs in sandboxes: bubblewrap where it works, and nothing where it does not, unless `unsafe` says so.

A `Cell` is one sandbox: namespaces of its own (processes, network, IPC, host name; users, where the caller is not root), a
read-only root with the interpreter, its standard library and the system's shared libraries, a small private /tmp, no /proc, no
environment, no capability, a filter of system calls (`rewards.seccomp`), and a role of `rewards.cell` that has set hard limits
before it reads the first line of a response. Where the caller is root, the role becomes a user id that nobody else has.

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
import itertools
import json
import marshal
import math
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from megatron_rl.config.errors import UserError
from megatron_rl.rewards import cell, seccomp
from megatron_rl.rewards.cell.channel import Channel

TMP_MB = 64  # of the private /tmp, which lies in memory
FILE_MB = 16  # of one file
MESSAGE_LIMIT = 8 * 2**20  # bytes that a response can make the reader hold
LOOK_S = 0.2  # between two looks at a cell's memory
END_S = 10.0  # for a killed cell's processes to be gone
START_S = 60.0  # for a cell to start, on a machine where everything else does
FIRST_UID, UIDS = 2**30, 64  # user ids beyond any real user's, so many for each process
PYTHON, INSIDE = "/python", "/python/bin/python"  # folder and interpreter, as a cell sees them
CELL = Path(__file__).parent / "cell"
PARTS = ("channel", "values", "program")  # of `cell`, that its roles import
REFUSAL = "reward.code.unsafe=true runs the programs of responses all the same, with this machine's files and network open to them"

_serial = itertools.count()


@dataclass(frozen=True)
class Limits:
    seconds: float = 5.0  # of a conversation with cells, and of CPU per process
    memory_mb: int = 512
    processes: int = 16  # threads count


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
                command = [*interpreter(_python(), code), *arguments(role, limits, 0, 0, sockets)]
            else:
                self._info, info = os.pipe()
                opened.callback(os.close, info)
                filter = _pipe_with(seccomp.program(), opened)
                fds += [info, filter]
                command = ["bwrap", "--info-fd", str(info), *sandboxed(role, limits, filter, code, sockets)]
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
        command = ["bwrap", *sandboxed("stdio", Limits(), filter, code, [theirs.fileno()])]
        fds = (filter, code, theirs.fileno())
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", pass_fds=fds, timeout=START_S, check=False
            )
        except subprocess.TimeoutExpired:
            return f"a trial of bubblewrap did not end within {START_S:g} s"
    words = done.stderr.strip().splitlines()
    return "" if done.returncode == 0 else f"bubblewrap cannot make one: {words[-1] if words else f'exit code {done.returncode}'}"


def sandboxed(role: str, limits: Limits, filter: int, code: int, sockets: list[int]) -> list[str]:
    """bubblewrap's arguments."""
    uid = FIRST_UID + os.getpid() * UIDS + next(_serial) % UIDS if os.geteuid() == 0 else 0
    inner = [*interpreter(INSIDE, code), *arguments(role, limits, uid, limits.processes, sockets)]
    return ["--seccomp", str(filter), *walls(), "--", *inner]


@lru_cache(maxsize=1)
def walls() -> tuple[str, ...]:
    """bubblewrap's arguments, but for what differs from cell to cell."""
    out = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try", "--hostname", "sandbox"]
    out += ["--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"]
    if os.geteuid() == 0:
        out += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]  # for cell.start, which has none after that
    else:
        out += ["--unshare-user", "--uid", str(FIRST_UID), "--gid", str(FIRST_UID)]
    for made in ("/usr", PYTHON, f"{PYTHON}/bin", "/dev"):
        out += ["--perms", "0755", "--dir", made]  # those that bubblewrap makes by itself are closed to other users
    for folder in ("/lib", "/lib64", "/usr/lib", "/usr/lib64"):
        if Path(folder).is_symlink():
            out += ["--symlink", str(Path(folder).readlink()), folder]
        elif Path(folder).is_dir():
            out += ["--ro-bind", folder, folder]
    libraries = Path(sys.base_prefix) / "lib"
    out += ["--ro-bind", str(libraries), f"{PYTHON}/lib", "--ro-bind", _python(), INSIDE]
    out += ["--setenv", "LD_LIBRARY_PATH", f"{PYTHON}/lib", "--setenv", "HOME", "/tmp"]
    version = Path(sysconfig.get_path("stdlib")).name
    for packages in (f"{version}/site-packages", f"{version}/dist-packages", "python3/dist-packages"):
        for host, inside in ((libraries, f"{PYTHON}/lib"), (Path("/usr/lib"), "/usr/lib")):
            if (host / packages).is_dir():
                out += ["--tmpfs", f"{inside}/{packages}", "--remount-ro", f"{inside}/{packages}"]
    for device in ("/dev/null", "/dev/zero", "/dev/urandom"):
        out += ["--dev-bind", device, device]
    return (*out, "--perms", "1777", "--size", str(TMP_MB * 2**20), "--tmpfs", "/tmp", "--chdir", "/tmp", "--remount-ro", "/")


@lru_cache(maxsize=8)
def bundle(role: str) -> bytes:
    """The modules of a role, compiled: a cell finds no file of this project, and compiles nothing."""
    names = [*PARTS, role, "start"]
    codes = [compile((CELL / f"{name}.py").read_bytes(), f"<{name}>", "exec", dont_inherit=True) for name in names]
    return marshal.dumps([(f"{cell.__name__}.{name}", code) for name, code in zip(names, codes, strict=True)])


def interpreter(python: str, bundle: int) -> list[str]:
    """Isolated, without `site`: of installed packages nothing is seen. It loads the bundle that waits at a file descriptor."""
    start = f"""import marshal, sys
for name, code in marshal.load(open({bundle}, "rb")):
    sys.modules[name] = module = type(sys)(name)
    exec(code, module.__dict__)
module.main()"""
    return [python, "-I", "-S", "-B", "-X", "utf8", "-c", start]


def arguments(role: str, limits: Limits, uid: int, processes: int, sockets: list[int]) -> list[str]:
    numbers = (uid, math.ceil(limits.seconds), limits.memory_mb * 2**20, processes, FILE_MB * 2**20, MESSAGE_LIMIT, *sockets)
    return [role, *map(str, numbers)]


def _python() -> str:
    """The interpreter outside of any virtual environment."""
    return str(Path(getattr(sys, "_base_executable", sys.executable)).resolve())


def _pipe_with(data: bytes, opened: contextlib.ExitStack) -> int:
    """The reading end of a pipe that holds `data` (less than a pipe's 64 KiB)."""
    reader, writer = os.pipe()
    opened.callback(os.close, reader)
    with os.fdopen(writer, "wb") as pipe:
        pipe.write(data)
    return reader
