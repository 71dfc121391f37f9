"""Waiting for another rank, and the vocabulary over ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ranks import SUPPORT, run_ranks

pytestmark = pytest.mark.dist


def check(*args: object) -> list[dict[str, Any]]:
    output = run_ranks(2, Path(SUPPORT / "ranks_checks.py"), [str(arg) for arg in args], timeout=90)
    return sorted((json.loads(line) for line in output.splitlines()), key=lambda result: result["rank"])


def test_a_rank_waits_without_using_the_processor() -> None:
    _, waiting = check("late", 3.0, 60.0)
    assert waiting["got"] == {"groups": [1, 2]}
    assert waiting["waited"] > 2.0 and waiting["busy"] < 0.2


def test_a_wait_beyond_the_limit_raises_and_says_for_what() -> None:
    _, waiting = check("late", 6.0, 2.0)
    assert waiting["error"].startswith("rank 1 waited for the rollout phase of step 3 (at most 2 s) and got:")


def test_a_split_vocabulary_changes_neither_values_nor_gradients() -> None:
    for result in check("vocabulary"):
        assert max(result["differences"]) < 2e-5
