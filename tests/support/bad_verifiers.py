"""A verifier that does what the response says."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from megatron_rl.types import Prompt, Score

hoard: list[bytes] = []


def verify(response: str, prompt: Prompt) -> Score:
    what, _, argument = response.partition(" ")
    if what == "hang":
        while True:
            pass
    if what == "sleep":
        time.sleep(float(argument))
    if what == "exit":
        os._exit(int(argument))
    if what == "signal":
        os.kill(os.getpid(), int(argument))
    if what == "raise":
        raise ValueError(argument)
    if what == "nan":
        return Score(float("nan"), "correct")
    if what == "memory":
        bytearray(64 * 2**30)
    if what == "grow":
        hoard.append(b"x" * (int(argument) * 2**20))
    if what == "file":
        Path(argument).write_bytes(bytes(128 * 2**20))
    if what == "close":
        os.closerange(3, 100)
        signal.pause()
    if what == "child":
        child = subprocess.Popen(["sleep", "600"], stdin=subprocess.DEVNULL)
        print("noise that nobody reads", child.pid)
        time.sleep(600)
    return Score(float(argument or 1.0), "correct", extracted=f"{os.getpid()}", reason=response)
