"""Verifiers in killable processes, behind one awaitable call.

Each worker process has a thread here that feeds it and watches its clock; threads are idle while workers are. Responses travel in
batches, scores come back one by one, so that a hanging response is known by being the next one.

Invariants:
- scores come back in the order of their rollouts, one each, whatever happened to the workers on the way;
- a response that takes longer than `timeout_s` is a `timeout`, one that takes its worker down an `error`; the others of its batch
  get their own scores, from another worker;
- no process outlives the pool or the trainer, even one killed by SIGKILL;
- the pool serves any event loop, several calls at once, and raises only if workers cannot start at all.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from typing import Any

from megatron_rl import verifiers
from megatron_rl.rewards import worker
from megatron_rl.types import Rollout, Score

log = logging.getLogger(__name__)
START_TIMEOUT_S = 300.0  # a second's imports, on a machine where everything else starts too
BATCH = 32  # responses per message, at most; fewer where that lets every worker have some
HATCH_ATTEMPTS = 3
WARNINGS = 20  # different failures that are logged


class WorkersCannotStart(RuntimeError):
    """Nothing wrong with a response: no worker of this installation can judge any."""


@dataclass
class _Job:
    """Consecutive responses; those that are left go to the next worker when one is lost."""

    items: list[bytes]
    scores: list[Score] = field(default_factory=list)
    future: Future[list[Score]] = field(default_factory=Future)


class RewardPool:
    """ports.Rewards. `decode` turns response tokens into the text that verifiers read."""

    def __init__(
        self,
        workers: int,
        timeout_s: float,
        decode: Callable[[Sequence[int]], str],
        modules: Mapping[str, str] = verifiers.MODULES,
    ) -> None:
        self._timeout_s = timeout_s
        self._decode = decode
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closed = False
        self._nursery: _Nursery | None = None
        self._nursery_lock = threading.Lock()
        self._modules = dict(modules)
        self._warned: set[tuple[str, str]] = set()
        self._threads = [threading.Thread(target=self._run, name=f"reward-{i}", daemon=True) for i in range(workers)]
        for thread in self._threads:  # they start their workers at once: warm by the time the first response is there
            thread.start()

    async def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        items = [pickle.dumps((r.prompt.verifier, self._decode(r.tokens), replace(r.prompt, tokens=()))) for r in rollouts]
        size = max(1, min(BATCH, -(-len(items) // len(self._threads))))
        jobs = [_Job(items[i : i + size]) for i in range(0, len(items), size)]
        for job in jobs:
            self._jobs.put(job)
        batches = await asyncio.gather(*(asyncio.wrap_future(job.future) for job in jobs))
        scores = [score for batch in batches for score in batch]
        self._report(rollouts, scores)
        return scores

    def close(self) -> None:
        self._closed = True
        for _ in self._threads:
            self._jobs.put(None)
        with self._nursery_lock:
            if self._nursery:
                self._nursery.kill()
        for thread in self._threads:
            thread.join()
        while not self._jobs.empty():
            job = self._jobs.get()
            if job:
                job.future.cancel()

    def _report(self, rollouts: Sequence[Rollout], scores: Sequence[Score]) -> None:
        """The first failures of each kind, by name: they are the verifier's or the machine's, seldom the policy's."""
        for rollout, score in zip(rollouts, scores, strict=True):
            kind = (rollout.prompt.verifier, score.reason)
            if score.status in ("timeout", "error") and kind not in self._warned and len(self._warned) < WARNINGS:
                self._warned.add(kind)
                log.warning("verifier %s, response %s: %s: %s", kind[0], rollout.id, score.status, score.reason)

    def _run(self) -> None:
        """A worker's thread: one job after the other, one worker after the other."""
        worker: _Worker | None = None
        failure: Exception | None = None
        while True:
            try:
                worker = worker or self._hatch()
            except Exception as error:  # every job is told; the thread goes on telling
                failure = error
            job = self._jobs.get()
            if job is None:
                return
            if failure:
                job.future.set_exception(failure)
            elif worker and not self._feed(job, worker):
                worker = None

    def _hatch(self) -> _Worker:
        """A new worker, of a new nursery if the old one died."""
        with self._nursery_lock:
            for _ in range(HATCH_ATTEMPTS):
                if self._closed:
                    raise WorkersCannotStart("the reward pool is closed")
                if self._nursery is None or not self._nursery.alive:
                    self._nursery = _Nursery(self._modules)
                try:
                    return self._nursery.hatch()
                except (EOFError, OSError):  # killed this moment
                    self._nursery.kill()
        raise WorkersCannotStart(f"the reward workers' nursery died {HATCH_ATTEMPTS} times")

    def _feed(self, job: _Job, worker: _Worker) -> bool:
        """Score the job, or what can be had of it from this worker: False when the worker is lost."""
        if not job.future.running() and not job.future.set_running_or_notify_cancel():
            return True  # nobody waits for it any more
        try:
            worker.connection.send(job.items[len(job.scores) :])
        except OSError:  # it died while it was idle, of nothing that these responses did
            self._jobs.put(job)
            return False
        alive = True
        while alive and len(job.scores) < len(job.items):
            score = worker.next_score(self._timeout_s)
            alive = score.status not in ("timeout", "error") or worker.alive
            job.scores.append(score)
        if len(job.scores) == len(job.items):
            job.future.set_result(job.scores)
        elif self._closed:
            job.future.set_exception(WorkersCannotStart("the reward pool was closed"))
        else:
            self._jobs.put(job)
        return alive


class _Worker:
    def __init__(self, nursery: _Nursery, connection: Connection[Any, Any], pid: int) -> None:
        self.connection = connection
        self.alive = True
        self._nursery = nursery
        self._pid = pid

    def next_score(self, timeout_s: float) -> Score:
        """What it sends, or why it will send nothing more (then `alive` is False)."""
        try:
            if self.connection.poll(timeout_s):
                score: Score = self.connection.recv()
                return score
            self._end()
            return Score(0.0, "timeout", reason=f"no verdict within reward.timeout_s={timeout_s:g}", seconds=timeout_s)
        except (EOFError, OSError):
            return Score(0.0, "error", reason=f"the verifier took its process down: {self._end()}")

    def _end(self) -> str:
        self.alive = False
        self.connection.close()
        os.killpg(self._pid, signal.SIGKILL)  # one that died by itself keeps its own exit code
        return self._nursery.reap(self._pid)


class _Nursery:
    """rewards.worker's `main` as a child process. It dies with the thread that makes it: the kernel counts threads as parents."""

    def __init__(self, modules: Mapping[str, str]) -> None:
        self._lock = threading.Lock()
        self._control, theirs = Pipe()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the process)
        arguments = [str(theirs.fileno()), str(os.getpid()), json.dumps(modules)]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", worker.__name__, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            pass_fds=[theirs.fileno()],
            env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C in the trainer's terminal does not reach it
        )
        theirs.close()
        self._expect_ready(self._control, "the reward workers' nursery")

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def hatch(self) -> _Worker:
        ours, theirs = Pipe()
        with self._lock:
            self._control.send(("fork",))
            send_handle(self._control, theirs.fileno(), self._process.pid)
            pid: int = self._control.recv()
        theirs.close()
        self._expect_ready(ours, "a reward worker")
        return _Worker(self, ours, pid)

    def reap(self, pid: int) -> str:
        """How a worker ended, once it has; until then nothing else can get its pid."""
        try:
            with self._lock:
                self._control.send(("reap", pid))
                code = os.waitstatus_to_exitcode(self._control.recv())
        except (EOFError, OSError):
            return "the nursery died too"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def kill(self) -> None:
        self._process.kill()  # its workers go with it
        self._process.wait()

    def _expect_ready(self, connection: Connection[Any, Any], who: str) -> None:
        try:
            if connection.poll(START_TIMEOUT_S) and connection.recv() == "ready":
                return
        except (EOFError, OSError):
            pass
        self.kill()
        self._errors.seek(0)
        words = self._errors.read().decode(errors="replace").strip().splitlines()
        raise WorkersCannotStart(f"{who} does not start: {words[-1] if words else 'it says nothing'}")
