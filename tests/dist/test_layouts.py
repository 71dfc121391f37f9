"""The result of training does not depend on the layout: every layout against one process, from the same seed and batches."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import SUPPORT, run_ranks

SP = {"sequence_parallel": True}
LING: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one": {}},
    2: {
        "DP2": {},
        "DP2, plain optimizer": {"distributed_optimizer": False},
        "DP2, overlapped": {"overlap_grad_reduce": True},
        "EP2": {"ep": 2},
        "EP2, plain optimizer": {"ep": 2, "distributed_optimizer": False},
        "TP2": {"tp": 2, **SP},
        "TP2, plain optimizer": {"tp": 2, "distributed_optimizer": False, **SP},
        "TP2 ETP2": {"tp": 2, "etp": 2, **SP},
        "TP2 EP2": {"tp": 2, "ep": 2, **SP},
        "PP2": {"pp": 2},
        "PP2 VPP2": {"pp": 2, "vpp": 2},
        "CP2": {"cp": 2},
        "EP2, MLPs again": {"ep": 2, "recompute": "mlp"},
        "TP2, all again": {"tp": 2, "recompute": "full", **SP},
        "PP2, all again": {"pp": 2, "recompute": "full"},
    },
    4: {"TP2 PP2 EP2": {"tp": 2, "pp": 2, "ep": 2, **SP}, "TP2 CP2": {"tp": 2, "cp": 2, **SP}},
}
TP2, EP2, PP2, CP2 = {"tp": 2, **SP}, {"ep": 2}, {"pp": 2, "layers_per_stage": [3, 1]}, {"cp": 2}
OTHERS: dict[str, dict[str, dict[str, Any]]] = {
    "latent": {"TP2": TP2, "PP2": PP2, "CP2": CP2, "TP2, MLPs again": {**TP2, "recompute": "mlp"}},
    "normalised head": {"TP2": TP2, "EP2": EP2},
    "tied, biased": {"TP2": TP2, "PP2": PP2},
}
LAYOUTS: dict[int, dict[str, dict[str, dict[str, Any]]]] = {
    1: {"ling": LING[1]} | {model: {"one": {}} for model in OTHERS},
    2: {"ling": LING[2]} | OTHERS,
    4: {"ling": LING[4]},
}

pytestmark = [pytest.mark.dist, pytest.mark.timeout(1200)]  # the first test waits for all layouts


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All layouts of a world size that this session asks for in one launch: most of a launch is the import of Megatron."""
    out = tmp_path_factory.mktemp("layouts")
    asked = [item.callspec.params for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    wanted = {(of["world"], of["model"], of["layout"]) for of in asked}
    for world, models in LAYOUTS.items():
        layouts = {
            model: {name: layout for name, layout in named.items() if world == 1 or (world, model, name) in wanted}
            for model, named in models.items()
        }
        if any(layouts.values()):
            run_ranks(world, SUPPORT / "layout_run.py", [str(out), json.dumps(layouts)], timeout=580)
    return out


def result(results: Path, layout: str, rank: int, model: str = "ling") -> dict[str, Any]:
    return json.loads((results / f"{model}.{layout}.{rank}.json").read_text())


def assert_close(name: str, actual: Any, expected: Any) -> None:
    """A number or a table; most are sums over some hundred tokens."""
    atol = 1e-6 if name.startswith("loss/") else 0.0 if name == "policy/grad_norm" else 1e-5
    tensors = (torch.tensor(value, dtype=torch.float64) for value in (actual, expected))
    rtol = 0.0 if name.startswith("loss/") else 1e-5
    torch.testing.assert_close(*tensors, rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}")


SLOW = {  # what other layouts, or tests/dist/test_routing_replay.py, show in part
    *("DP2, plain optimizer", "EP2, plain optimizer", "TP2, plain optimizer", "TP2 ETP2"),
    *("EP2, MLPs again", "TP2, MLPs again", "TP2, all again", "PP2, all again"),
}
RUNS = [
    pytest.param(world, model, name, marks=pytest.mark.slow if name in SLOW else ())
    for world, models in LAYOUTS.items()
    for model, layouts in models.items()
    for name in layouts
]


@pytest.mark.parametrize(("world", "model", "layout"), RUNS)
def test_losses_norms_and_logprobs_are_those_of_one_process(results: Path, world: int, model: str, layout: str) -> None:
    one = result(results, "one", 0, model)
    seen: set[str] = set()
    for rank in range(world):
        there = result(results, layout, rank, model)
        for expected, step in zip(one["steps"], there["steps"], strict=True):
            assert step["policy/skipped"] == 0.0
            assert step.keys() == expected.keys()
            for name, value in expected.items():
                assert_close(name, step[name], value)
        for number, logprobs in there["logprobs"].items():
            # Adam makes a step of the learning rate out of a gradient that is nothing but rounding: trained weights drift apart.
            for whose, limit in (("reference", 5e-6), ("old", 5e-6 if number.startswith("0.") else 2e-4)):
                assert logprobs[whose] == pytest.approx(one["logprobs"][number][whose], abs=limit)
        seen |= there["logprobs"].keys()
    assert seen == one["logprobs"].keys()


def test_every_loss_masks_clips_and_keeps(results: Path) -> None:
    """So that equal sums say something."""
    steps = result(results, "one", 0)["steps"]
    assert 0 < steps[1]["policy/off_policy_masked"] < steps[1]["tokens"] / 2
    for step in steps:
        for name in ("policy/clipped", "mismatch/masked_low", "mismatch/masked_high"):
            assert 0 < step[name] < step["tokens"] / 2, name
        assert min(abs(step[f"loss/{term}"]) for term in ("policy", "kl", "entropy")) > 1e-4


def test_training_moves_the_weights_and_not_the_reference(results: Path) -> None:
    one = result(results, "one", 0)

    def gap(step: int) -> float:
        pairs = (pair for number, pair in one["logprobs"].items() if number.startswith(f"{step}."))
        return max(abs(old - reference) for pair in pairs for old, reference in zip(pair["old"], pair["reference"], strict=True))

    gaps = [gap(step) for step in range(3)]
    assert gaps[1] > gaps[0] and gaps[2] > 0.01
    assert all(math.isfinite(step["policy/grad_norm"]) and step["policy/grad_norm"] > 0.5 for step in one["steps"])  # clipped


def test_replicas(results: Path) -> None:
    """CP, TP and PP ranks share a dp_rank; EP ranks are data-parallel."""

    def places(layout: str) -> list[list[int]]:
        return [result(results, layout, rank)["dp"] for rank in range(2)]

    for layout in ("DP2", "EP2"):
        assert places(layout) == [[0, 2], [1, 2]]
    for layout in ("TP2", "TP2 EP2", "PP2", "CP2"):
        assert places(layout) == [[0, 1], [0, 1]]
