"""The processes behind `rewards.pool`: a nursery that has every verifier imported, and the workers it forks.

Verifiers take a second to import; a worker that is killed is replaced by a fork in milliseconds, and all share the imports' memory.
The nursery is small and has one thread, so that forking it is safe and cheap whatever the trainer holds.

Over a socket pair each: nursery <- ("fork",) + a file descriptor -> pid; ("reap", pid) -> wait status. worker <- list of pickled
(verifier, response, prompt) -> a Score for each as soon as it is there.

Limits, set by the worker on itself and kept by the kernel: address space (`memory`; beyond it a MemoryError), processor time per
response (`cpu`; SIGXCPU), the size of any file, no core dumps; standard streams lead nowhere.

Invariants: a process whose parent is gone does not live on, however the parent died and whatever the process was doing; an idle one
uses no CPU; a verifier that raises or returns nonsense is an `error` of that response, not the end of the worker.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import pickle
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from typing import Any

from megatron_rl.rewards import code
from megatron_rl.types import Prompt, Score
from megatron_rl.verifiers import load

Verify = Callable[[str, Prompt], Score]
PR_SET_PDEATHSIG = 1
FILE_BYTES = 64 * 2**20
TEXT_LIMIT = 500  # characters of `extracted` and `reason` that come back


@dataclass(frozen=True)
class Limits:
    cpu_s: float = 5.0  # per response
    memory_mb: int = 4096  # of address space


def main() -> None:
    control: Connection[Any, Any] = Connection(int(sys.argv[1]))
    die_with(int(sys.argv[2]))
    verifiers = {name: load(module) for name, module in json.loads(sys.argv[3]).items()}
    limits = Limits(**json.loads(sys.argv[4]))
    code.configure(**json.loads(sys.argv[5]))
    nursery = os.getpid()
    control.send("ready")
    while True:
        try:
            request = control.recv()
        except EOFError:
            return
        if request[0] == "fork":
            handle = recv_handle(control)
            pid = os.fork()
            if pid == 0:
                os.setpgid(0, 0)  # what a verifier starts is killed with it
                die_with(nursery)
                control.close()
                serve(Connection(handle), verifiers, limits)
            os.close(handle)
            control.send(pid)
        else:
            control.send(os.waitpid(request[1], 0)[1])


def die_with(parent: int) -> None:
    """The kernel kills this process when its parent dies; one that is dead by now shows as another parent."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def serve(connection: Connection[Any, Any], verifiers: Mapping[str, Verify], limits: Limits) -> None:
    """A worker's life; does not return."""
    memory = limits.memory_mb * 2**20
    for kind, limit in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, FILE_BYTES), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(kind, (limit, limit))
    silence = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(silence, stream)
    try:
        connection.send("ready")
        while True:
            for item in connection.recv():
                limit_cpu(limits.cpu_s)
                connection.send(judge(item, verifiers))
    except (EOFError, BrokenPipeError):
        os._exit(0)


def limit_cpu(seconds: float) -> None:
    """From now on. The kernel counts whole seconds of the process's whole life."""
    limit = math.ceil(time.process_time() + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))


def judge(item: bytes, verifiers: Mapping[str, Verify]) -> Score:
    name, response, prompt = pickle.loads(item)
    started = time.perf_counter()
    try:
        score = verifiers[name](response, prompt)
        if not math.isfinite(score.value):
            raise ValueError(f"the verifier's value is {score.value}")
    except Exception as error:  # whatever it is, it is this response's
        score = Score(0.0, "error", reason=f"{type(error).__name__}: {error}")
    extracted = score.extracted and score.extracted[:TEXT_LIMIT]
    return replace(score, extracted=extracted, reason=score.reason[:TEXT_LIMIT], seconds=time.perf_counter() - started)


if __name__ == "__main__":
    main()
