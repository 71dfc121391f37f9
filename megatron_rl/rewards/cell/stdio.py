"""Role: run the response's program once per input, each time in a process forked for it.

The worker sends the program, then one input after the other; the answer to each is what the program wrote and how it ended. No
expected output is ever sent. Standard streams are unnamed files, so that RLIMIT_FSIZE bounds them and nobody has to pump them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import types
from typing import Any

from megatron_rl.rewards.cell.channel import Channel
from megatron_rl.rewards.cell.program import as_main, compiled

STDERR = 2000  # last bytes that are told


def main(worker: Channel) -> None:
    task = worker.receive()
    code = compiled(task["program"])
    while True:
        try:
            case = worker.receive()
        except EOFError:
            return
        worker.send(run(code, case["input"], task["output_limit"], worker))


def run(code: types.CodeType, text: str, limit: int, worker: Channel) -> dict[str, Any]:
    streams = [unnamed(str(i)) for i in range(3)]
    os.write(streams[0], text.encode())
    os.lseek(streams[0], 0, os.SEEK_SET)
    pid = os.fork()
    if pid == 0:
        worker.close()
        os.setsid()
        for i, stream in enumerate(streams):
            os.dup2(stream, i)
            os.close(stream)
        os._exit(script(code))
    status = os.waitpid(pid, 0)[1]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    size = os.fstat(streams[1]).st_size
    answer = {
        "stdout": os.pread(streams[1], limit, 0).decode(errors="replace") if size <= limit else "",
        "stdout_bytes": size,
        "stderr": os.pread(streams[2], STDERR, max(0, os.fstat(streams[2]).st_size - STDERR)).decode(errors="replace"),
        "exit": os.waitstatus_to_exitcode(status),
    }
    for stream in streams:
        os.close(stream)
    return answer


def script(code: types.CodeType) -> int:
    """The program's exit code."""
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115 (they are the standard streams)
    try:
        try:
            as_main(code)
        finally:
            if "threading" in sys.modules:
                sys.modules["threading"]._shutdown()  # waits for the program's threads, as the interpreter does at its end
            sys.stdout.flush()
    except SystemExit as leave:
        if isinstance(leave.code, int):
            return leave.code & 0xFF
        return 0 if leave.code is None else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        return 1
    return 0


def unnamed(name: str) -> int:
    fd = os.open(f".{os.getpid()}.{name}", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.unlink(f".{os.getpid()}.{name}")  # noqa: PTH108 (pathlib takes milliseconds to import)
    return fd
