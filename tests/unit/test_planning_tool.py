"""tools/plan.py as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from megatron_rl.config import PlanRun, validate
from megatron_rl.config.plan import GPUS
from megatron_rl.planning.search import search

FITS = ["model=ling_mini_2_0", "cluster.gpus=16", "sequence_tokens=8192"]


def plan(repo_root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, repo_root / "tools" / "plan.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=repo_root)


def composed(repo_root: Path, *overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(repo_root / "conf"), version_base="1.3"):
        values: Any = OmegaConf.to_container(compose("plan", [*overrides]), resolve=True, throw_on_missing=True)
    return dict(values)


def keys(values: Any, prefix: str = "") -> set[str]:
    if not isinstance(values, dict) or not values:
        return {prefix}
    return {key for name, value in values.items() for key in keys(value, f"{prefix}.{name}")}


def test_every_key_stands_in_the_yaml(repo_root: Path) -> None:
    values = composed(repo_root)
    assert keys(values) == keys(validate(PlanRun, values).model_dump(mode="json"))


def test_json_is_one_object_with_what_the_tables_show(repo_root: Path) -> None:
    shown, listed = plan(repo_root, *FITS), plan(repo_root, *FITS, "--json")
    assert (shown.returncode, listed.returncode) == (0, 0), shown.stderr + listed.stderr
    result = json.loads(listed.stdout)
    best = result["layouts"][0]
    assert round(result["model"]["active_parameters"] / 1e9, 2) == 1.43
    assert set(best["memory_bytes"]) == {"train", "sync", "generate"}
    assert f"{best['sync']['push_bytes'] / 1e9:,.1f} GB" in shown.stdout
    assert " ".join(best["overrides"]) in " ".join(shown.stdout.split())
    assert f"{best['step_s_at_peak']['total']:.1f}" in shown.stdout
    for kind in ("weights", "gradients", "optimizer", "activations", "engine weights", "KV cache", "buckets"):
        assert kind in shown.stdout


def test_the_keys_it_offers_lead_back_to_the_layout(repo_root: Path) -> None:
    best = json.loads(plan(repo_root, *FITS, "--json").stdout)["layouts"][0]
    again = json.loads(plan(repo_root, *FITS, *best["overrides"], "--json").stdout)
    assert [layout["overrides"] for layout in again["layouts"]] == [best["overrides"]]


def test_a_given_layout_that_does_not_fit_says_why(repo_root: Path) -> None:
    done = plan(repo_root, "model=ling_1t", "cluster.gpus=512", "parallel.tp=8", "parallel.pp=16", "parallel.ep=8")
    assert done.returncode == 1
    assert "does not fit: needs " in done.stdout
    assert "because of " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cluster.gpu=h101"], f"cluster.gpu: 'h101' is none of {', '.join(GPUS)}"),
        (["cluster.gpux=1"], "cluster.gpux"),
        (["model=nothing"], "model/nothing"),
        (["parallel.tp=3"], "parallel: tp x pp x cp = 3 x 1 x 1 does not divide the 8 ranks"),
    ],
)
def test_mistakes_are_one_line_naming_the_key(repo_root: Path, arguments: list[str], message: str) -> None:
    done = plan(repo_root, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("plan: error: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_help_has_examples_and_every_gpu(repo_root: Path) -> None:
    done = plan(repo_root, "--help")
    assert done.returncode == 0
    assert "python tools/plan.py model=ling_1t cluster.gpus=512" in done.stdout
    assert all(gpu in (repo_root / "conf" / "plan.yaml").read_text() for gpu in GPUS)


def test_a_trillion_parameters_on_512_gpus_take_seconds(repo_root: Path) -> None:
    run = validate(PlanRun, composed(repo_root, "model=ling_1t", "cluster.gpus=512"))
    started = time.process_time()
    assert search(run, ()).looked_at > 1000
    assert time.process_time() - started < 10
