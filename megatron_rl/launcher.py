"""Local ranks without a launcher of one's own: torch's elastic agent for one node, and one process per job of a sweep.

A signal to the agent reaches every rank as SIGTERM: they finish what they are at, save, and end. An agent that is killed takes
its ranks with it, since torchrun's workers live in sessions of their own and would outlive it.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

from megatron_rl.config import EvalRun, RlRun, SftRun, UserError

SHUTDOWN_S = 290  # for the ranks to save after a signal; clusters give about five minutes
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent() -> None:
    """For a rank: be killed when the launcher that started it ends."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended meanwhile
        os.kill(os.getpid(), signal.SIGKILL)


def run_ranks(verb: str, overrides: list[str], nproc: int) -> None:
    """The same job in `nproc` ranks on this machine. The ranks print their own errors; this only passes on the exit code."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id="megatron_rl",
        shutdown_timeout=SHUTDOWN_S,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "megatron_rl", verb, *overrides)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            print(f"megatron-rl: error: rank {rank} was killed by {name}; the same command goes on", file=sys.stderr)
        sys.exit(failure.exitcode if failure.exitcode > 0 else 1)
    except SignalException as error:
        sys.exit(128 + error.sigval)


def run_sweep_job(verb: str, overrides: list[str], config: RlRun | SftRun | EvalRun, number: int) -> None:
    """One job of a sweep, in a process of its own (Megatron and NCCL keep state per process) and a directory of its own,
    `<run.dir>/job_<number>`. A signal goes to the job, and ends the sweep with it."""
    key, directory = ("out", config.out) if isinstance(config, EvalRun) else ("run.dir", config.run.dir)
    command = [sys.executable, "-m", "megatron_rl", verb, *overrides, f"{key}={Path(directory) / f'job_{number}'}"]
    job = subprocess.Popen(command, start_new_session=True, preexec_fn=die_with_parent)
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, lambda received, _: job.send_signal(received))
    code = job.wait()
    if code < 0 or code > 128:
        sys.exit(code if code > 0 else 128 - code)
    if code:
        raise UserError(f"sweep job {number} ({' '.join(overrides)}) ended with exit code {code}", exit_code=1)
