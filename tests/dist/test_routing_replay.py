"""Replayed experts decide where tokens go, in any layout and in what is computed again; the weights stay the policy's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ranks import SUPPORT, run_ranks

RANDOM = {"replay": "r3", "record": "random"}
SP = {"tp": 2, "sequence_parallel": True}
ONE: dict[str, dict[str, Any]] = {
    "free": {"replay": "off"},
    "compared": {"replay": "off", "record": "random"},
    "own": {"replay": "r3", "record": "own"},
    "random": RANDOM,
    "random, all again": RANDOM | {"recompute": "full"},
    "r2": {"replay": "r2"},
}
TWO: dict[str, dict[str, Any]] = {
    "DP2": {},
    "EP2": {"ep": 2},
    "TP2": SP,
    "TP2 ETP2, MLPs again": SP | {"etp": 2, "recompute": "mlp"},
    "PP2": {"pp": 2},
    "PP2, all again": {"pp": 2, "recompute": "full"},
    "PP2 VPP2, MLPs again": {"pp": 2, "vpp": 2, "recompute": "mlp"},
    "CP2": {"cp": 2},
}
KINDS = {"random": RANDOM, "r2": {"replay": "r2"}}
COMBINED = {"random": tuple(TWO), "r2": ("TP2", "PP2 VPP2, MLPs again", "CP2")}

pytestmark = [pytest.mark.dist, pytest.mark.timeout(900)]  # the first test waits for all layouts


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("replay")
    run_ranks(1, SUPPORT / "replay_run.py", [str(out), json.dumps(ONE)], timeout=300)
    two = {f"{layout} {kind}": KINDS[kind] | TWO[layout] for kind, layouts in COMBINED.items() for layout in layouts}
    run_ranks(2, SUPPORT / "replay_run.py", [str(out), json.dumps(two)], timeout=580)
    return out


def result(results: Path, name: str, rank: int = 0) -> dict[str, Any]:
    return json.loads((results / f"{name}.{rank}.json").read_text())


def assert_same(there: dict[str, Any], one: dict[str, Any]) -> None:
    for expected, step in zip(one["steps"], there["steps"], strict=True):
        names = [name for name in expected if name.startswith(("loss/", "routing/", "policy/grad_norm"))]
        for name in names:
            assert step[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name
    for number, logprobs in there["logprobs"].items():
        for whose in ("old", "reference"):
            assert logprobs[whose] == pytest.approx(one["logprobs"][number][whose], abs=5e-5)


def gap(one: dict[str, Any], other: dict[str, Any], step: int, whose: str = "old") -> float:
    numbers = [number for number in one["logprobs"] if number.startswith(f"{step}.")]
    pairs = [(one["logprobs"][n][whose], other["logprobs"][n][whose]) for n in numbers]
    return max(abs(a - b) for old, others in pairs for a, b in zip(old, others, strict=True))


@pytest.mark.parametrize(("kind", "layout"), [(kind, layout) for kind, layouts in COMBINED.items() for layout in layouts])
def test_a_record_holds_whatever_the_layout(results: Path, layout: str, kind: str) -> None:
    for rank in range(2):
        assert_same(result(results, f"{layout} {kind}", rank), result(results, kind))


def test_what_is_computed_again_goes_where_it_went(results: Path) -> None:
    assert_same(result(results, "random, all again"), result(results, "random"))


def test_a_record_of_its_own_choices_changes_nothing(results: Path) -> None:
    free, own, r2 = (result(results, name) for name in ("free", "own", "r2"))
    assert gap(own, free, step=0) < 1e-6
    assert own["steps"][0]["policy/grad_norm"] == pytest.approx(free["steps"][0]["policy/grad_norm"], rel=1e-6)
    assert own["steps"][0]["routing/agreement"] == r2["steps"][0]["routing/agreement"] == 1.0
    assert own["steps"][1]["routing/agreement"] < 1.0, "its weights have moved since"
    assert "routing/agreement" not in free["steps"][0]


def test_another_record_does_and_the_reference_follows_none(results: Path) -> None:
    free, random = result(results, "free"), result(results, "random")
    assert gap(random, free, step=0) > 0.05 and gap(random, free, step=0, whose="reference") < 1e-6
    agreement = random["steps"][0]["routing/agreement"]
    assert agreement == pytest.approx(0.5, abs=0.1), "4 of 8 experts at random"
    layers = [value for name, value in random["steps"][0].items() if name.startswith("routing/agreement_layer_")]
    assert len(layers) == 3 and agreement == pytest.approx(sum(layers) / 3)


def test_without_replay_a_record_is_compared_and_not_followed(results: Path) -> None:
    free, compared, random = (result(results, name) for name in ("free", "compared", "random"))
    assert gap(compared, free, step=0) == 0.0
    assert compared["steps"][0]["routing/agreement"] == pytest.approx(random["steps"][0]["routing/agreement"], abs=0.05)
