"""Find and end the processes of a test by a mark in their environment, whatever sessions and groups they are in."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

MARK = "MEGATRON_RL_TEST_RUN"


def marked(value: str) -> dict[int, str]:
    """pid -> command line of every live process that was started with `MARK=value`."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if f"{MARK}={value}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if command and state != "Z":
                    found[int(entry.name)] = command
        except (FileNotFoundError, ProcessLookupError, PermissionError):  # gone, or another user's
            continue
    return found


def kill(pids: Iterable[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def wait_until_gone(value: str, seconds: float = 20) -> None:
    """Raises AssertionError naming what is left."""
    deadline = time.monotonic() + seconds
    while (left := marked(value)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left, f"orphans: {left}"
