"""Verifiers as pure functions."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import reasoning_gym

from megatron_rl import verifiers
from megatron_rl.types import Prompt, Score


def judge(verifier: str, response: str, answer: str, **metadata: Any) -> Score:
    return verifiers.load(verifiers.MODULES[verifier])(response, Prompt("p", "", (), answer, verifier, metadata=metadata))


@pytest.mark.parametrize(("response", "status"), [("42", "correct"), (" 42\n", "correct"), ("42.", "wrong"), (" ", "unparsable")])
def test_exact(response: str, status: str) -> None:
    score = judge("exact", response, "42 ")
    assert score.status == status
    assert score.value == float(status == "correct")


CHAIN_SUM = {"dataset": "chain_sum", "entry": {"question": "47 + 85 - 6 =", "answer": "126", "metadata": {}}}


@pytest.mark.parametrize(
    ("response", "status", "extracted"),
    [
        ("47+80=127 127+5=132 132-6=126 #126", "correct", "126"),
        ("#126", "correct", "126"),
        ("# 126 ", "correct", "126"),
        ("#5 #126", "correct", "126"),  # the last one counts
        ("#126 #5", "wrong", "5"),
        ("#+0126.0", "correct", "+0126.0"),  # as reasoning-gym has it
        ("#1260", "wrong", "1260"),  # its partial mark of 0.75 is no reward
        ("#126 127 128", "wrong", "126 127 128"),
        ("126", "unparsable", None),
        ("47+80=127 #", "unparsable", None),
        ("", "unparsable", None),
    ],
)
def test_reasoning_gym_judges_what_follows_the_last_hash(response: str, status: str, extracted: str | None) -> None:
    score = judge("reasoning_gym", response, "126", **CHAIN_SUM)
    assert (score.status, score.extracted) == (status, extracted)
    assert score.value == float(status == "correct")


@pytest.mark.parametrize("name", ["chain_sum", "gcd", "basic_arithmetic", "spell_backward", "countdown", "word_sorting"])
def test_reasoning_gym_accepts_its_own_answers(name: str) -> None:
    """Entries travel through JSON, as they do from a prompt file."""
    for entry in reasoning_gym.create_dataset(name, seed=1, size=10):
        entry = json.loads(json.dumps(entry, default=str))
        assert judge("reasoning_gym", f"#{entry['answer']}", entry["answer"], dataset=name, entry=entry).value == 1.0
        assert judge("reasoning_gym", "#zzz", entry["answer"], dataset=name, entry=entry).value == 0.0


@pytest.mark.parametrize(
    ("gold", "response", "status"),
    [
        ("18", r"She makes \boxed{18} dollars", "correct"),
        ("18", "A: 26", "wrong"),
        (r"\frac{1}{2}", r"$\frac{2}{4}$", "correct"),
        ("1/2", "the answer is 0.5", "correct"),
        ("1000.99", "it's 1,000.99", "correct"),
        ("1,22", "1.22", "correct"),
        (r"[1, 2)", r"$[1,2)$", "correct"),
        (r"x^2+1", r"\boxed{1+x^2}", "correct"),
        ("3", "I do not know", "unparsable"),
        ("3", "", "unparsable"),
        ("", "3", "error"),
    ],
)
def test_math(gold: str, response: str, status: str) -> None:
    score = judge("math", response, gold)
    assert score.status == status
    assert score.value == float(status == "correct")


def test_math_agrees_with_the_labels_of_real_responses(shared_data: Path) -> None:
    agreed, seen = Counter[str](), Counter[str]()
    for line in (shared_data / "verifier_pairs.jsonl").read_text().splitlines():
        row = json.loads(line)
        source = row["source"].partition("/")[0]
        if source in ("gsm8k_openai", "qwen2.5-math-cot"):
            seen[source] += 1
            agreed[source] += (judge("math", row["response"], row["gold"]).value == 1.0) == row["is_correct"]
    assert seen["gsm8k_openai"] > 2000
    assert agreed["gsm8k_openai"] == seen["gsm8k_openai"]
    assert agreed["qwen2.5-math-cot"] >= 0.998 * seen["qwen2.5-math-cot"]


def test_faults_are_found_without_an_import() -> None:
    assert verifiers.fault("exact", {}) is None
    assert verifiers.fault("reasoning_gym", CHAIN_SUM) is None
    assert "metadata.entry" in str(verifiers.fault("reasoning_gym", {"dataset": "gcd"}))
    assert "unknown verifier 'maths'" in str(verifiers.fault("maths", {}))
