"""Run a script on several gloo ranks of this machine, with torchrun's environment but without its agent.

torchrun's workers live in sessions of their own and outlive a killed agent; here every rank is our child, dies with us
(PR_SET_PDEATHSIG) and with its first failing sibling. As under torchrun, the store that the ranks meet in is served by the
parent on a port the system chose, so that tests side by side cannot take each other's.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class RanksFailed(AssertionError):
    """A rank failed or the time was up; the message holds every rank's output."""


def run_ranks(nproc: int, script: Path, args: Sequence[str] = (), timeout: float = 180) -> str:
    """Returns the ranks' stdout, rank after rank; raises RanksFailed."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="ranks-") as logs:
        ranks = [_start(rank, nproc, store.port, [sys.executable, str(script), *args], Path(logs)) for rank in range(nproc)]
        try:
            failure = _wait(ranks, time.monotonic() + timeout)
        finally:
            _kill(ranks)
        stdouts = [(Path(logs) / f"{rank}.stdout").read_text(errors="replace") for rank in range(nproc)]
        if failure is None:
            return "".join(stdouts)
        stderrs = [(Path(logs) / f"{rank}.stderr").read_text(errors="replace") for rank in range(nproc)]
    reason = f"no end after {timeout:g} s" if failure < 0 else f"rank {failure} ended with {ranks[failure].returncode}"
    shown = (f"--- rank {rank}: stdout\n{stdouts[rank]}--- rank {rank}: stderr\n{stderrs[rank]}" for rank in range(nproc))
    raise RanksFailed(f"{script.name} on {nproc} ranks: {reason}\n" + "\n".join(shown))


def _start(rank: int, nproc: int, port: int, command: list[str], logs: Path) -> subprocess.Popen[bytes]:
    env = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # env:// connects to our store instead of serving one on rank 0
        "TORCHELASTIC_RUN_ID": "tests",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(SUPPORT), os.environ.get("PYTHONPATH")])),
    }
    with (logs / f"{rank}.stdout").open("wb") as out, (logs / f"{rank}.stderr").open("wb") as err:
        return subprocess.Popen(command, env=env, stdout=out, stderr=err, start_new_session=True, preexec_fn=_die_with_parent)


def _die_with_parent() -> None:
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait(ranks: Sequence[subprocess.Popen[bytes]], deadline: float) -> int | None:
    """None when all ended well, else the first rank seen to fail, -1 for out of time."""
    while True:
        codes = [process.poll() for process in ranks]
        for rank, code in enumerate(codes):
            if code:
                time.sleep(0.5)  # let its siblings say what they saw
                return rank
        if None not in codes:
            return None
        if time.monotonic() > deadline:
            return -1
        time.sleep(0.05)


def _kill(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """End every rank and what it left behind in its session's process group."""
    for process in ranks:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    for process in ranks:
        process.wait()
