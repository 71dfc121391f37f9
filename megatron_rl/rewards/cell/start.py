"""The first code in a sandbox: give up what is left of privileges, set the limits, then become a role.

Limits are hard: what runs later cannot raise them.
"""

from __future__ import annotations

import os
import resource
import sys

from megatron_rl.rewards.cell.channel import Channel

FILES = 64  # open at once
FROM_WORKER = 2**30  # bytes of a message that no response wrote


def main() -> None:
    role, uid, cpu_s, memory, processes, file_size, message, *fds = sys.argv[1:]
    module = sys.modules[f"megatron_rl.rewards.cell.{role}"]  # loaded before this one (`sandbox.bundle`)
    del sys.argv[1:]
    if int(uid):
        os.setgroups([])
        os.setresgid(int(uid), int(uid), int(uid))
        os.setresuid(int(uid), int(uid), int(uid))
    lower(resource.RLIMIT_CPU, int(cpu_s), 1)  # SIGXCPU, and a second later SIGKILL for those who ignore it
    lower(resource.RLIMIT_AS, int(memory))
    lower(resource.RLIMIT_FSIZE, int(file_size))
    lower(resource.RLIMIT_CORE, 0)
    lower(resource.RLIMIT_NOFILE, FILES)
    if int(processes):
        lower(resource.RLIMIT_NPROC, int(processes))
    worker, *others = [Channel(int(fd), FROM_WORKER if i == 0 else int(message)) for i, fd in enumerate(fds)]
    worker.send("ready")
    module.main(worker, *others)


def lower(kind: int, limit: int, grace: int = 0) -> None:
    """To `limit`, for good, unless it is lower by now."""
    hard = resource.getrlimit(kind)[1]
    most = limit + grace if hard == resource.RLIM_INFINITY else min(limit + grace, hard)
    resource.setrlimit(kind, (min(limit, most), most))
