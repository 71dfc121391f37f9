"""Invariants of megatron_rl/rewards, with verifiers that misbehave (support/bad_verifiers.py)."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from megatron_rl import verifiers
from megatron_rl.config.errors import UserError
from megatron_rl.config.rollout import LengthConfig
from megatron_rl.rewards.pool import RewardPool, WorkersCannotStart
from megatron_rl.rewards.shaping import length_shape
from megatron_rl.rewards.worker import FILE_BYTES, Limits
from megatron_rl.types import Prompt, Rollout, Score
from megatron_rl.verifiers.mixture import OWN

SUPPORT = Path(__file__).resolve().parents[1] / "support"
TIMEOUT_S = 1.0


def rollouts(texts: Sequence[str], verifier: str = "bad", answer: str = "") -> list[Rollout]:
    """`decode` is the identity on code points here."""
    out = []
    for i, text in enumerate(texts):
        tokens = tuple(map(ord, text))
        filler = (0,) * len(tokens)
        out.append(Rollout(f"0:p#{i}", Prompt("p", "", (1,), answer, verifier), i, tokens, filler, filler, "stop"))
    return out


def make_pool(workers: int, modules: dict[str, str] | None = None) -> RewardPool:
    modules = modules or {"bad": "bad_verifiers", "exact": "megatron_rl.verifiers.exact"}
    return RewardPool(workers, TIMEOUT_S, lambda tokens: "".join(map(chr, tokens)), modules)


@pytest.fixture(scope="module")
def pools() -> Iterator[Callable[[int], RewardPool]]:
    made: dict[int, RewardPool] = {}
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(SUPPORT)

    def made_once(workers: int) -> RewardPool:
        if workers not in made:
            made[workers] = make_pool(workers)
        return made[workers]

    yield made_once
    for pool in made.values():
        pool.close()
    os.environ.pop("PYTHONPATH") if path is None else os.environ.update(PYTHONPATH=path)


def score(pool: RewardPool, texts: Sequence[str]) -> list[Score]:
    return asyncio.run(pool.score(rollouts(texts)))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("bad", ["hang", "sleep 60", "child"])
def test_a_response_over_its_limit_is_a_timeout_and_the_others_are_scored(
    pools: Callable[[int], RewardPool], workers: int, bad: str
) -> None:
    scores = score(pools(workers), ["ok 1", "ok 2", bad, "ok 3", "ok 4"])
    assert [s.status for s in scores] == ["correct", "correct", "timeout", "correct", "correct"]
    assert [s.value for s in scores] == [1, 2, 0, 3, 4]
    assert scores[2].seconds == TIMEOUT_S
    assert "reward.timeout_s=1" in scores[2].reason


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("exit 3", "took its process down: exit code 3"),
        ("exit 0", "took its process down: exit code 0"),
        ("signal 11", "took its process down: killed by SIGSEGV"),
        ("signal 9", "took its process down: killed by SIGKILL"),
        ("close", "took its process down"),
        ("memory", "MemoryError"),
        ("raise oh no", "ValueError: oh no"),
        ("nan", "value is nan"),
    ],
)
def test_a_crash_is_an_error_with_its_reason_and_the_others_are_scored(
    pools: Callable[[int], RewardPool], bad: str, reason: str
) -> None:
    scores = score(pools(1), ["ok 1", bad, "ok 2"])
    assert [s.status for s in scores] == ["correct", "error", "correct"]
    assert [s.value for s in scores] == [1, 0, 2]
    assert reason in scores[1].reason


def test_scores_keep_the_order_of_their_rollouts(pools: Callable[[int], RewardPool]) -> None:
    texts = [f"sleep {(i * 7) % 5 / 1000}" if i % 10 == 0 else f"ok {i}" for i in range(200)]
    scores = score(pools(2), texts)
    assert [s.reason for s in scores] == texts
    assert score(pools(2), []) == []


def test_several_calls_at_once_and_a_loop_that_stays_free(pools: Callable[[int], RewardPool]) -> None:
    async def main() -> int:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        ticking = asyncio.create_task(tick())
        batches = await asyncio.gather(*(pools(2).score(rollouts([f"ok {i}", "sleep 0.2", f"ok {-i}"])) for i in range(4)))
        ticking.cancel()
        assert [[s.value for s in batch][::2] for batch in batches] == [[i, -i] for i in range(4)]
        return ticks

    assert asyncio.run(main()) >= 10


def test_a_cancelled_call_leaves_the_pool_usable(pools: Callable[[int], RewardPool]) -> None:
    async def main() -> list[Score]:
        lost = asyncio.create_task(pools(1).score(rollouts(["sleep 0.3"] * 3)))
        await asyncio.sleep(0.1)
        lost.cancel()
        return await pools(1).score(rollouts(["ok 5"]))

    assert [s.value for s in asyncio.run(main())] == [5]


def test_a_truncated_response_is_scored_as_it_stands(pools: Callable[[int], RewardPool]) -> None:
    rollout = Rollout("0:p#0", Prompt("p", "", (1,), "12", "exact"), 0, (49, 50), (0.0, 0.0), (0, 0), "length")
    assert asyncio.run(pools(1).score([rollout]))[0].status == "correct"


def test_a_verifier_the_pool_does_not_have_is_an_error(pools: Callable[[int], RewardPool]) -> None:
    assert asyncio.run(pools(1).score(rollouts(["x"], verifier="absent")))[0].reason == "KeyError: 'absent'"


def test_failures_are_logged_once_by_name(pools: Callable[[int], RewardPool], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        score(pools(1), ["raise once", "raise once", "ok 1"])
        score(pools(1), ["raise once"])
    assert caplog.text.count("verifier bad, response 0:p#0: error: ValueError: once") == 1
    assert "0:p#1" not in caplog.text


def processes_with(mark: str) -> dict[int, str]:
    """pid -> state of live processes that carry the mark in their environment."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if mark.encode() in (entry / "environ").read_bytes():
                    found[int(entry.name)] = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
    return {pid: state for pid, state in found.items() if state != "Z"}


def wait_until(condition: Callable[[], bool], seconds: float = 15.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


HOLDER = """
import asyncio, sys
from megatron_rl.rewards.pool import RewardPool
from megatron_rl.types import Prompt, Rollout
texts = sys.argv[1:]
pool = RewardPool(2, 600.0, lambda tokens: texts[tokens[0]], {"bad": "bad_verifiers"})
rollouts = [Rollout(str(i), Prompt("p", "", (1,), "", "bad"), i, (i,), (0.0,), (0,), "stop") for i in range(len(texts))]
print(asyncio.run(pool.score(rollouts[:2])), flush=True)
asyncio.run(pool.score(rollouts))
"""


@pytest.mark.parametrize("texts", [["ok 1", "ok 2", "hang"], ["ok 1", "ok 2", "sleep 600", "hang"]])
def test_no_process_outlives_a_trainer_killed_by_sigkill(texts: list[str]) -> None:
    mark = f"REWARD_POOL_TEST={os.getpid()}-{time.monotonic_ns()}"
    name, _, value = mark.partition("=")
    environment = os.environ | {name: value, "PYTHONPATH": str(SUPPORT)}
    holder = subprocess.Popen([sys.executable, "-P", "-c", HOLDER, *texts], env=environment, stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert b"correct" in holder.stdout.readline()
        assert wait_until(lambda: len(processes_with(mark)) == 4)  # itself, the nursery, two workers
        holder.kill()
        holder.wait()
        assert wait_until(lambda: not processes_with(mark)), processes_with(mark)
    finally:
        for pid in processes_with(mark):
            os.kill(pid, signal.SIGKILL)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture
def own_pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[RewardPool, int]]:
    """A pool of one warm worker, and its nursery's pid."""
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT))
    pool = make_pool(1)
    score(pool, ["ok 1"])
    assert pool._nursery is not None
    yield pool, pool._nursery._process.pid
    pool.close()


def test_a_closed_pool_leaves_no_process_and_says_so(own_pool: tuple[RewardPool, int]) -> None:
    pool, nursery = own_pool
    (worker,) = children(nursery)

    async def main() -> None:
        waiting = asyncio.create_task(pool.score(rollouts(["sleep 0.4"] * 2 + ["hang"])))
        await asyncio.sleep(0.1)
        await asyncio.to_thread(pool.close)
        with pytest.raises((WorkersCannotStart, asyncio.CancelledError)):
            await waiting

    asyncio.run(main())
    assert not Path(f"/proc/{nursery}").exists()
    assert wait_until(lambda: not Path(f"/proc/{worker}").exists())


@pytest.mark.parametrize("victim", ["nursery", "worker"])
def test_a_pool_outlives_the_death_of_its_processes_while_idle(own_pool: tuple[RewardPool, int], victim: str) -> None:
    pool, nursery = own_pool
    (worker,) = children(nursery)
    os.kill(nursery if victim == "nursery" else worker, signal.SIGKILL)
    assert wait_until(lambda: victim == "worker" or not Path(f"/proc/{worker}").exists())
    assert [s.value for s in score(pool, [f"ok {i}" for i in range(5)])] == [0, 1, 2, 3, 4]


def test_idle_processes_use_no_cpu(own_pool: tuple[RewardPool, int]) -> None:
    _, nursery = own_pool

    def ticks() -> int:
        stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in (nursery, *children(nursery))]
        return sum(int(stat[11]) + int(stat[12]) for stat in stats)

    time.sleep(0.2)
    before, cpu = ticks(), time.process_time()
    time.sleep(1.0)
    assert ticks() - before <= 1
    assert time.process_time() - cpu < 0.5  # no thread here spins; those of other tests may still end


def test_workers_that_cannot_start_say_why() -> None:
    pool = make_pool(1, {"absent": "megatron_rl.verifiers.absent"})
    try:
        with pytest.raises(WorkersCannotStart, match=r"No module named 'megatron_rl\.verifiers\.absent'"):
            score(pool, ["ok 1"])
    finally:
        pool.close()


def test_a_pool_is_closed_at_once_while_its_workers_still_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends at its start, by a mistake or Ctrl-C, is not to wait for imports that nobody needs."""
    begun = tmp_path / "begun"
    (tmp_path / "slow_import.py").write_text(f"import time\nopen({str(begun)!r}, 'w').close()\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    pool = make_pool(2, {"slow": "slow_import"})
    assert wait_until(begun.exists, 60)
    started = time.monotonic()
    pool.close()
    assert time.monotonic() - started < 10


def limited_pool(**settings: Any) -> RewardPool:
    modules = {"bad": "bad_verifiers"} | {name: verifiers.MODULES[name] for name in ("exact", "format", "mixture")}
    return RewardPool(1, 20.0, lambda tokens: "".join(map(chr, tokens)), modules, **settings)


@pytest.fixture
def bad_verifiers_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT))


@pytest.mark.usefixtures("bad_verifiers_on_path")
def test_limits_of_a_worker(tmp_path: Path) -> None:
    pool = limited_pool(limits=Limits(cpu_s=1.0, memory_mb=2048))
    try:
        hung, file, grown, fresh, big = score(pool, ["hang", f"file {tmp_path / 'file'}", "grow 1100", "ok 1", "grow 3000"])
        assert (hung.status, hung.reason) == ("timeout", "no verdict within reward.cpu_s=1")
        assert (file.status, "File too large" in file.reason) == ("error", True)
        assert (tmp_path / "file").stat().st_size <= FILE_BYTES
        assert (big.status, big.reason) == ("error", "MemoryError: ")
        assert grown.extracted == fresh.extracted  # one worker in one batch
        (next_batch,) = score(pool, ["ok 1"])
        assert next_batch.extracted != grown.extracted  # the grown one is gone
    finally:
        pool.close()


@pytest.mark.usefixtures("bad_verifiers_on_path")
def test_weights_and_lengths_make_the_value_and_leave_the_status() -> None:
    shape = length_shape("cosine", 10, correct=(0.5, -0.5), correct_cap=0.25, wrong=(-0.5, 0.0), cache_tokens=1)
    pool = limited_pool(mixture={OWN: 3, "format": 1}, shape=shape, metadata={"format": ["boxed"]})
    try:
        right, wrong = asyncio.run(pool.score(rollouts([r"\boxed{1}", "1"], "exact", answer=r"\boxed{1}")))
        (failed,) = asyncio.run(pool.score(rollouts(["1"], "absent")))
    finally:
        pool.close()
    assert (right.status, right.value) == ("correct", pytest.approx(1.0 + 0.5 * math.cos(math.pi * 0.9)))
    assert right.reason.endswith("; length -0.476")
    assert (wrong.status, wrong.value) == ("wrong", pytest.approx(-0.25 * (1 + math.cos(math.pi * 0.1))))
    assert (failed.status, failed.value) == ("error", 0.0)  # no length counts where nothing was judged


def test_length_shapes() -> None:
    numbers: dict[str, Any] = {"correct": (0.5, -0.5), "correct_cap": 0.25, "wrong": (-0.5, 0.0), "cache_tokens": 20}
    right, wrong = Score(1.0, "correct", reason="x"), Score(0.0, "wrong")
    cosine = length_shape("cosine", 100, **numbers)
    assert [cosine(right, n).value for n in (0, 50, 100, 200)] == pytest.approx([1.25, 1.0, 0.5, 0.5])
    assert [cosine(wrong, n).value for n in (0, 50, 100)] == pytest.approx([-0.5, -0.25, 0.0])
    assert min(cosine(right, n).value for n in range(120)) > max(cosine(wrong, n).value for n in range(120))
    overlong = length_shape("soft_overlong", 100, **numbers)
    assert [overlong(right, n).value for n in (80, 90, 100)] == [1.0, 0.5, 0.0]
    assert overlong(right, 90) == Score(0.5, "correct", reason="x; length -0.5")


def test_a_wrong_answer_is_never_worth_more_by_configuration() -> None:
    with pytest.raises(ValidationError, match=r"a correct answer could be worth 0\.5 and a wrong one 0.6"):
        LengthConfig(method="cosine", wrong=(0.6, 0.0))
    with pytest.raises(ValidationError, match="cache_tokens=4096 is more than max_tokens=100"):
        LengthConfig(method="soft_overlong", max_tokens=100)


def test_a_mixture_of_an_unknown_verifier_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"reward\.mixture: unknown verifier 'maths'"):
        RewardPool(1, 1.0, str, mixture={"maths": 1.0})


def test_the_real_verifiers_in_a_pool() -> None:
    pool = RewardPool(1, 20.0, lambda tokens: "".join(map(chr, tokens)))
    try:
        right = asyncio.run(pool.score(rollouts([r"so \boxed{\frac{1}{2}}", "0.5", "nothing"], "math", answer="1/2")))
        assert [s.status for s in right] == ["correct", "correct", "unparsable"]
        assert asyncio.run(pool.score(rollouts([" 7 "], "exact", answer="7")))[0].status == "correct"
    finally:
        pool.close()
