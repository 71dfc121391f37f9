"""The `torchrun` fixture that the dist tests stand on."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import RanksFailed

ALL_REDUCE = """
import os, sys
import torch, torch.distributed as dist
dist.init_process_group("gloo")
x = torch.tensor([dist.get_rank() + 1.0])
dist.all_reduce(x)
print(f"rank {dist.get_rank()} of {dist.get_world_size()}: {x.item():g} {sys.argv[1]} {os.environ['OMP_NUM_THREADS']}")
dist.destroy_process_group()
"""
LEAVES_A_CHILD = """
import os, subprocess, sys, time
child = subprocess.Popen(["sleep", "600"])
print("child", child.pid)
if os.environ["RANK"] == "1":
    raise SystemExit("rank one is unwell")
time.sleep(600)
"""


@pytest.mark.dist
def test_the_ranks_meet_and_their_stdout_comes_back_in_order(torchrun: Callable[..., str]) -> None:
    assert torchrun(2, ALL_REDUCE, "argument", timeout=100) == "rank 0 of 2: 3 argument 1\nrank 1 of 2: 3 argument 1\n"


def test_a_failing_rank_shows_all_output_and_leaves_no_process(torchrun: Callable[..., str]) -> None:
    start = time.monotonic()
    with pytest.raises(RanksFailed, match=r"rank 1 ended with 1(?s:.)*rank one is unwell") as failed:
        torchrun(2, LEAVES_A_CHILD, timeout=100)
    assert time.monotonic() - start < 60
    children = [int(line.split()[1]) for line in str(failed.value).splitlines() if line.startswith("child ")]
    assert len(children) == 2
    assert not any(_runs(pid) for pid in children)


def test_a_run_that_does_not_end_is_ended(torchrun: Callable[..., str]) -> None:
    with pytest.raises(RanksFailed, match=r"no end after 0\.5 s"):
        torchrun(1, "import time\ntime.sleep(600)\n", timeout=0.5)


def _runs(pid: int) -> bool:
    """Not gone and not a zombie, some seconds after its SIGKILL."""
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return False
        if state == "Z":
            return False
        time.sleep(0.1)
    return True
