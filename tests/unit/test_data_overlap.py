"""megatron_rl/data/overlap.py and tools/decontaminate.py: what is planted is found, by the rule that should, and nothing else."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_rl.config import UserError
from megatron_rl.data.overlap import Benchmarks, Match, ngrams, shingles, skeleton
from megatron_rl.data.split import write_split

WORDS = [
    a + b for a in ("bar", "lin", "mor", "tas", "vel", "kun", "pel", "rod") for b in ("ta", "ne", "so", "ri", "mu", "ka", "dol")
]


def text(seed: int, words: int) -> str:
    """Prose that no two seeds share; a number every ten words."""
    rng = random.Random(seed)
    return " ".join(str(rng.randrange(1000)) if i % 10 == 4 else rng.choice(WORDS) for i in range(words))


QUESTIONS = [(f"bench.jsonl:{i}", text(i, 12 + 5 * i)) for i in range(20)]  # of 12 to 107 words
BENCHMARKS = Benchmarks(QUESTIONS)


@pytest.mark.parametrize("row", range(20))
def test_a_planted_copy_is_found_whatever_its_case_white_space_and_numbers(row: int) -> None:
    name, question = QUESTIONS[row]
    numbers = "".join(str((int(c) + 3) % 10) if c.isdigit() else c for c in question)
    for copy in (question, question.upper(), question.replace(" ", "\n  "), numbers, numbers.replace("7", "1,234.5")):
        assert BENCHMARKS.match(copy) == Match("exact", name)


def test_32_words_in_a_row_are_found_and_31_are_not() -> None:
    name, question = QUESTIONS[15]
    words = question.split()
    for first in (0, 7, len(words) - 32):
        run = words[first : first + 32]
        assert BENCHMARKS.match(f"{text(90, 150)} {' '.join(run).upper()} {text(91, 150)}") == Match("ngram", name)
        assert BENCHMARKS.match(f"{text(90, 150)} {' '.join(run[:31])} {text(91, 150)}") is None


def test_a_near_duplicate_is_found_with_its_jaccard_similarity() -> None:
    name, question = QUESTIONS[8]
    words = question.split()
    words[10] = "another"  # three runs of three words change
    mine, theirs = shingles(" ".join(words)), shingles(question)
    expected = len(mine & theirs) / len(mine | theirs)
    assert 0.5 < expected < 1 and len(mine & theirs) == len(theirs) - 3
    # "exact" and "ngram" do not see it: one word differs, and no 32 words in a row are left
    assert BENCHMARKS.match(" ".join(words[:34])) == Match("near", name, pytest.approx(similarity(" ".join(words[:34]), question)))
    assert Benchmarks(QUESTIONS, ngram=99, jaccard=expected).match(" ".join(words)) == Match("near", name, expected)
    assert Benchmarks(QUESTIONS, ngram=99, jaccard=expected + 1e-9).match(" ".join(words)) is None


def similarity(a: str, b: str) -> float:
    return len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))


def test_clean_controls_give_nothing() -> None:
    assert [BENCHMARKS.match(text(1000 + i, 10 + i)) for i in range(300)] == [None] * 300


def test_a_short_template_is_not_a_copy_with_other_numbers() -> None:
    benchmarks = Benchmarks([("b:1", "What is 3 + 4?"), ("b:2", "How many of the 12 apples are left?")])
    assert benchmarks.match("what is 3+4?") == Match("exact", "b:1")
    assert benchmarks.match("What is 5 + 9?") is None
    assert benchmarks.match("How many of the 5 apples are left?") == Match("exact", "b:2")


def test_units_of_the_rules_by_hand() -> None:
    assert skeleton("Tom has 1,200.50 big\n red Apples") == "tomhasbigredapples"
    assert list(ngrams("A b  C d", 3)) == ["a b c", "b c d"] and list(ngrams("a b", 3)) == []
    assert shingles("One, two 3 three-four") == {"one two three", "two three four"}


def files(folder: Path) -> tuple[list[dict[str, Any]], list[str | None]]:
    """Prompts, and for each the rule that must drop it."""
    words = QUESTIONS[5][1].split()  # 37: every run of 32 has the word that changes
    words[20] = "another"
    planted = [
        (QUESTIONS[3][1].upper(), "exact"),
        (QUESTIONS[4][1].replace("1", "8"), "exact"),
        (f"{text(90, 80)} {QUESTIONS[16][1]}", "ngram"),
        (" ".join(words), "near"),
    ]
    rows: list[tuple[str, str | None]] = [(text(500 + i, 30), None) for i in range(40)]
    for i, pair in enumerate(planted):
        rows.insert(9 * i + 2, pair)
    (folder / "bench.jsonl").write_text("".join(json.dumps({"problem": question}) + "\n" for _, question in QUESTIONS))
    return [{"prompt": question, "answer": str(i)} for i, (question, _) in enumerate(rows)], [rule for _, rule in rows]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_the_tool_drops_what_is_planted_and_keeps_the_rest_as_it_was(repo_root: Path, tmp_path: Path, suffix: str) -> None:
    rows, rules = files(tmp_path)
    source, out = tmp_path / f"train.{suffix}", tmp_path / "out"
    if suffix == "jsonl":
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        table = pa.Table.from_pylist(rows).append_column("level", pa.array([1] * len(rows), pa.int8()))
        pq.write_table(table, source, row_group_size=7)
    command = [sys.executable, repo_root / "tools" / "decontaminate.py", "--in", source, "--against", tmp_path / "bench.jsonl"]
    done = subprocess.run([*command, "--out", out, "--json"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["dropped"] == {"exact": 2, "ngram": 1, "near": 1} and summary["kept"] == 40 and summary["rows"] == 44
    dropped = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    assert [(row["row"], row["rule"]) for row in dropped] == [(f"{source}:{i}", rule) for i, rule in enumerate(rules, 1) if rule]
    assert dropped[0]["benchmark"] == f"{tmp_path / 'bench.jsonl'}:4" and dropped[0]["content"]["answer"] == "2"
    clean = [row for row, rule in zip(rows, rules, strict=True) if not rule]
    if suffix == "jsonl":
        assert [json.loads(line) for line in (out / "kept.jsonl").read_text().splitlines()] == clean
    else:
        kept = pq.read_table(out / "kept.parquet")
        assert kept.schema.field("level").type == pa.int8() and kept.drop_columns("level").to_pylist() == clean
    assert json.loads((out / "summary.json").read_text()) == summary and not (out / "decisions.partial.jsonl").exists()


def test_one_that_ended_half_way_goes_on_and_writes_the_same_files(repo_root: Path, tmp_path: Path) -> None:
    rows, _ = files(tmp_path)
    source = tmp_path / "train.jsonl"
    whole = [json.dumps(row) + "\n" for row in rows]
    written = []
    for out, lines in (("cut", [*whole[:24], "{torn\n"]), ("cut", whole), ("whole", whole)):
        source.write_text("".join(lines))
        command = [sys.executable, repo_root / "tools" / "decontaminate.py", "--in", source, "--out", tmp_path / out]
        command += ["--against", tmp_path / "bench.jsonl"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if lines is whole:
            assert done.returncode == 0, done.stderr
            written.append([(tmp_path / out / name).read_bytes() for name in ("kept.jsonl", "dropped.jsonl")])
        else:
            assert done.returncode == 1 and done.stderr.endswith(
                "train.jsonl:25: not valid JSON (Expecting property name enclosed in double quotes at column 2)\n"
            )
            assert len((tmp_path / "cut" / "decisions.partial.jsonl").read_text().splitlines()) == 1 + 24
    assert written[0] == written[1]


def test_a_source_that_changed_meanwhile_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "p.jsonl"
    source.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    for decisions in ([None], [None] * 3):
        with pytest.raises(UserError, match="and has others now"):
            write_split(str(source), tmp_path, decisions)
    assert not (tmp_path / "kept.jsonl").exists()
