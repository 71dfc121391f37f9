"""kill -9 of the trainer, of the SGLang server and of both, at random moments: the run goes on or resumes, no prompt is lost or
trained twice, no process is left behind.

    pytest -m slow tests/integration/test_kill.py
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import MARK, kill, marked, wait_until_gone

from megatron_rl.checkpoint.disk import newest
from megatron_rl.engine.launcher import START_ATTEMPTS

pytestmark = [pytest.mark.slow, pytest.mark.sglang, pytest.mark.timeout(3000)]
STEPS = 60  # long enough for the kills below


def run_command(run_dir: Path, data: Path, *overrides: str) -> list[str]:
    return [
        *(sys.executable, "-m", "megatron_rl", "rl", "experiment=quickstart", f"run.dir={run_dir}", f"run.steps={STEPS}"),
        *(f"data.tokenizer={data}/tokenizer.model", f"data.train={data}/train.jsonl", "data.eval=null", "eval.at_ends=false"),
        *("model.init_from=null", "engine.count=1", "rollout.token_budget=1500", "rollout.pool_capacity=32"),
        *("rollout.group_size=4", "rollout.max_response_tokens=64", "algorithm.zero_variance=keep", "checkpoint.every=2"),
        *overrides,
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> Path:
    out = tmp_path_factory.mktemp("data")
    sizes = ["--train", "2000", "--eval", "4", "--sft", "2000"]
    subprocess.run([sys.executable, repo_root / "tools/quickstart_data.py", "--out", out, *sizes], check=True)
    return out


def start(command: list[str], value: str, log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as out:
        return subprocess.Popen(command, env=os.environ | {MARK: value}, stdout=out, stderr=out, start_new_session=True)


def trained_groups(run_dir: Path) -> list[str]:
    rows = [json.loads(line) for line in (run_dir / "trained.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [group for row in rows for group in row["groups"]]


def check_exactly_once(run_dir: Path) -> None:
    """Every prompt the cursor has passed was trained once, or is carried in the last checkpoint."""
    trained = trained_groups(run_dir)
    found = newest(run_dir / "checkpoints")
    assert found is not None
    trainer = found.trainer
    carried = {rollout["id"].rpartition("#")[0] for rollout in trainer["rollouts"]} | {group["id"] for group in trainer["scored"]}
    assert len(trained) == len(set(trained))
    assert not carried & set(trained)
    assert len(trained) + len(carried) == trainer["prompts"]["position"] - len(trainer["prompts"]["given_back"])


@pytest.mark.parametrize("victims", ["trainer", "server", "both"])
def test_killed_at_random_moments_the_run_completes(tmp_path: Path, data: Path, victims: str) -> None:
    rng = random.Random(f"{victims} {os.environ.get('KILL_SEED', 0)}")
    run_dir, log, value = tmp_path / "run", tmp_path / "log", f"{victims}-{os.getpid()}"
    kills = 0
    process = start(run_command(run_dir, data), value, log)
    deadline = time.monotonic() + 900
    while kills < (4 if victims == "trainer" else 3):
        time.sleep(rng.uniform(4, 22))
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        if process.poll() is not None:
            break
        if victims == "server" and kills == START_ATTEMPTS - 1 and " up after " not in log.read_text():
            continue  # a server that is killed in each of its starts in a row is given up
        alive = marked(value)
        servers = [pid for pid, command in alive.items() if "sglang" in command or "engine.server" in command]
        trainers = [pid for pid in alive if pid not in servers]
        chosen = {"trainer": trainers, "server": servers, "both": list(alive)}[victims]
        if not chosen:
            continue
        kill([rng.choice(chosen)] if victims == "server" or rng.random() < 0.5 else chosen)
        kills += 1
        if victims != "server":
            process.wait(timeout=60)
            wait_until_gone(value)
            process = start(run_command(run_dir, data), value, log)
    process.wait(timeout=600)
    assert process.returncode == 0, log.read_text()[-3000:]
    wait_until_gone(value)
    assert len(trained_groups(run_dir)) > 0
    check_exactly_once(run_dir)
    assert kills >= 3


def test_a_killed_run_repeats_the_uninterrupted_curve(tmp_path: Path, data: Path) -> None:
    """Greedy decoding, every phase complete: what remains random is only the moment of death."""
    fixed = ["rollout=synchronous", "rollout.temperature=0", "algorithm.advantage=reinforce", "checkpoint.every=1", "run.steps=5"]
    fixed += ["rollout.pool_capacity=32", "rollout.group_size=4", "rollout.max_response_tokens=32"]
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    subprocess.run(run_command(whole, data, *fixed), check=True)

    value = f"curve-{os.getpid()}"
    process = start(run_command(killed, data, *fixed), value, log)
    while not (killed / "checkpoints" / "step_2").exists():
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.05)
    kill(list(marked(value)))
    process.wait(timeout=60)
    wait_until_gone(value)
    process = start(run_command(killed, data, *fixed), value, log)
    assert process.wait(timeout=300) == 0, log.read_text()[-3000:]

    curves = []
    for run_dir in (whole, killed):
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        curves.append([(row["step"], row["reward/mean"], row["policy/grad_norm"], row["loss/policy"]) for row in rows])
    assert [row[0] for row in curves[0]] == [1, 2, 3, 4, 5]
    for ours, theirs in zip(*curves, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
