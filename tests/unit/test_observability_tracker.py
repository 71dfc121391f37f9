"""What a run records, and that a resumed one forgets exactly what came after its checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_rl.observability.console import step_line
from megatron_rl.observability.summary import rl_summary
from megatron_rl.observability.tracker import RunTracker, version_spans
from megatron_rl.types import Group, Prompt, Rollout, Score


def tracker(run_dir: Path, kept: int = 16) -> RunTracker:
    return RunTracker(run_dir, steps=9, decode=str, tensorboard=True, rollouts_every=1, rollouts_kept=kept)


def group(name: str) -> Group:
    prompt = Prompt(name, f"{name}?", (1,), "a", "exact")
    rollouts = tuple(Rollout(f"0:{name}#{i}", prompt, i, (5, 6, 7), (-0.5, -1.0, -1.5), (0, 0, 1), "stop") for i in range(2))
    return Group(f"0:{name}", prompt, rollouts, (Score(1.0, "correct"), Score(0.0, "wrong", reason="no")))


def rows(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_each_step_is_one_object(tmp_path: Path) -> None:
    t = tracker(tmp_path)
    for step in (1, 2):
        t.log(step, {"reward/mean": step / 2})
        t.rollouts(step, [group(f"p{step}")])
    t.close()
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 1, "reward/mean": 0.5}, {"step": 2, "reward/mean": 1.0}]
    assert rows(tmp_path / "trained.jsonl") == [{"step": 1, "groups": ["0:p1"]}, {"step": 2, "groups": ["0:p2"]}]
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_rollouts_are_readable(tmp_path: Path) -> None:
    tracker(tmp_path, kept=1).rollouts(3, [group("p")])
    (row,) = rows(tmp_path / "rollouts" / "step_3.jsonl")
    assert row["prompt"] == "p?" and row["response"] == "(5, 6, 7)" and row["reward"] == 1.0
    assert row["versions"] == [[0, 2], [1, 1]] and row["engine_logprob_mean"] == -1.0


def test_rewind_forgets_what_came_after_and_a_torn_line(tmp_path: Path) -> None:
    t = tracker(tmp_path)
    for step in range(5):
        t.log(step, {"x": step})
        t.rollouts(step, [group(f"p{step}")])
        t.evaluation(step, {"eval/accuracy": 0.5})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "x"')
    t.rewind(2)
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [0, 1, 2]
    assert [row["step"] for row in rows(tmp_path / "trained.jsonl")] == [0, 1, 2]
    assert sorted(file.name for file in (tmp_path / "rollouts").iterdir()) == ["step_0.jsonl", "step_1.jsonl", "step_2.jsonl"]
    assert t.evaluated() == {0, 1, 2}
    t.log(3, {"x": 30})
    assert rows(tmp_path / "metrics.jsonl")[-1] == {"step": 3, "x": 30}


def test_version_spans() -> None:
    assert version_spans([]) == []
    assert version_spans([3, 3, 4, 3]) == [(3, 2), (4, 1), (3, 1)]


def test_the_step_line_shows_what_matters() -> None:
    metrics = {"reward/mean": 0.5, "mismatch/masked_fraction": 0.001, "rollout/generated_tokens": 900, "time/rollout_s": 0.5}
    line = step_line(3, 60, metrics)
    assert line == "step  3/60  reward 0.500  masked 0.10%  1,800 tok/s generated  rollout 0.5 s"


def test_a_summary_adds_up_the_steps_and_finds_both_evaluations() -> None:
    steps = [
        {"rollout/generated_tokens": 100, "time/rollout_s": 2.0, "train/tokens": 60, "time/train_s": 1.0, "time/step_s": 4.0},
        {"rollout/generated_tokens": 50, "time/rollout_s": 1.0, "time/step_s": 5.0},
    ]
    evaluations = [{"step": step, "eval/accuracy": value, "time/eval_s": 1.5} for step, value in ((0, 0.2), (2, 0.6))]
    summary = rl_summary(steps, evaluations)
    assert summary["rl_steps"] == 2 and summary["seconds_rl"] == 12.0
    assert summary["generated_tokens_per_s"] == 50.0 and summary["trained_tokens_per_s"] == 60.0
    assert summary["eval_start"]["accuracy"] == 0.2 and summary["eval_end"]["accuracy"] == 0.6
    assert rl_summary([], [])["eval_start"] is None
