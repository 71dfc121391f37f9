"""`data.stages` and `data.curriculum` on the command line: what is refused, and by which name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from megatron_rl.config import RlRun, UserError, validate
from megatron_rl.config.data import Curriculum, Stage


def data(repo_root: Path, *overrides: str) -> Any:
    with initialize_config_dir(str(repo_root / "conf"), version_base="1.3"):
        composed = compose("rl", ["data.tokenizer=t", "data.train=p", "run.steps=300", *overrides])
    values: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    return validate(RlRun, values).data


def test_stages_and_a_curriculum_are_read_as_the_readme_writes_them(repo_root: Path) -> None:
    stages = "data.stages=[{steps: 200, domains: [math]}, {steps: 100, domains: [code, science]}]"
    found = data(repo_root, stages, "data.curriculum={pass_rate: [0.1, 0.9], revisit: 4}")
    assert found.stages == (Stage(steps=200, domains=("math",)), Stage(steps=100, domains=("code", "science")))
    assert found.curriculum == Curriculum(pass_rate=(0.1, 0.9), revisit=4)
    assert data(repo_root, "data.stages=[{steps: 299, domains: [math]}, {domains: null}]").stages[1] == Stage()
    assert data(repo_root).stages == () and data(repo_root).curriculum is None


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("data.stages=[{steps: 200}, {steps: 99}]", "run.steps=300: the stages of data.stages have 299"),
        ("data.stages=[{steps: 301}]", "run.steps=300: the stages of data.stages have 301"),
        (
            "data.stages=[{steps: 300}, {steps: null}]",
            "run.steps=300: the stages of data.stages have 300 before the last one's rest begins",
        ),
        (
            "data.stages=[{steps: null}, {steps: 10}]",
            "data: stages.0.steps: null, but only the last stage may take all steps that are left",
        ),
        ("data.stages=[{steps: 0}]", "data.stages.0.steps=0: Input should be greater than 0"),
        ("data.stages=[{steps: 300, domains: []}]", "data.stages.0.domains=[]: Tuple should have at least 1 item"),
        ("data.stages=[{steps: 300, domain: math}]", "data.stages.0.domain: unknown key"),
        (
            "data.curriculum={pass_rate: [0.9, 0.1], revisit: 4}",
            "data.curriculum: pass_rate=[0.9, 0.1]: expected 0 <= low <= high <= 1",
        ),
        (
            "data.curriculum={pass_rate: [0.1, 1.1], revisit: 4}",
            "data.curriculum: pass_rate=[0.1, 1.1]: expected 0 <= low <= high <= 1",
        ),
        ("data.curriculum={pass_rate: [0, 1], revisit: 4}", "data.curriculum: pass_rate=[0, 1] leaves no prompt out"),
        (
            "data.curriculum={pass_rate: [0.1, 0.9], revisit: 1}",
            "data.curriculum.revisit=1: Input should be greater than or equal to 2",
        ),
        ("data.curriculum={pass_rate: [0.1, 0.9]}", "data.curriculum.revisit: missing"),
    ],
)
def test_what_contradicts_itself_is_refused_by_name(repo_root: Path, override: str, line: str) -> None:
    with pytest.raises(UserError) as refused:
        data(repo_root, override)
    assert str(refused.value).startswith(line)
