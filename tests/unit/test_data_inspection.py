r"""megatron_rl/data/gold.py, inspection.py and tools/inspect_data.py."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rl.data.gold import Gold, gold_answers, judged, text_of
from megatron_rl.data.inspection import note, summarised
from megatron_rl.data.tokenizer import train_sentencepiece
from megatron_rl.types import Prompt, Rollout, Score, ScoreStatus
from megatron_rl.verifiers import exact

PROMPT = Prompt("p", "1+2=", (1, 2), "3", "exact", "sums")


class InProcess:
    """The verifier `exact`, in this process."""

    def __init__(self) -> None:
        self.judged: list[str] = []

    async def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        self.judged += [text_of(rollout.tokens) for rollout in rollouts]
        return [exact.verify(text_of(rollout.tokens), rollout.prompt) for rollout in rollouts]

    def close(self) -> None: ...


def test_a_gold_answer_is_written_until_one_way_verifies() -> None:
    rewards = InProcess()
    prompts = [
        PROMPT,
        replace(PROMPT, answer=" "),
        replace(PROMPT, verifier="math", answer="é{}"),
        replace(PROMPT, verifier="code"),
    ]
    golds = asyncio.run(gold_answers(prompts, rewards))
    # `exact` stands in for `math` here: it wants the bare answer, which is the second way
    assert [gold.status for gold in golds] == ["verifies", "unparsable", "verifies", "unchecked"]
    assert rewards.judged == ["3", " ", "\\boxed{é{}}", "é{}"]


@pytest.mark.parametrize(
    ("statuses", "status"),
    [
        (["wrong", "correct"], "verifies"),
        (["wrong", "unparsable"], "fails"),
        (["unparsable", "unparsable"], "unparsable"),
        (["error", "wrong"], "unparsable"),
        (["timeout", "error"], "timeout"),
        ([], "unchecked"),
    ],
)
def test_what_all_ways_say(statuses: list[ScoreStatus], status: str) -> None:
    assert judged([Score(0.0, each, reason=each) for each in statuses]).status == status


def test_the_summary_by_hand() -> None:
    tokens = [5, 1, 9, 7]
    texts = ["a b", " a  b\n", "c", "a b"]
    prompts = [
        replace(PROMPT, text=text, tokens=(0,) * n, answer=answer) for text, n, answer in zip(texts, tokens, "3343", strict=True)
    ]
    notes = [note(f"f:{i}", prompt, Gold("verifies")) for i, prompt in enumerate(prompts, 1)]
    notes[2] = replace(notes[2], gold="fails", reason="why")
    notes[3] = replace(notes[3], answer="another", domain="other")
    summary = summarised(notes, limit=6)
    assert (summary["rows"], summary["faulty"], summary["over_limit"]) == (4, 0, 2)
    assert summary["duplicate_rows"] == ["f:2", "f:4"] and summary["conflict_rows"] == ["f:4"]
    assert summary["tokens"] == {"p1": 1, "p10": 1, "p50": 5, "p90": 9, "p99": 9, "p100": 9, "mean": 5.5}
    assert summary["domains"] == {"sums": 3, "other": 1} and summary["verifiers"] == {"exact": 4}
    assert summary["gold"] == {"verifies": 3, "fails": 1} and summary["gold_faults"] == ["f:3: fails: why"]


def test_the_tool_on_a_file_with_one_of_each(repo_root: Path, tmp_path: Path) -> None:
    row = {"question": "1+2=", "answer": "so #### 3"}
    rows = [
        row,
        row,
        {**row, "answer": "so #### 4"},
        {"question": "1+1=", "answer": "no mark"},
        {"question": "2=", "answer": "#### "},
    ]
    source = tmp_path / "train.jsonl"
    source.write_text("".join(json.dumps(each) + "\n" for each in rows))
    train_sentencepiece(["0123456789+-= #"], tmp_path / "tokenizer.model", 24)
    command = [sys.executable, repo_root / "tools" / "inspect_data.py", source, "--tokenizer", tmp_path / "tokenizer.model"]
    command += ["--column", "prompt=question", "--verifier", "exact", "--answer-after", "####", "--limit", "3"]
    done = subprocess.run([*command, "--out", tmp_path / "out", "--json"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["rows"], summary["faulty"], summary["duplicates"], summary["conflicts"]) == (5, 1, 2, 1)
    assert summary["faults"] == [f"{source}:4: no '####' in the answer (data.answer_after)"] and summary["over_limit"] == 3
    assert summary["gold"] == {"verifies": 3, "unparsable": 1}
    assert summary["gold_faults"] == [f"{source}:5: unparsable: empty response"]
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    assert len((tmp_path / "out" / "rows.jsonl").read_text().splitlines()) == 5
    wrong = subprocess.run([*command[:3], "--column", "text=q"], capture_output=True, text=True, timeout=60, check=False)
    assert wrong.returncode == 2 and "--column text=q: expected KEY=NAME" in wrong.stderr
