"""tools/simulate_rollouts.py as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from megatron_rl.config import SimulationRun, validate

QUICK = ["prompts=16", "group_size=4", "engines.count=4", "lengths.scale=0.02", "lengths.max_tokens=1311", "steps=6", "jobs=1"]


def simulate(repo_root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, repo_root / "tools" / "simulate_rollouts.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=repo_root)


def keys(values: Any, prefix: str = "") -> set[str]:
    if not isinstance(values, dict):
        return {prefix}
    return {key for name, value in values.items() for key in keys(value, f"{prefix}.{name}")}


def test_every_key_stands_in_the_yaml(repo_root: Path) -> None:
    with initialize_config_dir(str(repo_root / "conf"), version_base="1.3"):
        values: Any = OmegaConf.to_container(compose("simulate"), resolve=True, throw_on_missing=True)
    run = validate(SimulationRun, values)
    assert run == SimulationRun()
    assert keys(values) == keys(run.model_dump(mode="json"))


def test_json_is_one_object_with_what_the_table_shows(repo_root: Path, tmp_path: Path) -> None:
    listed = simulate(repo_root, *QUICK, "--json", "--png", str(tmp_path / "timeline.png"))
    shown = simulate(repo_root, *QUICK)
    assert (listed.returncode, shown.returncode) == (0, 0), listed.stderr + shown.stderr
    told = json.loads(listed.stdout)
    assert told["rollout_speedup"] > 1
    assert set(told["against"]) == {"synchronous", "count"}
    for name, speed in told["against"].items():
        line = f"against {name}, at equal trained tokens: rollout x {speed['rollout_speedup']:.2f}, "
        assert line + f"end to end x {speed['end_to_end_speedup']:.2f}" in shown.stdout
    assert f"{told['results'][0]['tokens_per_s']:,.0f}" in shown.stdout
    with Image.open(tmp_path / "timeline.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 20) or ()) > 10


def test_the_table_has_a_row_for_every_combination(repo_root: Path) -> None:
    sizes = ["table.budgets=[1,2]", "table.pools=[1]", "table.sigmas=[null,1]"]
    done = simulate(repo_root, *QUICK, *sizes, "--table", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [(row["on_stale"], row["retention_bound"] == 1) for row in rows] == [("finish", False), ("drop_group", True)] * 2
    assert rows[2]["token_budget"] == 2 * rows[0]["token_budget"]
    assert rows[0]["dropped_fraction"] == 0 < rows[1]["dropped_fraction"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["engines.kv_tokens=100"], 2, "engines.kv_tokens=100 does not hold the longest prompt and response, 65792"),
        (["pool_capacity=4"], 2, "pool_capacity=4 holds no group of group_size=8"),
        (["engines.slot=3"], 2, "Could not override 'engines.slot'"),
        (["steps=0"], 2, "steps=0: Input should be greater than 0"),
        (["lengths.path=/none.csv"], 1, "/none.csv: No such file or directory"),
        (["count.over_sample=1000"], 2, "count.over_sample=1000: the pool of 3840 is too small for it"),
        (["--png"], 2, "--png needs a file name"),
        (["--png", "a.png", "--table"], 2, "three different runs"),
    ],
)
def test_a_mistake_is_one_line(repo_root: Path, arguments: list[str], code: int, message: str) -> None:
    done = simulate(repo_root, *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
