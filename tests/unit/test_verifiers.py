"""Verifiers as pure functions."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import reasoning_gym

from megatron_rl import verifiers
from megatron_rl.types import Prompt, Score
from megatron_rl.verifiers.length import cosine, soft_overlong
from megatron_rl.verifiers.mixture import OWN, mixed


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
    ("parts", "response", "fault"),
    [
        (["think"], "<think>so</think>12", None),
        (["think"], "so</think>12", None),  # the template opened it
        (["think"], "12", "no </think>"),
        (["think"], "<think> </think>12", "nothing in the thoughts"),
        (["think"], "<think>so</think> ", "nothing after the thoughts"),
        (["think"], "<think>a</think>b<think>c</think>d", "more than one"),
        (["boxed"], r"\boxed{1}", None),
        (["boxed"], r"<think>\boxed{2}</think>\boxed{1}", None),
        (["boxed"], r"\boxed{1}\boxed{2}", "2 boxes"),
        (["boxed"], r"\boxed{ }", "an empty box"),
        (["answer"], "so <answer>1 < 2</answer>\n", None),
        (["answer"], "<answer>1</answer> and more", "does not end"),
        (["answer"], "<answer>1</answer><answer>2</answer>", "does not end"),
        (["answer"], "<answer> </answer>", "empty"),
        (["think", "boxed"], "<think>so</think>12", "boxed: 0 boxes"),
    ],
)
def test_format_wants_every_part_once_and_filled(parts: list[str], response: str, fault: str | None) -> None:
    score = judge("format", response, "", format=parts)
    assert (score.value, score.status) == ((1.0, "correct") if fault is None else (0.0, "wrong"))
    assert (fault or "") in score.reason


def test_format_wants_thoughts_and_a_box_by_default_and_names_unknown_parts() -> None:
    assert judge("format", r"<think>so</think>\boxed{1}", "").status == "correct"
    assert judge("format", "1", "").status == "wrong"
    assert "'poem'" in judge("format", "1", "", format=["poem"]).reason


MIXTURE = {"mixture": {"exact": 3, "format": 1}, "format": ["think"]}


def test_a_mixture_is_a_weighted_mean_and_its_first_part_says_what_is_correct() -> None:
    right = judge("mixture", "a</think>b", "a</think>b", **MIXTURE)
    assert (right.value, right.status, right.extracted) == (1.0, "correct", "a</think>b")
    assert judge("mixture", "b", "b", **MIXTURE).value == 0.75
    formal = judge("mixture", "a</think>b", "b", **MIXTURE)
    assert (formal.value, formal.status) == (0.25, "wrong")
    assert formal.reason == "exact 0; format 1"


def test_a_mixture_without_one_judgement_has_none() -> None:
    score = judge("mixture", "b", "b", mixture={"exact": 1, "format": 1}, format=["poem"])
    assert (score.value, score.status) == (0.0, "error")
    assert score.reason.startswith("format: ")


def test_a_runs_weights_name_the_prompts_own_verifier() -> None:
    prompt = Prompt("p", "", (), "1", "exact", metadata={"format": ["think"]})
    assert mixed(prompt, {}) is prompt
    assert mixed(prompt, {OWN: 0.9, "format": 0.1}).metadata["mixture"] == {"exact": 0.9, "format": 0.1}
    own = Prompt("p", "", (), "1", "mixture", metadata={"mixture": {"exact": 1}})
    assert mixed(own, {OWN: 0.9, "format": 0.1}) is own


def test_the_cosine_reward_is_clamped_capped_and_monotone() -> None:
    assert cosine(0, 100, 0.5, -0.5) == 0.5
    assert cosine(50, 100, 0.5, -0.5) == pytest.approx(0.0)
    assert cosine(25, 100, 1.0, 0.0) == pytest.approx(0.5 + math.sqrt(2) / 4)
    assert cosine(100, 100, 0.5, -0.5) == cosine(10_000, 100, 0.5, -0.5) == -0.5
    assert cosine(0, 100, 0.5, -0.5, cap=0.2) == 0.2
    values = [cosine(tokens, 100, 0.5, -0.5, cap=0.2) for tokens in range(150)]
    assert values == sorted(values, reverse=True)


def test_soft_overlong_is_dapos_line() -> None:
    assert [soft_overlong(tokens, 100, 20) for tokens in (0, 80, 85, 90, 100, 500)] == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]


def test_faults_are_found_without_an_import() -> None:
    assert verifiers.fault("exact", {}) is None
    assert verifiers.fault("reasoning_gym", CHAIN_SUM) is None
    assert "metadata.entry" in str(verifiers.fault("reasoning_gym", {"dataset": "gcd"}))
    assert "unknown verifier 'maths'" in str(verifiers.fault("maths", {}))
    assert verifiers.fault("mixture", MIXTURE) is None
    assert "needs metadata.mixture" in str(verifiers.fault("mixture", {}))
    assert "unknown verifier 'maths'" in str(verifiers.fault("mixture", {"mixture": {"maths": 1}}))
    assert "needs metadata.dataset" in str(verifiers.fault("mixture", {"mixture": {"reasoning_gym": 1}}))
    assert "weight of 'exact' must be a number above 0, not 0" in str(verifiers.fault("mixture", {"mixture": {"exact": 0}}))
    assert "no mixture" in str(verifiers.fault("mixture", {"mixture": {"mixture": 1}}))
    assert "must name verifiers" in str(verifiers.fault("mixture", {"mixture": []}))
