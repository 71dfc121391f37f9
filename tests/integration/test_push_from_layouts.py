"""A server that a policy pushed into answers as one that was started from the policy's export, whatever the policy's layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import SUPPORT, run_ranks
from tiny_families import write_family

pytestmark = [pytest.mark.sglang, pytest.mark.dist, pytest.mark.slow]
TOLERANCE = 1e-4  # nats, float32
LAYOUTS = {"EP2": {"ep": 2}, "TP2": {"tp": 2, "sequence_parallel": True}, "PP2": {"pp": 2}}


@pytest.mark.parametrize("family", ["qwen3_moe", "bailing_moe_v2"])
def test_a_push_from_any_layout_equals_a_start_from_the_export(tmp_path: Path, family: str) -> None:
    write_family(tmp_path / "hf", family, seed=3)
    output = run_ranks(2, SUPPORT / "push_layouts.py", [str(tmp_path), json.dumps(LAYOUTS)], timeout=280)
    results = [json.loads(line) for line in output.splitlines() if line.startswith('{"layout"')]
    assert [result["layout"] for result in results] == list(LAYOUTS)
    for result in results:
        assert result["gap"] is not None, "greedy outputs differ"
        assert result["gap"] < TOLERANCE
        assert result["moved"] > 0.01, "the weights before were to be other ones"
