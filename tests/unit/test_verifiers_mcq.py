"""The multiple-choice verifier: formats of real answers, and prose that is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_rl.types import Prompt, Score
from megatron_rl.verifiers.mcq import choice, letter_of, verify

FORMATS = (
    "The answer is ({})",
    "**{}**",
    r"\boxed{{{}}}",
    r"\boxed{{\text{{({})}}}}",
    "{}.",
    "({})",
    "{}) 65",
    "Answer: {}",
    "ANSWER: {}",
    "ANS:{}",
    "Answer - {}.",
    "So the correct option is **{}**.",
    "### Answer\n{}",
    "Option {} is correct.",
    "{} is the correct choice",
    "I first took C, no.\nSo, ({}) it is.",
    "<think>C or D</think>\n{}",
    r"Final answer: $\boxed{{{}}}$",
)


def judge(response: str, answer: str, **metadata: object) -> Score:
    return verify(response, Prompt("p", "", (), answer, "mcq", metadata=metadata))


@pytest.mark.parametrize("format", FORMATS)
def test_a_letter_is_found_in_any_format(format: str) -> None:
    for letter in "ABE":
        assert choice(format.format(letter)) == letter
    assert judge(format.format("B"), "B").status == "correct"
    assert judge(format.format("B"), "(A)").status == "wrong"


@pytest.mark.parametrize(
    "prose", ["A train needs 5 hours", "The answer is a mystery", "I do not know", "The answer is 12", "BAD", ""]
)
def test_prose_is_no_choice(prose: str) -> None:
    assert choice(prose) is None
    assert judge(prose, "A").status == "unparsable"


def test_the_last_mention_counts() -> None:
    assert choice("The answer is A. Wait, the answer is B because A is even.") == "B"


@pytest.mark.parametrize("options", [["A) 5 m", "B) 130°"], ["5 m", "130°"], {"A": "5 m", "B": "130°"}])
def test_the_text_of_one_option_is_its_letter(options: object) -> None:
    assert judge(r"\boxed{130°}", "B", options=options).status == "correct"
    assert judge("The answer is 5 m", "B", options=options).extracted == "A"
    assert judge("The answer is 6 m", "B", options=options).status == "unparsable"
    assert judge("B", "130°", options=options).status == "correct"


def test_an_option_that_stands_twice_is_no_letter() -> None:
    assert judge(r"\boxed{5}", "A", options=["5", "6", "5"]).status == "unparsable"


def test_gold_answers() -> None:
    assert [letter_of(text) for text in ("B", "(b)", "B) 65", "**B**", "12", "Because")] == ["B", "B", "B", "B", None, None]
    assert "names no choice" in judge("B", "12").reason


def test_real_questions(shared_data: Path) -> None:
    rows = [json.loads(line) for line in (shared_data / "mcq" / "aqua.jsonl").read_text().splitlines()]
    assert len(rows) == 254
    for row in rows:
        right, wrong = (next(o for o in row["options"] if (o[0] == row["correct"]) == same) for same in (True, False))
        assert judge(right, row["correct"], options=row["options"]).status == "correct"
        assert judge(wrong, row["correct"], options=row["options"]).status == "wrong"
    found = [judge(row["rationale"], row["correct"], options=row["options"]) for row in rows]
    assert sum(score.status == "correct" for score in found) >= 235  # some explanations never name their letter
    assert sum(score.status == "wrong" for score in found) <= 2
