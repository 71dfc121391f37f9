"""Verifiers in killable processes, behind one awaitable call.

Each worker process has a thread here that feeds it and watches its clock; threads are idle while workers are. Responses travel in
batches, scores come back one by one, so that a hanging response is known by being the next one.

Invariants:
- scores come back in the order of their rollouts, one each, whatever happened to the workers on the way;
- a response that takes longer than `timeout_s`, or more processor time than its worker may, is a `timeout`; one that takes its
  worker down otherwise an `error`; the others of its batch get their own scores, from another worker;
- a worker that has grown past `RETIRED_AT` is replaced between two batches: memory stays flat whatever verifiers leave behind;
- what a length or a mixture does to rewards it does here, once, to judgements alone;
- no process outlives the pool or the trainer, even one killed by SIGKILL; a pool is closed at once, also while workers still start;
- the pool serves any event loop, several calls at once, and raises only if workers cannot start at all.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import pickle
import queue
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron_rl import verifiers
from megatron_rl.config.errors import UserError
from megatron_rl.rewards import sandbox, worker
from megatron_rl.types import Prompt, Rollout, Score
from megatron_rl.verifiers.mixture import OWN, mixed

log = logging.getLogger(__name__)
START_TIMEOUT_S = 300.0  # a second's imports, on a machine where everything else starts too
LOOK_S = 0.1  # between two looks whether who starts is still wanted
BATCH = 32  # responses per message, at most; fewer where that lets every worker have some
HATCH_ATTEMPTS = 3
WARNINGS = 20  # different failures that are logged
RETIRED_AT = 2**30  # bytes of resident memory; a fresh worker shares its nursery's, about 0.2 GB
LIMITS = worker.Limits()
OUT_OF_CPU = "killed by SIGXCPU"
CLOSED = "the reward pool is closed"
Shape = Callable[[Score, int], Score]  # a judgement and the tokens of its response


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
        *,
        limits: worker.Limits = LIMITS,
        metadata: Mapping[str, Any] = MappingProxyType({}),
        mixture: Mapping[str, float] = MappingProxyType({}),
        shape: Shape | None = None,
        code: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """`metadata` is what prompts leave open, `mixture` the weights of verifiers, `shape` what lengths do to judgements, `code`
        the settings of the verifier of that name."""
        self._timeout_s = timeout_s
        self._limits = limits
        self._code = dict(code)
        self._metadata = dict(metadata)
        self._mixture = dict(mixture)
        for name in set(mixture) - {OWN}:
            if name not in verifiers.MODULES or name == "mixture":
                known = ", ".join([OWN, *sorted(set(verifiers.MODULES) - {"mixture"})])
                raise UserError(f"reward.mixture: unknown verifier {name!r}; known are {known}")
        self._shape = shape
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

    def expect(self, prompts: Iterable[Prompt]) -> None:
        """A UserError now, rather than at the first response, where no answer to one of these prompts could be judged here."""
        names = {name for prompt in prompts for name in (prompt.verifier, *prompt.metadata.get("mixture", ()))}
        if "code" in names | set(self._mixture):
            sandbox.require(bool(self._code.get("unsafe")))

    async def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        self.expect(rollout.prompt for rollout in rollouts)
        items = [self._item(rollout) for rollout in rollouts]
        size = max(1, min(BATCH, -(-len(items) // len(self._threads))))
        jobs = [_Job(items[i : i + size]) for i in range(0, len(items), size)]
        for job in jobs:
            self._jobs.put(job)
        batches = await asyncio.gather(*(asyncio.wrap_future(job.future) for job in jobs))
        scores = [score for batch in batches for score in batch]
        self._report(rollouts, scores)
        shape = self._shape
        if shape is None:
            return scores
        return [shape(s, len(r.tokens)) if s.is_judgement else s for r, s in zip(rollouts, scores, strict=True)]

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

    def _item(self, rollout: Rollout) -> bytes:
        prompt = mixed(replace(rollout.prompt, tokens=(), metadata={**self._metadata, **rollout.prompt.metadata}), self._mixture)
        return pickle.dumps((prompt.verifier, self._decode(rollout.tokens), prompt))

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
                    raise WorkersCannotStart(CLOSED)
                if self._nursery is None or not self._nursery.alive:
                    self._nursery = _Nursery(self._modules, self._limits, self._code, lambda: self._closed)
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
            score = worker.next_score(self._timeout_s, self._limits.cpu_s)
            alive = score.status not in ("timeout", "error") or worker.alive
            job.scores.append(score)
        if len(job.scores) == len(job.items):
            job.future.set_result(job.scores)
        elif self._closed:
            job.future.set_exception(WorkersCannotStart(CLOSED))
        else:
            self._jobs.put(job)
        return alive and not worker.retired()


class _Worker:
    def __init__(self, nursery: _Nursery, connection: Connection[Any, Any], pid: int) -> None:
        self.connection = connection
        self.alive = True
        self._nursery = nursery
        self._pid = pid

    def retired(self) -> bool:
        """Whether it had to go for its size."""
        try:
            pages = int(Path(f"/proc/{self._pid}/statm").read_bytes().split()[1])
        except OSError:  # it is gone by itself: the next batch will find that
            return False
        if pages * resource.getpagesize() > RETIRED_AT:
            self._end()
        return not self.alive

    def next_score(self, timeout_s: float, cpu_s: float) -> Score:
        """What it sends, or why it will send nothing more (then `alive` is False)."""
        try:
            if self.connection.poll(timeout_s):
                score: Score = self.connection.recv()
                return score
            self._end()
            return Score(0.0, "timeout", reason=f"no verdict within reward.timeout_s={timeout_s:g}", seconds=timeout_s)
        except (EOFError, OSError):
            end = self._end()
            if end == OUT_OF_CPU:
                return Score(0.0, "timeout", reason=f"no verdict within reward.cpu_s={cpu_s:g}", seconds=cpu_s)
            return Score(0.0, "error", reason=f"the verifier took its process down: {end}")

    def _end(self) -> str:
        self.alive = False
        self.connection.close()
        os.killpg(self._pid, signal.SIGKILL)  # one that died by itself keeps its own exit code
        return self._nursery.reap(self._pid)


class _Nursery:
    """rewards.worker's `main` as a child process. It dies with the thread that makes it: the kernel counts threads as parents."""

    def __init__(
        self, modules: Mapping[str, str], limits: worker.Limits, code: Mapping[str, Any], is_closed: Callable[[], bool]
    ) -> None:
        self._lock = threading.Lock()
        self._is_closed = is_closed
        self._control, theirs = Pipe()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the process)
        arguments = [str(theirs.fileno()), str(os.getpid()), json.dumps(modules), json.dumps(asdict(limits)), json.dumps(code)]
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
        given_up = time.monotonic() + START_TIMEOUT_S
        try:
            while time.monotonic() < given_up and not self._is_closed():
                if connection.poll(LOOK_S):
                    if connection.recv() == "ready":
                        return
                    break
        except (EOFError, OSError):
            pass
        self.kill()
        if self._is_closed():
            raise WorkersCannotStart(CLOSED)
        self._errors.seek(0)
        words = self._errors.read().decode(errors="replace").strip().splitlines()
        raise WorkersCannotStart(f"{who} does not start: {words[-1] if words else 'it says nothing'}")
