"""The YAML groups and the validated models name the same keys, so that whatever a run knows can be overridden."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from megatron_rl.algorithms.correction import Correction
from megatron_rl.config import EvalRun, RlRun, SftRun, UserError, validate

INPUTS = {
    "rl": ["data.tokenizer=t", "data.train=p"],
    "sft": ["data.tokenizer=t", "data.stages=[{data: p, steps: 1000}]"],
    "eval": ["checkpoint=c", "data.eval=p"],
}
KINDS = {"rl": RlRun, "sft": SftRun, "eval": EvalRun}


def composed(repo_root: Path, verb: str, *overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(repo_root / "conf"), version_base="1.3"):
        values = OmegaConf.to_container(compose(verb, [*overrides]), resolve=True, throw_on_missing=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def keys(values: Any, prefix: str = "") -> set[str]:
    if not isinstance(values, dict) or not values:
        return {prefix}
    return {key for name, value in values.items() for key in keys(value, f"{prefix}.{name}")}


@pytest.mark.parametrize("verb", ["rl", "sft", "eval"])
def test_every_key_of_the_models_stands_in_the_yaml(repo_root: Path, verb: str) -> None:
    values = composed(repo_root, verb, *INPUTS[verb])
    assert keys(values) == keys(validate(KINDS[verb], values).model_dump(mode="json"))


def groups() -> list[tuple[str, str]]:
    conf = Path(__file__).resolve().parents[2] / "conf"
    return [(path.parent.name, path.stem) for path in sorted(conf.glob("*/*.yaml")) if path.parent.name != "experiment"]


@pytest.mark.parametrize(("group", "name"), groups())
def test_every_group_option_is_valid(repo_root: Path, group: str, name: str) -> None:
    overrides = ["model.max_position_embeddings=32768"] if group == "model" else []
    validate(RlRun, composed(repo_root, "rl", f"{group}={name}", *INPUTS["rl"], *overrides))


@pytest.mark.parametrize(
    ("verb", "name", "needed"),
    [
        ("rl", "quickstart", []),
        ("rl", "gsm8k_tiny", ["data.tokenizer=qwen"]),
        ("sft", "quickstart_sft", []),
        ("eval", "quickstart_eval", []),
    ],
)
def test_experiments_are_valid_and_possible(repo_root: Path, verb: str, name: str, needed: list[str]) -> None:
    config = validate(KINDS[verb], composed(repo_root, verb, f"experiment={name}", *needed))
    if isinstance(config, (RlRun, SftRun)):
        config.parallel.check(config.parallel.nproc, config.model)


def refusal(repo_root: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as refused:
        validate(RlRun, composed(repo_root, "rl", *INPUTS["rl"], *overrides))
    return str(refused.value)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["algorithm.correction.kind=kpop"], "algorithm.correction: phi=null: kind=kpop needs it"),
        (["algorithm.correction.sequence_band=[2,1]"], "algorithm.correction: sequence_band=[2.0, 1.0]"),
        (
            ["algorithm.kl_weight=0.1", "algorithm.kl_in=reward", "algorithm.old_logprobs=reuse"],
            "kl_in=reward needs old_logprobs=recompute",
        ),
        (["algorithm.kl_weight=0.1", "algorithm.kl_estimator=k1"], "kl_estimator=k1 needs kl_in=reward"),
        (
            ["algorithm.kl_weight=0.1", "algorithm.kl_in=reward", "rollout.group_release=early"],
            "kl_in=reward needs rollout.group_release=complete",
        ),
        (["algorithm.dual_clip=1.1"], "dual_clip=1.1 needs surrogate=ppo and to be above 1 + clip_high"),
        (["algorithm.dual_clip=4", "algorithm.surrogate=gspo"], "dual_clip=4.0 needs surrogate=ppo"),
    ],
)
def test_impossible_algorithms_are_refused_by_name(repo_root: Path, overrides: list[str], line: str) -> None:
    assert line in refusal(repo_root, *overrides)


def test_the_loss_takes_every_setting_of_the_correction(repo_root: Path) -> None:
    for name in ("icepop", "tis", "grpo"):
        algorithm = validate(RlRun, composed(repo_root, "rl", f"algorithm={name}", *INPUTS["rl"])).algorithm
        assert Correction(**algorithm.correction.model_dump()).kind == algorithm.correction.kind
