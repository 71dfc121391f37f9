"""Router terms, and fp16's loss scale with them, are the same at every layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import SUPPORT, run_ranks
from router_terms_run import steps

pytestmark = pytest.mark.dist

LAYOUTS = {
    "dp2": {},
    "tp2": {"tp": 2, "sequence_parallel": True},
    "pp2": {"pp": 2},
    "ep2": {"ep": 2},
    "cp2": {"cp": 2},
    "fp16 ep2": {"ep": 2, "dtype": "float16"},
}


def test_terms_are_those_of_one_process() -> None:
    alone = steps({})
    output = run_ranks(2, Path(SUPPORT / "router_terms_run.py"), [json.dumps(LAYOUTS)], timeout=580)
    found = [json.loads(line) for line in output.splitlines() if line.startswith("[")]
    assert len(found) == 2 * len(LAYOUTS)
    for layout, there in found:
        tolerance = 5e-3 if "fp16" in layout else 2e-6
        for step, expected in zip(there, alone, strict=True):
            for name in ("loss", "router/z_loss", "router/load_balance", "policy/grad_norm"):
                assert step[name] == pytest.approx(expected[name], rel=tolerance), (layout, name)
            assert step.get("policy/loss_scale") == (1024.0 if "fp16" in layout else None)
