"""The whole loop, small and real: two Megatron ranks, a SGLang server, verified rewards, checkpoints, a stop and a resume."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from processes import MARK, marked, wait_until_gone

from megatron_rl.checkpoint.disk import newest
from megatron_rl.observability.rollout_rows import support_of_row

pytestmark = [pytest.mark.dist, pytest.mark.sglang, pytest.mark.timeout(600)]
STEPS = 6
CUT = ["rollout.top_p=0.9", "rollout.top_k=12", "rollout.keep_sampling_mask=true"]
DESIGN = {
    *("reward/mean", "mismatch/masked_fraction", "mismatch/logprob_gap_mean", "mismatch/logprob_gap_max", "policy/grad_norm"),
    *("policy/entropy", "rollout/generated_tokens", "rollout/carried", "rollout/dropped_stale", "time/rollout_s"),
    *("time/train_s", "time/sync_s"),
}


def rl(run_dir: Path, data: Path, *overrides: str) -> list[str]:
    return [
        *(sys.executable, "-m", "megatron_rl", "rl", "experiment=quickstart", f"run.dir={run_dir}", f"run.steps={STEPS}"),
        *(f"data.tokenizer={data}/tokenizer.model", f"data.train={data}/train.jsonl", f"data.eval={data}/eval.jsonl"),
        *("model.init_from=null", "engine.count=1", "rollout.token_budget=600", "rollout.pool_capacity=24", "rollout.group_size=4"),
        *("rollout.max_response_tokens=48", "algorithm.zero_variance=keep", "algorithm.entropy_weight=0.1", "optimizer.lr=1e-3"),
        *("algorithm.routing.kind=r3", "checkpoint.every=2", "checkpoint.keep=1", "eval.samples=1", "eval.forced_prefix=false"),
        *overrides,
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> Path:
    out = tmp_path_factory.mktemp("data")
    sizes = ["--train", "300", "--eval", "4", "--sft", "2000"]
    subprocess.run([sys.executable, repo_root / "tools/quickstart_data.py", "--out", out, *sizes], check=True)
    return out


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A run that is told to stop after three steps, and then goes on to the end by the same command, but for a cut of the
    vocabulary with its supports."""
    run_dir = tmp_path_factory.mktemp("run") / "rl"
    env = os.environ | {MARK: str(run_dir)}
    first = subprocess.Popen(rl(run_dir, data), env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 240
    while len(rows(run_dir / "metrics.jsonl")) < 3 and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    output, _ = first.communicate(timeout=120)
    assert "the same command goes on" in output, output[-3000:]
    wait_until_gone(str(run_dir))
    second = subprocess.run(rl(run_dir, data, *CUT), env=env, capture_output=True, text=True, timeout=300, check=False)
    assert second.returncode == 0, (second.stdout + second.stderr)[-3000:]
    wait_until_gone(str(run_dir))
    assert not marked(str(run_dir))
    return run_dir


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_metrics_are_one_object_a_step_with_the_names_of_the_design(run_dir: Path) -> None:
    metrics = rows(run_dir / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, STEPS + 1))
    for row in metrics:
        assert set(row) >= DESIGN
    assert sum(row["rollout/carried"] > 0 for row in metrics) > STEPS / 2


def test_engine_and_policy_agree_after_every_push(run_dir: Path) -> None:
    """Every token that the pushed weights sampled has the policy's own log-prob (fp32), while updates move the weights."""
    metrics = rows(run_dir / "metrics.jsonl")
    assert all(row["mismatch/logprob_gap_max"] < 1e-4 for row in metrics)
    gaps = rows(run_dir / "mismatch.jsonl")
    assert [row["step"] for row in gaps] == [row["step"] for row in metrics]
    for gap, row in zip(gaps, metrics, strict=True):
        counted = [gap[name]["counts"] for name in ("mismatch/gap_above", "mismatch/gap_below") if name in gap]
        assert sum(map(sum, counted)) == row["policy/tokens"]
    # Random weights earn no reward: the entropy term alone moves them, in every step.
    assert all(row["policy/grad_norm"] > 0 for row in metrics)
    assert any(row["mismatch/stale_gap_max"] > 1e-3 for row in metrics)


def test_tokens_sampled_after_the_cut_have_their_support_and_those_before_none(run_dir: Path) -> None:
    """That both have the policy's log-prob, and rollouts with some of each are trained, is the test above."""
    dumped = [row for file in (run_dir / "rollouts").glob("*.jsonl") for row in rows(file)]
    sizes_by_version: dict[int, set[int]] = {}
    mixed = 0
    for row in dumped:
        sizes = [len(ids) // 4 for ids in support_of_row(row)]
        sizes += [0] * (row["tokens"] - len(sizes))
        versions = [version for version, count in row["versions"] for _ in range(count)]
        for version, size in zip(versions, sizes, strict=True):
            sizes_by_version.setdefault(version, set()).add(size)
        mixed += 0 in sizes and any(sizes)
    first = min(version for version, sizes in sizes_by_version.items() if sizes != {0})
    assert mixed and 3 <= first < max(sizes_by_version)
    for version, sizes in sizes_by_version.items():
        assert sizes == {0} if version < first else sizes <= set(range(1, 13))


def test_routers_are_compared_with_the_engines_in_every_step(run_dir: Path) -> None:
    agreement = [row["routing/agreement"] for row in rows(run_dir / "metrics.jsonl")]
    assert agreement[0] == 1.0, "nothing was carried over yet"
    assert all(0.5 < share <= 1.0 for share in agreement)


def test_tokens_carry_the_version_that_sampled_them(run_dir: Path) -> None:
    spans = [row["versions"] for file in (run_dir / "rollouts").glob("*.jsonl") for row in rows(file)]
    assert any(len(span) > 1 for span in spans)
    assert all([v for v, _ in span] == sorted({v for v, _ in span}) for span in spans)


def test_every_prompt_is_trained_exactly_once_across_the_stop(run_dir: Path) -> None:
    trained = rows(run_dir / "trained.jsonl")
    assert [row["step"] for row in trained] == list(range(1, STEPS + 1))
    groups = [group for row in trained for group in row["groups"]]
    found = newest(run_dir / "checkpoints")
    assert found is not None and found.step == STEPS
    carried = {r["id"].rpartition("#")[0] for r in found.trainer["rollouts"]} | {g["id"] for g in found.trainer["scored"]}
    assert len(groups) == len(set(groups)) and not carried & set(groups)
    assert len(groups) + len(carried) == found.trainer["prompts"]["position"]


def test_the_run_directory_is_complete(run_dir: Path) -> None:
    assert {path.name for path in run_dir.iterdir()} >= {
        *("config.yaml", "metrics.jsonl", "tensorboard", "rollouts", "checkpoints", "hf", "report.html", "summary.json"),
        "pass_history.jsonl",
    }
    assert [row["step"] for row in rows(run_dir / "evaluations.jsonl")] == [0, STEPS]


def test_the_exported_checkpoint_evaluates_like_the_policy(run_dir: Path, data: Path, tmp_path: Path) -> None:
    """Greedy decoding of the Hugging Face checkpoint in a fresh server."""
    command = [sys.executable, "-m", "megatron_rl", "eval", f"out={tmp_path}", f"checkpoint={run_dir}/hf"]
    command += [f"data.eval={data}/eval.jsonl", "engine=cpu", "engine.count=1", "eval.samples=1", "eval.greedy=true"]
    command += ["max_prompt_tokens=16", "max_response_tokens=48"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert len(rows(tmp_path / "responses.jsonl")) == 8
    theirs, ours = json.loads((tmp_path / "summary.json").read_text()), rows(run_dir / "evaluations.jsonl")[-1]
    for name in ("eval/accuracy_greedy", "eval/response_tokens_greedy", "eval/truncated_greedy"):
        assert theirs[name] == ours[name]
