"""The report: charts that show what there is, sentences that follow from the numbers, text that stays text."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.algorithms.histogram import Histogram
from megatron_rl.config import UserError
from megatron_rl.observability.charts import (
    MAX_POINTS,
    Series,
    Sides,
    cleaned,
    line_chart,
    linear_ticks,
    log_ticks,
    number_text,
    smoothed,
    thinned,
    two_sided_histogram,
)
from megatron_rl.observability.lessons import lessons
from megatron_rl.observability.report import with_rates, write_report


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_linear_ticks_are_few_round_and_enclose_the_data(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    if 0 < high - low < 1e-9 * max(abs(low), abs(high)) or 0 < max(abs(low), abs(high)) < 1e-300:
        return
    ticks = linear_ticks(low, high)
    assert ticks[0] <= low + 1e-6 * (high - low) and ticks[-1] >= high - 1e-6 * (high - low)
    assert 2 <= len(ticks) <= 7
    assert ticks == sorted(set(ticks))


def test_ticks_by_hand() -> None:
    assert linear_ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1.0]
    assert linear_ticks(0, 23.6) == [0, 10, 20, 30]
    assert linear_ticks(0, 0) == [0, 0.25, 0.5, 0.75, 1.0]
    assert log_ticks(3e-8, 0.2) == pytest.approx([1e-8, 1e-6, 1e-4, 1e-2, 1])
    assert log_ticks(5.0, 7.0) == [1, 10]


def test_a_missing_number_is_a_gap_and_no_zero() -> None:
    points = [(1.0, 0.5), (2.0, None), (3.0, float("nan")), (4.0, 1.0), (5.0, 2.0)]
    assert cleaned(points) == [(1, 0.5), (2, None), (3, None), (4, 1.0), (5, 2.0)]
    figure = line_chart("t", [Series("s", cleaned(points))])
    (path,) = re.findall(r'<path class="line s1" d="([^"]*)"', figure)
    assert path.count("M") == 2 and path.count("L") == 1
    assert figure.count("<circle") == 3
    assert line_chart("t", [Series("s", [(1.0, None)])]) == ""
    assert line_chart("t", []) == ""
    assert cleaned([(1.0, 0.0), (2.0, 1e-6)], positive=True) == [(1, None), (2, 1e-6)]


def test_long_curves_become_means() -> None:
    points = [(float(i), float(i % 2)) for i in range(1, 10_001)]
    thin = thinned(points)
    assert len(thin) <= MAX_POINTS
    assert all(value == pytest.approx(0.5, abs=0.02) for _, value in thin)
    assert thin[-1][0] == 10_000
    assert thinned(points[:MAX_POINTS]) == points[:MAX_POINTS]


def test_smoothing_by_hand() -> None:
    """Few points keep half of the past at each. Forth: 1, (0.5 + 3) / 1.5, (1.75 + 5) / 1.75; back: 5, (2.5 + 3) / 1.5, ..."""
    points: list[tuple[float, float | None]] = [(1.0, 1.0), (2.0, 3.0), (3.0, None), (4.0, 5.0)]
    forth, back = [1.0, 3.5 / 1.5, 6.75 / 1.75], [3.75 / 1.75, 5.5 / 1.5, 5.0]
    means = [(a + b) / 2 for a, b in zip(forth, back, strict=True)]
    assert [v for _, v in smoothed(points)] == [pytest.approx(means[0]), pytest.approx(means[1]), None, pytest.approx(means[2])]
    ramp = [(float(i), float(i)) for i in range(200)]
    assert all(value == pytest.approx(step, abs=0.5) for step, value in smoothed(ramp)[40:160])  # no lag


def test_numbers_are_short() -> None:
    assert [number_text(v) for v in (0.123456, 12.34, 5782.4, 6.2e-6, 0, None)] == ["0.123", "12.3", "5,782", "6.2e-06", "0", "–"]
    assert number_text(0.674, "%") == "67.4\u00a0%"


def evaluation(step: int, accuracy: float, forced: float | None = None, tokens: float = 10.0) -> dict[str, Any]:
    row = {"step": step, "eval/accuracy": accuracy, "eval/accuracy_greedy": accuracy, "eval/response_tokens": tokens}
    return row if forced is None else row | {"eval/accuracy_forced": forced}


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        # what RL reached lay within what the model could do when forced
        ((0.35, 0.70), (0.67, 0.68), ["rose, from 35.0\u00a0% to 67.0\u00a0% (+32.0 points)", "the whole rise"]),
        ((0.35, 0.70), (0.67, 0.68), ["(−2.0 points)", "did not get more reliable", "taught it little or nothing"]),
        # more than half within reach, and the working improved
        ((0.20, 0.56), (0.80, 0.85), ["60% of the rise", "got more reliable, too", "showing the working pays, and improved it"]),
        ((0.20, 0.68), (0.80, 0.69), ["80% of the rise", "the rest of the rise is new"]),
        # most of it new
        ((0.20, 0.25), (0.80, 0.82), ["only 8% of the rise", "new ability"]),
        ((0.50, 0.80), (0.51, 0.79), ["hardly moved", "found no better way"]),
        ((0.50, 0.80), (0.40, 0.60), ["fell, from 50.0\u00a0% to 40.0\u00a0% (−10.0 points)", "found no better way"]),
        ((0.30, 0.80), (0.60, 0.60), ["got less reliable"]),
    ],
)
def test_the_sentences_follow_from_the_numbers(before: tuple[float, float], after: tuple[float, float], words: list[str]) -> None:
    text = " ".join(lessons([evaluation(0, *before), evaluation(30, *after, tokens=24.0)]))
    forced = f"already right on {before[1] * 100:.1f}\u00a0% of the same prompts before RL"
    for expected in [*words, forced, "from 10.0 to 24.0 tokens"]:
        assert expected in text


def test_without_the_forced_check_nothing_is_claimed() -> None:
    assert "cannot tell" in " ".join(lessons([evaluation(0, 0.3), evaluation(30, 0.8)]))
    assert "no evaluation before and after" in " ".join(lessons([evaluation(0, 0.3)]))


def test_rates_and_the_last_line_of_a_step_count() -> None:
    first, again = {"step": 1, "train/tokens": 60, "time/train_s": 2.0}, {"step": 2, "x": 2, "time/train_s": 0}
    assert with_rates([{"step": 2, "x": 1}, first, again]) == [{**first, "trained_per_s": 30.0}, again]


HOSTILE = "<script>alert(1)</script>\"'&<img src=x>"


def make_run(folder: Path, steps: int = 30) -> Path:
    folder.mkdir(exist_ok=True)
    metrics = [
        {
            "step": step,
            "reward/mean": 0.3 + step / 100,
            "mismatch/logprob_gap_max": 1e-6 * step,
            "mismatch/masked_fraction": None if step == 3 else 0.0,
            "rollout/generated_tokens": 4096.0,
            "time/rollout_s": 0.5,
        }
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics) + '{"step": 31, "rew')
    evaluations = [evaluation(0, 0.35, 0.70), evaluation(steps, 0.67, 0.68, tokens=24.0)]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evaluations))
    (folder / "summary.json").write_text(json.dumps({"seconds_setup": 200, "seconds_sft": 100.2, "seconds_rl": 59.4}))
    (folder / "rollouts").mkdir(exist_ok=True)
    for step in (1, 9, 30):
        sample = {
            "group": "0:p",
            "sample": 0,
            "prompt": "1+2=",
            "response": f"#{step}{HOSTILE}",
            "answer": "3",
            "reward": 0.0,
            "status": "wrong",
            "reason": "",
            "tokens": 5,
            "versions": [[step - 1, 2], [step, 3]],
            "pieces": [f"#{step}", HOSTILE],
            "finish_reason": "length",
            "engine_logprob_mean": -0.1,
        }
        silent = sample | {"response": "", "tokens": 0, "versions": [], "pieces": [], "status": "unparsable", "reason": "no answer"}
        text = json.dumps(sample) + "\n" + json.dumps(silent) + "\n"
        (folder / "rollouts" / f"step_{step}.jsonl").write_text(text)
    return folder


class Page(HTMLParser):
    """Tags balance; collects text and everything that would load from outside."""

    VOID = ("meta", "line", "circle", "path", "br")

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.open, self.words, self.links, self.scripts = [], [], [], 0  # type: ignore[var-annotated]
        self.feed(file.read_text(encoding="utf-8"))
        assert self.open == []
        self.text = " ".join(self.words)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset")]
        self.scripts += tag == "script"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_a_report_is_one_file_with_numbers_sentences_curves_and_samples(tmp_path: Path) -> None:
    file = write_report(make_run(tmp_path / "run"))
    assert file == tmp_path / "run" / "report.html"
    page = Page(file)
    assert page.links == [] and page.scripts == 1
    assert "url(" not in file.read_text() and "@import" not in file.read_text()
    for words in ("67.0\u00a0%", "+32.0", "6:00 min", "set-up 3:20 min", "8,192", "the whole rise", "Reward", "30 steps"):
        assert words in page.text, words
    assert "made to show its working" in page.text
    assert "Step 1" in page.text and "Step 30" in page.text and "Step 9" not in page.text
    assert HOSTILE in page.text and "no answer" in page.text  # as text
    assert "Entropy" not in page.text  # no numbers, no chart
    assert not list((tmp_path / "run").glob("*.tmp"))


def with_mismatch(folder: Path, steps: int = 30) -> Path:
    """make_run's, with the gap measured in every step."""
    rows = [json.loads(line) for line in (make_run(folder, steps) / "metrics.jsonl").read_text().splitlines()[:steps]]
    for row in rows:
        row |= {"mismatch/gap_p99": 0.01, "mismatch/prob_gap_mean": 0.002, "mismatch/ess": 0.98, "mismatch/kl_engine_train": 1e-5}
        row |= {f"mismatch/by_age/{age}/{name}": 0.5 for age in ("0", "8_up") for name in ("share", "gap_mean", "gap_p99")}
        row["mismatch/by_age/0/gap_mean"] = 9.0 if row["step"] <= 20 else 0.25  # not of the last ten steps
        row["mismatch/by_entropy/top_5/entropy_from"] = 0.75
        row |= {"routing/agreement": 0.96, "routing/agreement_layer_1": 0.99, "routing/agreement_layer_2": 0.93}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bins = {"log10_from": -4.0, "log10_width": 0.125, "counts": [1, 2, 1]}
    lines = [json.dumps({"step": s, "mismatch/gap_above": bins, "mismatch/gap_below": bins}) for s in range(1, steps + 1)]
    (folder / "mismatch.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_the_mismatch_has_a_section_of_its_own(tmp_path: Path) -> None:
    text = Page(write_report(with_mismatch(tmp_path / "run"))).text
    for words in (
        "Mismatch between trainer and engine",
        "Gap in probability",
        "Effective sample size",
        "98.0\u00a0%",
        "Weight versions since sampling",
        "8 and more",
        "Means over steps 21 to 30",
        "Tokens by entropy",
        "The gap's distribution",
        "The gap's distribution",
        "the layer that agrees least",
        "93.0\u00a0%",
    ):
        assert words in text, words
    assert "2 to 3" not in text  # no tokens of that age
    table = re.search(r"<td>0</td>(.*?)</tr>", (tmp_path / "run/report.html").read_text())
    assert table and "<td>0.25</td>" in table[1] and "9" not in table[1]


def test_a_run_that_measured_no_gap_has_no_such_section(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "sft/nll": 2.0}\n')
    assert "Mismatch" not in Page(write_report(tmp_path)).text


def test_domains_share_a_chart_of_their_rewards(tmp_path: Path) -> None:
    def page(domains: int) -> str:
        rows = [{"step": step, "reward/mean": 0.5} for step in (1, 2, 3)]
        for row in rows:
            row |= {f"reward/groups/domain{i}": i + 1.0 for i in range(domains)} | {
                f"reward/mean/domain{i}": 0.1 for i in range(domains)
            }
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Page(write_report(tmp_path)).text

    assert "Reward by domain" not in page(1)
    assert "Reward by domain" in page(2) and "The largest of" not in page(2)
    largest = page(8)
    assert "The largest of 8 domains." in largest
    assert [i for i in range(8) if f"domain{i}" in largest] == [2, 3, 4, 5, 6, 7]


def test_the_area_of_a_histogram_is_its_share_of_all() -> None:
    """Two bins below, one above, of 1/4, 1/4 and 1/2: heights on an axis from 0 to 60 %."""
    below, above = Histogram(-2.0, 0.5, (1.0, 1.0)), Histogram(-2.0, 0.5, (0.0, 2.0))
    figure = two_sided_histogram("t", [Sides("first", below, above), Sides("nothing", Histogram(0, 1, ()), Histogram(0, 1, ()))])
    left, right = re.findall(r'<path class="line s1" d="([^"]*)"', figure)
    bottom, quarter, half = 166.0, 101.0, 36.0
    assert [float(point.split()[1]) for point in re.split("[ML]", left)[1:]] == [bottom, *[quarter] * 4, bottom]
    assert [float(point.split()[1]) for point in re.split("[ML]", right)[1:]] == [bottom, half, half, bottom]
    middle = (52 + 420 - 18) / 2
    places = [float(point.split()[0]) for point in re.split("[ML]", left + right)[1:]]
    assert places[0] == middle and max(places[:6]) == middle and min(places[6:]) > middle
    assert "nothing" not in figure and two_sided_histogram("t", []) == ""


def test_a_run_without_anything_but_metrics_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "sft/nll": 2.0, "train/tokens": 10, "time/train_s": 0.1}\n')
    text = Page(write_report(tmp_path)).text
    assert "Supervised warm-up" in text and "Negative log-likelihood" in text and "did not teach" not in text


def test_a_directory_without_metrics_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no metrics\.jsonl"):
        write_report(tmp_path)


def test_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "megatron_rl.observability.report"]
    done = subprocess.run([*command, make_run(tmp_path / "run")], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == str(tmp_path / "run" / "report.html")
    failed = subprocess.run([*command, tmp_path], capture_output=True, text=True, timeout=60)
    assert failed.returncode == 1 and failed.stderr.count("\n") == 1
