"""The command line of one sandbox: what bubblewrap lets a process see, and the interpreter that it starts there.

A sandbox has namespaces of its own (processes, network, IPC, host name; users, where the caller is not root), a read-only root with
the interpreter, its standard library and the system's shared libraries, a small private /tmp, no /proc, no environment and no
capability. Where the caller is root, the role becomes a user id that nobody else has.
"""

from __future__ import annotations

import itertools
import marshal
import math
import os
import sys
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from megatron_rl.rewards import cell

TMP_MB = 64  # of the private /tmp, which lies in memory
FILE_MB = 16  # of one file
MESSAGE_LIMIT = 8 * 2**20  # bytes that a response can make the reader hold
FIRST_UID, UIDS = 2**30, 64  # user ids beyond any real user's, so many for each process
PYTHON, INSIDE = "/python", "/python/bin/python"  # folder and interpreter, as a cell sees them
CELL = Path(__file__).parent / "cell"
PARTS = ("channel", "values", "program")  # of `cell`, that its roles import

_serial = itertools.count()


@dataclass(frozen=True)
class Limits:
    seconds: float = 5.0  # of a conversation with cells, and of CPU per process
    memory_mb: int = 512
    processes: int = 16  # threads count


def sandboxed(role: str, limits: Limits, filter: int, code: int, sockets: list[int], info: int | None = None) -> list[str]:
    """A role of `rewards.cell` inside a sandbox. `filter`, `code` and `sockets` are open file descriptors; so is `info`, where
    bubblewrap tells the process it made."""
    uid = FIRST_UID + os.getpid() * UIDS + next(_serial) % UIDS if os.geteuid() == 0 else 0
    inner = [*interpreter(INSIDE, code), *arguments(role, limits, uid, limits.processes, sockets)]
    told = [] if info is None else ["--info-fd", str(info)]
    return ["bwrap", *told, "--seccomp", str(filter), *walls(), "--", *inner]


def unprotected(role: str, limits: Limits, code: int, sockets: list[int]) -> list[str]:
    """The same role, without a sandbox."""
    return [*interpreter(_python(), code), *arguments(role, limits, 0, 0, sockets)]


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
