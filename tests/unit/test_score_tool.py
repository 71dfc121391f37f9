"""tools/score.py as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROWS: list[dict[str, Any]] = [
    {"id": "a", "source": "one", "gold": "1/2", "response": r"\boxed{0.5}", "is_correct": True},
    {"id": "b", "source": "one", "gold": "3", "response": r"\boxed{4}", "label": True},
    {"source": "two", "gold": "3", "response": "no idea"},
    {"gold": "", "response": "3"},
    {"source": "two", "gold": "12", "response": "[red]\x00 \u202e12", "is_correct": True, "label": "official"},
]


def score(repo_root: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, repo_root / "tools" / "score.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=repo_root)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_one_row_for_each_in_order_and_a_table_by_source(repo_root: Path, tmp_path: Path) -> None:
    out = tmp_path / "scored.jsonl"
    run = score(repo_root, "--verifier", "math", "--in", write(tmp_path / "pairs.jsonl", ROWS), "--out", out)
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["status"] for row in rows] == ["correct", "wrong", "unparsable", "error", "correct"]
    assert [row["value"] for row in rows] == [1, 0, 0, 0, 1]
    assert rows[1] | {"seconds": 0} == {
        "id": "b", "source": "one", "value": 0.0, "status": "wrong", "extracted": "4", "reason": "not equal to '3'", "seconds": 0
    }  # fmt: skip
    lines = run.stdout.splitlines()
    assert any("one" in line and "1/2  50.00%" in line for line in lines)
    assert any("all" in line and "2/3  66.67%" in line for line in lines)
    assert "not equal to '3'" in run.stdout[run.stdout.index("disagreements") :]
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_metadata_reach_the_verifier_and_the_mode_the_response(repo_root: Path, tmp_path: Path) -> None:
    out = tmp_path / "scored.jsonl"
    rows = [{"gold": "3", "response": "3"}, {"gold": "3", "response": "3", "metadata": {"math_mode": "lenient"}}]
    arguments = ["--verifier", "math", "--in", write(tmp_path / "p.jsonl", rows), "--out", out, "--math-mode", "strict"]
    assert score(repo_root, *arguments).returncode == 0
    assert [json.loads(line)["status"] for line in out.read_text().splitlines()] == ["unparsable", "correct"]


def test_settings_of_programs_reach_them(repo_root: Path, tmp_path: Path) -> None:
    """The echo of half the cases, against a limit of time that is enough for one and not for the other."""
    cases = [{"input": "1", "output": "1"}, {"input": "2", "output": "3"}]
    row = {"gold": "", "metadata": {"cases": cases}}
    wait = "import time; time.sleep(60)"
    rows = [row | {"response": f"```python\n{program}\n```"} for program in ("print(input())", wait)]
    out = tmp_path / "scored.jsonl"
    arguments = ["--verifier", "code", "--in", write(tmp_path / "p.jsonl", rows), "--out", out, "--code-unsafe"]
    assert score(repo_root, *arguments, "--code-marks", "fraction", "--code-timeout-s", "2").returncode == 0
    assert [(row["value"], row["status"]) for row in map(json.loads, out.read_text().splitlines())] == [
        (0.5, "wrong"),
        (0, "timeout"),
    ]


def test_settings_of_programs_are_looked_at(repo_root: Path, tmp_path: Path) -> None:
    arguments = ["--in", write(tmp_path / "p.jsonl", ROWS), "--out", tmp_path / "o.jsonl"]
    dead = score(repo_root, "--verifier", "math", *arguments, "--code-memory-mb", "100")
    assert dead.returncode == 2 and "--code-memory-mb: without effect, needs --verifier code or mixture" in dead.stderr
    small = score(repo_root, "--verifier", "code", *arguments, "--code-memory-mb", "1")
    assert small.returncode == 2 and "--code-memory-mb=1: Input should be greater than or equal to 64" in small.stderr


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        ([{"gold": "3"}], "p.jsonl:1: missing key 'response'"),
        ([{"gold": "3", "response": "3"}, {"gold": 3, "response": "3"}], "p.jsonl:2: 'gold'"),
        ([], "p.jsonl: the file is empty"),
    ],
)
def test_a_wrong_file_is_one_line_and_leaves_no_output(repo_root: Path, tmp_path: Path, rows: Any, fault: str) -> None:
    run = score(repo_root, "--verifier", "exact", "--in", write(tmp_path / "p.jsonl", rows), "--out", tmp_path / "o.jsonl")
    assert run.returncode == 1
    assert fault in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.glob("o.jsonl*"))
