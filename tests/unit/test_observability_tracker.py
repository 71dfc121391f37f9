"""What a run records, and that a resumed one forgets exactly what came after its checkpoint."""

from __future__ import annotations

import json
import math
import re
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_rl.algorithms.histogram import Histogram
from megatron_rl.config import UserError
from megatron_rl.observability.alarms import Alarm
from megatron_rl.observability.console import StepLines, step_line
from megatron_rl.observability.rollout_rows import support_of_row, tokens_of_row, version_spans
from megatron_rl.observability.summary import read_rows, rl_summary
from megatron_rl.observability.tracker import RunTracker
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


def test_a_dump_holds_what_the_engine_sampled_to_the_last_bit(tmp_path: Path) -> None:
    prompt = Prompt("p", "p?", (3, 1, 157_183), "a", "exact")
    logprobs = (*torch.randn(50).sub(2).tolist(), -math.inf)
    rollout = Rollout("0:p#0", prompt, 0, tuple(range(51)), logprobs, (*[4] * 20, *[5] * 31), "stop")
    tracker(tmp_path).rollouts(6, [Group("0:p", prompt, (rollout,), (Score(1.0, "correct"),))])
    (row,) = rows(tmp_path / "rollouts" / "step_6.jsonl")
    assert tokens_of_row(row) == (prompt.tokens, rollout.tokens, rollout.engine_logprobs, rollout.versions)
    assert support_of_row(row) == ()


def with_supports(tmp_path: Path, *supports: list[int]) -> tuple[Rollout, dict[str, Any]]:
    """Of the first tokens of (5, 6, 7): the rollout and its row."""
    one = group("p")
    rollout = replace(one.rollouts[0], support=tuple(array("i", ids).tobytes() for ids in supports))
    tracker(tmp_path).rollouts(1, [replace(one, rollouts=(rollout,), scores=one.scores[:1])])
    return rollout, rows(tmp_path / "rollouts" / "step_1.jsonl")[0]


@pytest.mark.parametrize("supports", [[[5, 157_183], [], [3, 7]], [[], [6]], [[5]]])
def test_supports_come_back_with_the_token_they_are_of(tmp_path: Path, supports: list[list[int]]) -> None:
    rollout, row = with_supports(tmp_path, *supports)
    assert support_of_row(row) == rollout.support


@pytest.mark.parametrize(
    ("supports", "change", "words"),
    [
        ([[5, 8]], {"support_ids": None}, "'support_ids' is not base64 of 4-byte numbers"),
        ([[5, 8]], {"support_ids": "AAAAAA=="}, "supports of 1 tokens with 2 ids, for 3 tokens and 1 ids"),
        ([[5], [6], [7]], {"response_ids": "BQAAAA=="}, "supports of 3 tokens with 3 ids, for 1 tokens and 3 ids"),
        ([[5], [6], [8, 9]], {}, "token 7 is not in its support"),
        ([[5, 5]], {}, "an id is twice in the support of token 5"),
        ([[5], [8, 6, 8]], {}, "an id is twice in the support of token 6"),
    ],
)
def test_a_support_that_does_not_fit_says_so(
    tmp_path: Path, supports: list[list[int]], change: dict[str, object], words: str
) -> None:
    _, row = with_supports(tmp_path, *supports)
    with pytest.raises(ValueError, match=re.escape(words)):
        support_of_row(row | change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"engine_logprobs": None}, "'engine_logprobs' is not base64 of 4-byte numbers"),
        ({"response_ids": "AAAA"}, "'response_ids' is not base64 of 4-byte numbers"),
        ({"response_ids": "AAAA$"}, "'response_ids' is not base64"),
        ({"response_ids": "AAAAAA=="}, "1 response tokens, 3 engine log-probs and 3 versions"),
        ({"versions": [[0, 2]]}, "3 response tokens, 3 engine log-probs and 2 versions"),
        ({"versions": 7}, "'versions' is no list"),
    ],
)
def test_a_row_that_does_not_fit_together_says_so(tmp_path: Path, change: dict[str, object], words: str) -> None:
    tracker(tmp_path).rollouts(1, [group("p")])
    row = rows(tmp_path / "rollouts" / "step_1.jsonl")[0]
    with pytest.raises(ValueError, match=re.escape(words)):
        tokens_of_row(row | change)
    del row["prompt_ids"]
    with pytest.raises(ValueError, match="no 'prompt_ids': a dump without the tokens"):
        tokens_of_row(row)


def test_histograms_are_one_compact_object_and_drawn_by_tensorboard(tmp_path: Path) -> None:
    t = tracker(tmp_path)
    gap, nothing = Histogram(-4.0, 0.5, (0.0, 2.0, 0.0, 3.0, 0.0)), Histogram(-4.0, 0.5, (0.0, 0.0))
    for step in (1, 2, 3):
        t.histograms(step, {"mismatch/gap_above": gap, "mismatch/gap_below": nothing})
    t.close()
    kept = {"log10_from": -3.5, "log10_width": 0.5, "counts": [2, 0, 3]}
    assert rows(tmp_path / "mismatch.jsonl") == [{"step": step, "mismatch/gap_above": kept} for step in (1, 2, 3)]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    drawn = list(events.Tags()["histograms"])
    assert drawn == ["mismatch/gap_above_log10"]
    value = events.Histograms(drawn[0])[0].histogram_value
    assert (value.min, value.max, value.num, value.sum) == (-3.5, -2.0, 5.0, 2 * -3.25 + 3 * -2.25)
    assert list(value.bucket_limit) == [-3.0, -2.5, -2.0] and list(value.bucket) == [2.0, 0.0, 3.0]
    t = tracker(tmp_path)
    t.rewind(1)
    assert [row["step"] for row in rows(tmp_path / "mismatch.jsonl")] == [1]


def test_an_alarm_is_one_line_of_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    alarm = Alarm("mismatch/prob_gap_mean", 0.05, "look there")
    t = RunTracker(tmp_path, steps=9, decode=str, tensorboard=False, rollouts_every=0, rollouts_kept=1, alarms=[alarm])
    for step, value in enumerate((0.01, 0.06, 0.07), start=1):
        t.log(step, {"mismatch/prob_gap_mean": value})
    assert [r.getMessage() for r in caplog.records] == ["step 2: mismatch/prob_gap_mean is 0.06, above 0.05: look there"]
    assert caplog.records[0].levelname == "WARNING"


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


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    t = tracker(tmp_path)
    t.log(1, {"a": float("nan"), "b": float("inf"), "c": 1.0})
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 1, "a": None, "b": None, "c": 1.0}]


def test_samples_come_evenly_through_the_step_and_show_where_versions_change(tmp_path: Path) -> None:
    tracker(tmp_path, kept=3).rollouts(1, [group(f"p{i}") for i in range(6)])
    sampled = rows(tmp_path / "rollouts" / "step_1.jsonl")
    assert [row["prompt"] for row in sampled] == ["p0?", "p2?", "p4?"]
    assert sampled[0]["pieces"] == ["(5, 6)", "(7,)"]


def test_any_text_a_model_writes_comes_back(tmp_path: Path) -> None:
    text = 'a\u2028b\x0bc\x85\nd \ufffd 你 "</script>'
    strange = RunTracker(tmp_path, steps=1, decode=lambda tokens: text, tensorboard=False, rollouts_every=1, rollouts_kept=4)
    strange.rollouts(1, [group("p")])
    assert [row["response"] for row in read_rows(tmp_path / "rollouts" / "step_1.jsonl")] == [text, text]
    lone = RunTracker(tmp_path, steps=1, decode=lambda tokens: "x\ud800", tensorboard=False, rollouts_every=1, rollouts_kept=4)
    lone.rollouts(2, [group("p")])
    assert rows(tmp_path / "rollouts" / "step_2.jsonl")[0]["response"] == "x?"


def test_rollouts_every(tmp_path: Path) -> None:
    t = RunTracker(tmp_path, steps=9, decode=str, tensorboard=False, rollouts_every=3, rollouts_kept=4)
    never = RunTracker(tmp_path / "never", steps=9, decode=str, tensorboard=False, rollouts_every=0, rollouts_kept=4)
    (tmp_path / "never").mkdir()
    for step in range(1, 7):
        t.rollouts(step, [group("p")])
        never.rollouts(step, [])
    assert sorted(file.name for file in (tmp_path / "rollouts").iterdir()) == ["step_3.jsonl", "step_6.jsonl"]
    assert sorted(file.name for file in (tmp_path / "never").iterdir()) == ["trained.jsonl"]


def test_tensorboard_forgets_what_a_rewind_forgot(tmp_path: Path) -> None:
    """Also when the first thing recorded after it is an evaluation of the very step it went back to."""
    t = tracker(tmp_path)
    for step in range(1, 6):
        t.log(step, {"x": float(step)})
    t.close()
    t = tracker(tmp_path)
    t.rewind(3)
    t.evaluation(3, {"eval/accuracy": 0.5})
    t.log(4, {"x": 40.0})
    t.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("x")] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert [e.step for e in events.Scalars("eval/accuracy")] == [3]


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot write: No space left") as caught:
        tracker(tmp_path).log(1, {"x": 1.0})
    assert caught.value.exit_code == 1


def test_fast_steps_are_not_all_shown_and_say_how_long_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    lines = StepLines(100)
    for step in range(1, 101):
        lines.show(step, {"sft/nll": 1.0}, now=float(step))
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 21
    assert shown[1] == "step   6/100  nll 1.000  1:34 min left"
    assert shown[-1] == "step 100/100  nll 1.000"
    for step in range(1, 4):
        StepLines(3).show(step, {"reward/mean": 0.5}, now=float(step))
    assert len(capsys.readouterr().err.splitlines()) == 3
