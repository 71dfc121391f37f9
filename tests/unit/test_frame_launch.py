"""The launch scripts, as far as they go without a cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SRUN = """#!/usr/bin/env python3
# Runs the command once per node, here, and forwards SIGTERM as srun does.
import os, signal, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("-"):
    command.pop(0)
nodes = range(int(os.environ["SLURM_JOB_NUM_NODES"]))
steps = [subprocess.Popen(command, env={**os.environ, "SLURM_NODEID": str(node)}) for node in nodes]
signal.signal(signal.SIGTERM, lambda *_: [step.send_signal(signal.SIGTERM) for step in steps])
sys.exit(max(step.wait() for step in steps))
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo head-node; echo other-node; else echo "scontrol $*"; fi
"""
RANKS = """#!/usr/bin/env bash
# Stands for the interpreter: says what it was asked to run, and on SIGTERM takes a moment to save.
trap 'sleep 0.5; echo "node $NODE_RANK saved"; exit 0' TERM
printf '%s\\n' "$(printf '%s|' "node $NODE_RANK up" "$@")"  # in one piece: two nodes write to the same log
for _ in $(seq 300); do sleep 0.1; done
exit 7
"""


def launch(repo_root: Path, script: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", repo_root / "launch" / script, *args]
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=60)


@pytest.fixture
def slurm(tmp_path: Path, repo_root: Path) -> dict[str, str]:
    """The environment of a job on two nodes, with stand-ins for SLURM's programs and for the ranks."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("ranks", RANKS)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return os.environ | {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "PYTHON": str(tmp_path / "ranks"),
        "SLURM_SUBMIT_DIR": str(repo_root),
        "SLURM_JOB_ID": "1234567",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "head-node,other-node",
        "SLURM_GPUS_ON_NODE": "8",
    }


def test_slurm_starts_every_node_saves_in_time_and_requeues(slurm: dict[str, str], repo_root: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as out:
        command = ["bash", repo_root / "launch" / "slurm.sbatch", "rl", "experiment=x", "data.train=a b"]
        job = subprocess.Popen(command, env=slurm, stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + 30
        while log.read_text().count(" up|") < 2:
            assert job.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        job.send_signal(signal.SIGTERM)
        assert job.wait(30) == 0, log.read_text()
    finally:
        job.kill()
    lines = log.read_text().splitlines()
    for node in (0, 1):
        meet = f"--nnodes|2|--node-rank|{node}|--master-addr|head-node|--master-port|24567|--nproc-per-node|8"
        run = "--max-restarts|0|-m|megatron_rl|rl|experiment=x|data.train=a b|"
        assert f"node {node} up|-m|torch.distributed.run|{meet}|{run}" in lines
        assert f"node {node} saved" in lines
    assert lines[-1] == "scontrol requeue 1234567"  # after both have saved


def test_torchrun_on_one_machine_needs_no_address(tmp_path: Path, repo_root: Path) -> None:
    done = launch(repo_root, "torchrun.sh", "rl", "run.steps=3", PYTHON="echo", NPROC_PER_NODE="4")
    start = "-m torch.distributed.run --standalone --nproc-per-node 4 --max-restarts 0"
    assert done.stdout == f"{start} -m megatron_rl rl run.steps=3\n"


@pytest.mark.parametrize(("args", "env"), [((), {}), (("rl",), {"NNODES": "2"})], ids=["no verb", "no MASTER_ADDR"])
def test_torchrun_says_what_it_needs(repo_root: Path, args: tuple[str, ...], env: dict[str, str]) -> None:
    done = launch(repo_root, "torchrun.sh", *args, **env, MASTER_ADDR="")
    assert done.returncode == 2
    assert "MASTER_ADDR" in done.stderr and not done.stdout


@pytest.mark.parametrize("python", ["python-that-is-not-there", "false"])
def test_setup_names_a_python_that_is_too_old_or_absent(repo_root: Path, tmp_path: Path, python: str) -> None:
    """In a copy: where the environment is complete, set-up has no need of a Python."""
    (tmp_path / "launch").mkdir()
    for name in ("setup.sh", "requirements-cpu.txt", "requirements-nodeps.txt"):
        (tmp_path / "launch" / name).write_bytes((repo_root / "launch" / name).read_bytes())
    (tmp_path / "setup.py").write_bytes((repo_root / "setup.py").read_bytes())
    done = launch(tmp_path, "setup.sh", PYTHON=python)
    assert done.returncode == 1
    assert done.stderr == f"setup: PYTHON={python} is not a Python of version 3.11 or newer\n"
    assert not (tmp_path / ".venv").exists()
