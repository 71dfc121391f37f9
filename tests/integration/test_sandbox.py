"""Invariants of rewards/sandbox.py and rewards/code.py: hostile programs gain nothing and leave nothing behind.

A program of `ATTACKS` prints WIN only if it got what it is after, and WIN is what its test expects: an attack that works is a
reward. Functions of `FRAUDS` want a verdict that their values do not deserve.
"""

from __future__ import annotations

import ast
import asyncio
import gzip
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_rl.config.errors import UserError
from megatron_rl.rewards import bubblewrap, sandbox
from megatron_rl.rewards.code import Runner
from megatron_rl.rewards.pool import RewardPool
from megatron_rl.types import Prompt, Rollout, Score

PATIENT = Runner(timeout_s=40.0, memory_mb=256, processes=12, output_kb=64)
HASTY = Runner(timeout_s=2.0, memory_mb=256, processes=12, output_kb=64)
pytestmark = pytest.mark.skipif(bool(sandbox.missing()), reason=f"no sandbox here: {sandbox.missing()}")

ATTACKS = {
    "a fork bomb": """
        import os
        alive = 0
        try:
            while alive < 100:
                if os.fork() == 0:
                    import time; time.sleep(100)
                alive += 1
        except OSError:
            pass
        if alive > 12: print("WIN")""",
    "a fork bomb of threads": """
        import threading, time
        started = 0
        try:
            while started < 100:
                threading.Thread(target=time.sleep, args=(100,), daemon=True).start(); started += 1
        except RuntimeError:
            pass
        if started > 12: print("WIN")""",
    "a memory bomb": "x = bytearray(2**30)\nprint('WIN')",
    "a memory bomb in pieces, over processes": """
        import os, time
        for _ in range(6):
            if os.fork() == 0: break
        x = []
        for _ in range(12): x.append(bytearray(b"x" * (10 * 2**20)))
        time.sleep(2)
        print("WIN")""",
    "memory outside of any process": """
        import ctypes, os
        libc = ctypes.CDLL(None)
        won = libc.shmget(0, 2**30, 0o1600) != -1 or libc.memfd_create(b"x", 0) != -1
        if won: print("WIN")""",
    "infinite output": "print('WIN')\nwhile True: print('x' * 10_000)",
    "infinite error output": "import sys\nwhile True: sys.stderr.write('x' * 10_000)\nprint('WIN')",
    "a disk bomb": """
        written = 0
        try:
            for i in range(40):
                with open(f"f{i}", "wb") as f: written += f.write(bytes(4 * 2**20))
        except OSError: pass
        if written > 70 * 2**20: print("WIN")""",
    "a big file": "open('f', 'wb').write(bytes(20 * 2**20))\nopen('f', 'rb').seek(17 * 2**20)\nprint('WIN')",
    "raising its limits": """
        import resource
        for name in (resource.RLIMIT_AS, resource.RLIMIT_NPROC, resource.RLIMIT_CPU):
            try: resource.setrlimit(name, (resource.RLIM_INFINITY,) * 2); print("WIN")
            except (ValueError, OSError): pass""",
    "reading a file of the host": "print(open({secret_file!r}).read())",
    "reading any file that has no business here": """
        import os
        for path in "/etc/passwd /etc/hostname /root /home /var /usr/bin /sys /proc /run /boot {repo}".split():
            if os.path.exists(path): print("WIN")""",
    "reading installed packages": "import numpy\nprint('WIN')",
    "reading the environment": "import os\nprint(os.environ['SECRET'])",
    "reading the environment of its parents": """
        for pid in (1, 2, "self"):
            try: open(f"/proc/{{pid}}/environ").read(); print("WIN")
            except OSError: pass""",
    "writing where it was not asked to": """
        import os, sys
        for folder in "/ /usr /usr/lib /python /python/bin /python/lib /python/lib/python3.11 /dev /lib".split():
            try: open(folder + "/trace", "w"); print("WIN")
            except OSError: pass""",
    "changing the library for the next": "import os\nopen(os.__file__, 'a').write('x')\nprint('WIN')",
    "reading the harness": "import megatron_rl\nprint('WIN')",
    "leaving a file in /tmp": "open('/tmp/{mark}', 'w').write('x')\nopen('{mark}', 'w').write('x')",
    "a symlink out of the box": """
        import os
        os.symlink("/", "up"); os.symlink({secret_file!r}, "link")
        for path in ("up/etc/passwd", "link", "up/../../../../etc/passwd"):
            try: open(path).read(); print("WIN")
            except OSError: pass""",
    "climbing out of the root": """
        import os
        try: os.chroot("/tmp"); print("WIN")
        except OSError: pass
        for _ in range(50): os.chdir("..")
        if os.path.exists("etc"): print("WIN")""",
    "a namespace within the namespace": """
        import ctypes, os
        libc = ctypes.CDLL(None)
        if libc.unshare(0x10000000) == 0: print("WIN")
        if libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) == 0: print("WIN")""",
    "becoming somebody": """
        import os
        for id in (0, 1, 1000, 65534):
            try: os.setuid(id); print("WIN")
            except OSError: pass
        if os.getuid() == 0: print("WIN")""",
    "a device": """
        import os, stat
        try: os.mknod("/tmp/sda", stat.S_IFBLK | 0o666, os.makedev(8, 0)); print("WIN")
        except OSError: pass
        if set(os.listdir("/dev")) - {{"null", "zero", "urandom"}}: print("WIN")""",
    "looking into its parent": """
        import ctypes, os
        libc = ctypes.CDLL(None)
        if libc.ptrace(16, os.getppid(), 0, 0) == 0: print("WIN")""",
    "the network: loopback": "import socket\nprint(socket.create_connection(('127.0.0.1', {port}), 5).recv(99).decode())",
    "the network: all of loopback": """
        import socket
        for host in ("127.0.0.1", "127.0.0.2", "localhost", "::1"):
            try: socket.create_connection((host, {port}), 5); print("WIN")
            except OSError: pass
        if [name for _, name in socket.if_nameindex() if name != "lo"]: print("WIN")""",
    "the network: a socket with an abstract name": """
        import socket
        s = socket.socket(socket.AF_UNIX); s.connect("\\0{mark}"); print(s.recv(99).decode())""",
    "a daemon": """
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(1000)
            os._exit(0)
        os.wait()""",
    "daemons that live on into the next test": """
        import os, time
        if os.path.exists("seen"): print("WIN")
        elif os.fork() == 0:
            os.setsid(); time.sleep(1000)""",
    "killing its parent": "import os\nos.kill(os.getppid(), 9)\nprint('WIN')",
    "killing everyone": "import os\nos.kill(-1, 9)\nprint('WIN')",
    "killing the first process": "import os, signal\nos.kill(1, signal.SIGKILL)\nos.kill(1, signal.SIGTERM)\nos._exit(0)",
    "signalling outside": """
        import os
        try: os.kill({pid}, 0); print("WIN")
        except OSError: pass""",
    "leaving early": "raise SystemExit(0)",
    "leaving at once": "import os\nos._exit(0)",
    "speaking for the harness": """
        import os
        words = b'{{"stdout": "WIN", "stdout_bytes": 3, "stderr": "", "exit": 0}}'
        for fd in range(3, 64):
            try: os.write(fd, len(words).to_bytes(4, "big") + words)
            except OSError: pass""",
    "looking for the expected output": """
        import gc, sys
        frame, found = sys._getframe(), []
        while frame: found += [v for v in frame.f_locals.values()]; frame = frame.f_back
        for x in [*found, *gc.get_objects()]:
            if isinstance(x, dict) and x is not globals():
                for v in list(x.values()):
                    if isinstance(v, dict) and "output" in v: print(v["output"])""",
    "printing the output of the visible test": "print('seen')",
    "null bytes and other odd text": "import sys\nsys.stdout.buffer.write(bytes(range(256)) * 10)",
}
SLOW = {
    "sleeping for ever": "import time\ntime.sleep(1e6)",
    "computing for ever": "while True: pass",
    "computing for ever, deaf to signals": """
        import signal
        for s in range(1, 64):
            try: signal.signal(s, signal.SIG_IGN)
            except (OSError, ValueError): pass
        while True: pass""",
    "stopping itself": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
    "stopping its parent": "import os, signal\nos.kill(os.getppid(), signal.SIGSTOP)",
}
FRAUDS = {
    "exit(0)": "exit(0)",
    "exit(0) when called": "def f(x): exit(0)",
    "os._exit(0) when called": "def f(x):\n    import os; os._exit(0)",
    "equal to everything": """
        class Any(int):
            def __eq__(self, other): return True
            def __ne__(self, other): return False
            __hash__ = int.__hash__
        def f(x): return Any(0)""",
    "an object that is equal to everything": """
        class Any:
            def __eq__(self, other): return True
        def f(x): return Any()""",
    "patching the checker": """
        import builtins, sys
        sys.modules["megatron_rl.rewards.cell.checks"] = None
        for module in list(sys.modules.values()):
            for name in ("encode", "decode", "exception", "described"):
                if hasattr(module, name): setattr(module, name, lambda *a: ["value", True])
        builtins.AssertionError = builtins.Exception = type("E", (BaseException,), {})
        def f(x): return 0""",
    "reading the test from the stack": """
        import gc, sys
        def f(x):
            frame = sys._getframe()
            while frame:
                if "check" in frame.f_globals or "check" in frame.f_locals or "sources" in frame.f_locals: return x * x
                frame = frame.f_back
            for thing in gc.get_objects():
                if isinstance(thing, dict) and "sources" in thing: return x * x
            return 0""",
    "a forged verdict": """
        import os
        words = b'{"passed": 2, "failed": 0, "first": "", "ended": "", "lost": false, "broken": "", "calls": 2}'
        for fd in range(3, 64):
            try: os.write(fd, len(words).to_bytes(4, "big") + words)
            except OSError: pass
        def f(x): return 0""",
    "ending the test's loop": "def f(x): raise StopIteration",
    "a malformed answer": """
        import os
        def f(x):
            for fd in range(3, 64):
                try: os.write(fd, (2**31).to_bytes(4, "big"))
                except OSError: pass""",
    "an answer nested too deeply": """
        def f(x):
            out = []
            for _ in range(100_000): out = [out]
            return out""",
    "an endless answer": "import itertools\ndef f(x): return itertools.count()",
    "a recursion without end": "def f(x): return f(x)",
    "an exception whose words fail": """
        class Bad(Exception):
            def __str__(self): raise SystemExit(0)
        def f(x): raise Bad""",
    "printing": "def f(x): print(x * x)",
    "changing its argument": "def f(x): x = x * x",
    "the values of the visible test": "def f(x): return {1: 1}.get(x)",
    "no function": "g = 1",
}
TEST = (
    "def check(candidate):\n    for x in (1, 3):\n        assert candidate(x) == x * x, 'square'\n    assert candidate(5) == 25\n"
)


def judged(runner: Runner, program: str, **metadata: Any) -> Score:
    return runner.verify(f"```python\n{textwrap.dedent(program).strip()}\n```", Prompt("p", "", (), "", "code", metadata=metadata))


def expecting(*outputs: str) -> list[dict[str, str]]:
    return [{"input": "", "output": output} for output in outputs]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    assert not psutil.Process().children(recursive=True)
    if os.geteuid() == 0:  # a cell's users are this process's alone
        first = bubblewrap.FIRST_UID + os.getpid() * bubblewrap.UIDS
        everyone = psutil.process_iter(["uids", "cmdline"])
        assert not [p.info for p in everyone if p.info["uids"] and p.info["uids"].real in range(first, first + bubblewrap.UIDS)]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Secrets that a process on this machine could get at."""
    folder = tmp_path_factory.mktemp("host")
    mark = f"sandbox-trace-{os.getpid()}"
    (folder / "secret").write_text("WIN")
    (folder / "secret").chmod(0o644)
    servers = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)]
    servers[1].bind(f"\0{mark}")
    servers[1].listen()

    def tell(server: socket.socket) -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                connection.sendall(b"WIN")

    for server in servers:
        threading.Thread(target=tell, args=(server,), daemon=True).start()
    os.environ["SECRET"] = "WIN"
    repo = str(Path(__file__).resolve().parents[2])
    port = servers[0].getsockname()[1]
    with socket.create_connection(("127.0.0.1", port), 5) as here:
        assert here.recv(9) == b"WIN"  # it is there to be had
    yield {"mark": mark, "secret_file": str(folder / "secret"), "port": port, "repo": repo, "pid": os.getpid()}
    del os.environ["SECRET"]
    for server in servers:
        server.shutdown(socket.SHUT_RDWR)
        server.close()


def filled(program: str, host: dict[str, Any]) -> str:
    return program.format(**host) if "{mark}" in program or re.search(r"\{(secret_file|port|pid|repo|\{)", program) else program


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_gains_nothing_and_leaves_nothing(name: str, host: dict[str, Any]) -> None:
    score = judged(PATIENT, filled(ATTACKS[name], host), cases=expecting("WIN"))
    assert (score.status, score.value) == ("wrong", 0.0), score
    assert "Syntax" not in score.reason
    assert "NameError" not in score.reason
    for folder in ("/tmp", "/", os.environ["HOME"], str(Path.cwd()), host["repo"]):
        assert not (Path(folder) / host["mark"]).exists()


@pytest.mark.parametrize("name", SLOW)
def test_a_program_that_does_not_end_is_a_timeout(name: str) -> None:
    started = time.monotonic()
    score = judged(HASTY, SLOW[name], cases=expecting(""))
    assert (score.status, score.value) == ("timeout", 0.0), score
    assert "reward.code.timeout_s=2" in score.reason
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("name", FRAUDS)
def test_a_fraud_of_the_checks_gains_nothing(name: str) -> None:
    """Where each test counts, so that a single one that passes would show."""
    runner = Runner(marks="fraction", timeout_s=40.0, memory_mb=256, processes=12)
    score = judged(runner, FRAUDS[name], entry_point="f", test=TEST)
    honest = 1 / 3 if name == "the values of the visible test" else 0.0
    assert score.status == "wrong", score
    assert score.value == pytest.approx(honest), score


def test_honest_programs_pass(host: dict[str, Any]) -> None:
    assert judged(PATIENT, "def f(x): return x * x", entry_point="f", test=TEST).status == "correct"
    cases = [{"input": "1 2\n", "output": "3\n"}, {"input": "4 5", "output": "9"}]
    assert judged(PATIENT, "print(sum(map(int, input().split())))", cases=cases).value == 1.0
    useful = """
        import sys, subprocess, tempfile, threading, hashlib, random, sqlite3
        from concurrent.futures import ThreadPoolExecutor
        if __name__ == "__main__":
            with tempfile.NamedTemporaryFile("w") as f: f.write("x")
            print(list(ThreadPoolExecutor(3).map(abs, [-1, 2])))
            threading.Thread(target=print, args=("late",)).start()
            exit()"""
    score = judged(PATIENT, useful, cases=expecting("[1, 2]\nlate"))
    assert score.status == "correct", score


def test_the_pool_gives_the_settings_to_its_workers_and_a_slow_program_holds_up_no_other() -> None:
    texts = [f"```python\n{program}\n```" for program in ("print(input())", "print(1)", "while True: pass", "print(input())")]
    prompt = Prompt("p", "", (1,), "", "code", metadata={"cases": [{"input": str(i), "output": str(i)} for i in range(2)]})
    rollouts = [Rollout(f"0:p#{i}", prompt, i, (i,), (0.0,), (0,), "stop") for i in range(len(texts))]
    pool = RewardPool(2, 60.0, lambda tokens: texts[tokens[0]], code={"marks": "fraction", "timeout_s": 4.0})
    try:
        scores = asyncio.run(pool.score(rollouts))
    finally:
        pool.close()
    assert [(score.status, score.value) for score in scores] == [("correct", 1), ("wrong", 0.5), ("timeout", 0), ("correct", 1)]
    assert "reward.code.timeout_s=4" in scores[2].reason


def test_marks_by_fraction_count_what_passes() -> None:
    runner = Runner(marks="fraction", timeout_s=40.0)
    cases = [{"input": str(i), "output": str(i * i)} for i in range(4)]
    score = judged(runner, "x = int(input())\nprint(x * x if x < 3 else 1 // 0)", cases=cases)
    assert (score.status, score.value) == ("wrong", 0.75)
    assert "3 of 4 tests pass; test 3: exit code 1: ZeroDivisionError" in score.reason
    score = judged(runner, "def f(x): return x * x if x < 5 else None", entry_point="f", test=TEST)
    assert (score.status, score.value) == ("wrong", pytest.approx(2 / 3))
    assert "candidate(5) == 25: got None" in score.reason


@pytest.mark.parametrize(
    ("test", "reason"),
    [
        ("def check(c:", "is not Python"),
        ("def check(c): assert 1", "never calls f"),
        ("assert f(lambda: 1)", "a function is no plain value"),
        ("import numpy\nassert f(1)", "fails by itself: ModuleNotFoundError"),
        ("assert gone(1) == f(1)", "never calls f: test 0: gone(1) == f(1): NameError"),
    ],
)
def test_tests_that_cannot_run_are_an_error(test: str, reason: str) -> None:
    score = judged(PATIENT, "def f(x): return x", entry_point="f", test=test)
    assert (score.status, score.value) == ("error", 0.0)
    assert reason in score.reason


def test_with_the_process_that_made_it_a_cell_dies() -> None:
    code = """
        import os, sys, time
        from megatron_rl.rewards.bubblewrap import Limits
        from megatron_rl.rewards.sandbox import Cell
        cell = Cell("stdio", Limits(60.0))
        cell.ready()
        cell.send({"program": "import time; time.sleep(1000)", "output_limit": 10}, time.monotonic() + 60)
        cell.send({"input": ""}, time.monotonic() + 60)
        print("up", flush=True)
        time.sleep(1000)"""
    maker = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert maker.stdout
    assert maker.stdout.readline() == "up\n"
    deadline = time.monotonic() + 20
    while len(found := psutil.Process(maker.pid).children(recursive=True)) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(found) == 4  # bubblewrap, the namespace's first process, the harness and its program
    maker.send_signal(signal.SIGKILL)
    maker.wait()
    _, alive = psutil.wait_procs(found, timeout=20)
    assert not alive


def test_without_a_sandbox_no_program_is_started_unless_told_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    sandbox.missing.cache_clear()
    try:
        with pytest.raises(UserError, match=r"needs a sandbox: bubblewrap is not installed.*reward\.code\.unsafe=true") as caught:
            judged(PATIENT, f"open({str(tmp_path / 'trace')!r}, 'w')", cases=expecting(""))
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "trace").exists()
        unsafe = Runner(timeout_s=3.0, memory_mb=256, unsafe=True)
        assert judged(unsafe, "print(1)", cases=expecting("1")).status == "correct"
        assert judged(unsafe, "def f(x): return x * x", entry_point="f", test=TEST).status == "correct"
        assert judged(unsafe, "import os\nprint(os.environ.get('HOME'))", cases=expecting("None")).status == "correct"
        assert "MemoryError" in judged(unsafe, "bytearray(2**30)", cases=expecting("")).reason
        assert judged(unsafe, "import time\ntime.sleep(100)", cases=expecting("")).status == "timeout"
    finally:
        sandbox.missing.cache_clear()


def test_a_sandbox_that_does_not_start_is_no_fault_of_the_response() -> None:
    with pytest.raises(sandbox.DoesNotStart, match="exit code"):
        judged(Runner(memory_mb=2**60), "print(1)", cases=expecting("1"))


def test_a_bubblewrap_that_does_not_work_is_no_sandbox(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "bwrap"
    fake.write_text(f"#!{shutil.which('sh')}\necho 'bwrap: setting up uid map: Permission denied' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    sandbox.missing.cache_clear()
    try:
        with pytest.raises(UserError, match="cannot make one: bwrap: setting up uid map: Permission denied"):
            sandbox.require(unsafe=False)
        pool = RewardPool(1, 60.0, lambda tokens: "", {"exact": "megatron_rl.verifiers.exact"})
        pool.expect([Prompt("p", "", (), "", "exact")])
        with pytest.raises(UserError, match="needs a sandbox"):
            pool.expect([Prompt("p", "", (), "", "mixture", metadata={"mixture": {"code": 1.0}})])
        pool.close()
    finally:
        sandbox.missing.cache_clear()


class _Mutation(ast.NodeTransformer):
    """Whatever is returned is returned with something beside it."""

    def visit_Return(self, node: ast.Return) -> ast.Return:
        return ast.Return(ast.Tuple([node.value or ast.Constant(None), ast.Constant("else")], ast.Load()))


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_humaneval_solutions_pass_and_mutated_ones_fail(shared_data: Path, every: int) -> None:
    data = shared_data / "code" / "HumanEval.jsonl.gz"
    if not data.exists():
        pytest.skip(f"{data} is absent")
    with gzip.open(data, "rt") as lines:
        rows = [json.loads(line) for line in lines][::every]

    def both(row: dict[str, str]) -> tuple[str, Score, Score]:
        metadata = {"entry_point": row["entry_point"], "test": row["test"]}
        prompt = Prompt(row["task_id"], row["prompt"], (), "", "code", metadata=metadata)
        mutated = ast.unparse(ast.fix_missing_locations(_Mutation().visit(ast.parse(row["prompt"] + row["canonical_solution"]))))
        right, wrong = (PATIENT.verify(text, prompt) for text in (row["canonical_solution"], f"```python\n{mutated}\n```"))
        return row["task_id"], right, wrong

    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(both, rows))
    assert len(results) == -(-164 // every)
    assert not [(id, right.reason) for id, right, _ in results if right.status != "correct"]
    assert not [(id, wrong) for id, _, wrong in results if wrong.status != "wrong"]
