"""What a run can refuse before anything is allocated is refused, in one line that names the key."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from megatron_rl.config import RlRun, UserError, validate
from megatron_rl.config.model import ModelConfig, ParallelConfig
from megatron_rl.generation import scheduler_settings, tell_outlook


@pytest.fixture(scope="module")
def tiny(repo_root: Path) -> dict[str, Any]:
    return dict(yaml.safe_load((repo_root / "conf" / "model" / "tiny_ling.yaml").read_text()))


@pytest.fixture(scope="module")
def values(tiny: dict[str, Any]) -> dict[str, Any]:
    """The keys without a default."""
    return {
        "run": {"dir": "runs/test", "steps": 3},
        "model": tiny,
        "optimizer": {"lr": 1e-3},
        "rollout": {"token_budget": 1024, "pool_capacity": 32, "group_size": 8, "max_response_tokens": 256},
        "data": {"tokenizer": "tokenizer.model", "train": "train.jsonl", "eval": "heldout.jsonl"},
    }


def changed(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    values = copy.deepcopy(values)
    *path, last = key.split(".")
    inner = values
    for part in path:
        inner = inner.setdefault(part, {})
    inner[last] = value
    return values


def refusal(values: dict[str, Any]) -> str:
    with pytest.raises(UserError) as refused:
        validate(RlRun, values)
    assert refused.value.exit_code == 2
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_the_required_keys_suffice_and_the_result_is_frozen(values: dict[str, Any]) -> None:
    run = validate(RlRun, values)
    assert run.rollout.token_budget == 1024
    assert run.model.moe is not None and run.model.moe.num_experts == 8
    with pytest.raises(ValidationError, match="frozen"):
        run.rollout.token_budget = 1  # type: ignore[misc]


UNKNOWN = ["rolout", "rollout.token_bugdet", "model.moe.expert_count", "engine.sync.bucket", "algorithm.correction.alpha"]


@pytest.mark.parametrize("key", UNKNOWN)
def test_an_unknown_key_is_named(values: dict[str, Any], key: str) -> None:
    assert refusal(changed(values, key, 1)) == f"{key}: unknown key"


@pytest.mark.parametrize("key", ["run.dir", "optimizer.lr", "rollout.group_size", "model.moe.top_k", "data.train"])
def test_a_missing_key_is_named(values: dict[str, Any], key: str) -> None:
    values = copy.deepcopy(values)
    *path, last = key.split(".")
    inner = values
    for part in path:
        inner = inner[part]
    del inner[last]
    assert refusal(values) == f"{key}: missing"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rollout.token_budget", -3),
        ("rollout.token_budget", 0),
        ("rollout.top_p", 1.5),
        ("rollout.temperature", -0.1),
        ("optimizer.lr", 0.0),
        ("optimizer.beta2", 1.0),
        ("engine.port", 70_000),
        ("engine.mem_fraction_static", 1.0),
        ("engine.dtype", "int8"),
        ("algorithm.advantage", "gae"),
        ("algorithm.kl_weight", -1e-3),
        ("model.rotary_percent", 0.0),
        ("model.hidden_size", "wide"),
        ("parallel.tp", 0),
        ("parallel.sequence_parallel", "perhaps"),
        ("run.steps", 2.5),
        ("resume", "maybe"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_key(values: dict[str, Any], key: str, value: Any) -> None:
    assert refusal(changed(values, key, value)).startswith(f"{key}={value!r}: Input should be ")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.num_kv_heads", 3, "model: num_attention_heads=4 is not divisible by num_kv_heads=3"),
        ("model.moe.num_groups", 3, "model.moe: num_experts=8 is not divisible by num_groups=3"),
        ("model.moe.topk_groups", 5, "model.moe: topk_groups=5 is more than num_groups=2"),
        ("model.moe.top_k", 3, "model.moe: top_k=3 is not 2 x topk_groups=1"),
        ("model.moe.top_k", 5, "model.moe: top_k=5 is more experts than the topk_groups=1 chosen groups hold"),
        ("model.moe.first_dense_layers", 5, "model: moe.first_dense_layers=5 is more than num_layers=4"),
        ("rollout.pool_capacity", 7, "rollout: pool_capacity=7 holds no group of group_size=8"),
        ("rollout.top_k", 0, "rollout: top_k=0 leaves no token to sample; -1 means the whole vocabulary"),
        ("rollout.keep_sampling_mask", True, "rollout: keep_sampling_mask=true needs temperature > 0 and top_k of 2 or more"),
        ("algorithm.correction.low", 6.0, "algorithm.correction: low=6.0 is not below high=5.0"),
        ("algorithm.aggregation", "token_budget", "algorithm: aggregation=token_budget needs train_token_budget"),
        ("model.max_position_embeddings", 1279, "rollout: max_prompt_tokens + max_response_tokens = 1280 is beyond"),
        ("data.eval", None, "data.eval: null, but eval.every or eval.at_ends asks for an evaluation"),
    ],
)
def test_values_that_contradict_each_other_are_named(values: dict[str, Any], key: str, value: Any, message: str) -> None:
    assert refusal(changed(values, key, value)).startswith(message)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"correction.phi": 0.1}, "algorithm.correction: phi=0.1: without effect, needs kind=kpop"),
        (
            {"correction.kind": "none", "correction.low": 0.4},
            "algorithm.correction: low=0.4: without effect, needs kind=icepop or clip",
        ),
        (
            {"correction.kind": "tis", "correction.low": 0.4, "correction.high": 3.0},
            "algorithm.correction: low=0.4, high=3.0: without effect, needs kind=icepop or clip",
        ),
        ({"correction.cap": 3.0}, "algorithm.correction: cap=3.0: without effect, needs kind=tis"),
        ({"routing.probe_every": 4}, "algorithm.routing.probe_every=4: run.steps=3 has no such step"),
        ({"surrogate": "cispo", "clip_low": 0.1}, "algorithm: clip_low=0.1: without effect, needs surrogate=ppo, gspo or gmpo"),
        ({"surrogate": "reinforce", "clip_high": 0.3}, "algorithm: clip_high=0.3: without effect, needs another surrogate"),
        ({"kl_estimator": "k2"}, "algorithm: kl_estimator=k2: without effect, needs kl_weight above 0"),
        (
            {"kl_estimator": "k1", "kl_in": "reward"},
            "algorithm: kl_estimator=k1, kl_in=reward: without effect, needs kl_weight above 0; without that "
            "kl_estimator=k3, kl_in=loss",
        ),
        (
            {"loss_constant": 100},
            "algorithm: loss_constant=100: without effect, needs aggregation=constant; without that loss_constant=null",
        ),
        ({"train_overflow": "discard"}, "algorithm: train_overflow=discard: without effect, needs train_token_budget"),
    ],
)
def test_a_key_without_effect_is_refused_with_what_it_needs(values: dict[str, Any], settings: dict[str, Any], line: str) -> None:
    for key, value in settings.items():
        values = changed(values, f"algorithm.{key}", value)
    assert refusal(values).startswith(line)


def test_the_same_keys_pass_where_they_count(values: dict[str, Any]) -> None:
    counting = {"correction": {"kind": "kpop", "phi": 0.1}, "routing": {"probe_every": 3}, "surrogate": "cispo", "clip_high": 5.0}
    more = {"kl_estimator": "k2", "kl_weight": 0.1, "aggregation": "constant", "loss_constant": 100}
    validate(RlRun, changed(values, "algorithm", counting | more | {"train_token_budget": 9, "train_overflow": "discard"}))
    for correction in ({"kind": "clip", "low": 0.4, "high": 3.0}, {"kind": "tis", "cap": 3.0}):
        validate(RlRun, changed(values, "algorithm", {"correction": correction}))


def test_several_mistakes_share_the_line(values: dict[str, Any]) -> None:
    assert refusal(changed(changed(values, "rollout.top_p", 2.0), "engine.tpp", 2)).split("; ") == [
        "engine.tpp: unknown key",
        "rollout.top_p=2.0: Input should be less than or equal to 1",
    ]


@pytest.mark.parametrize(
    ("world_size", "layout", "message"),
    [
        (3, {"tp": 2, "sequence_parallel": True}, "tp x pp x cp = 2 x 1 x 1 does not divide the 3 ranks"),
        (2, {"pp": 2, "cp": 2}, "tp x pp x cp = 1 x 2 x 2 does not divide the 2 ranks"),
        (2, {"ep": 4}, "parallel.ep: ep x etp = 4 x 1 does not divide the 2 ranks of a stage"),
        (4, {"pp": 2, "ep": 4}, "parallel.ep: ep x etp = 4 x 1 does not divide the 2 ranks of a stage"),
        (8, {"tp": 8, "sequence_parallel": True}, "parallel.tp: model.num_attention_heads=4 is not divisible by 8"),
        (4, {"tp": 4, "sequence_parallel": True}, "parallel.tp: model.num_kv_heads=2 is not divisible by 4"),
        (3, {"pp": 3}, "parallel.pp: model.num_layers=4 is not divisible by 3"),
        (2, {"pp": 2, "vpp": 4}, "parallel.pp: model.num_layers=4 is not divisible by 8"),
        (1, {"vpp": 2}, "parallel.vpp: more than one chunk per rank needs parallel.pp > 1"),
        (16, {"ep": 16}, "parallel.ep=16 does not divide model.moe.num_experts=8"),
        (3, {"etp": 3}, "parallel.etp=3 does not divide model.moe.ffn_hidden_size=128"),
        (2, {"tp": 2}, "parallel.sequence_parallel: must be true, Megatron-Core trains MoE layers under tp > 1 only so"),
        (1, {"sequence_parallel": True}, "parallel.sequence_parallel=true needs parallel.tp > 1"),
    ],
)
def test_an_impossible_layout_is_refused(tiny: dict[str, Any], world_size: int, layout: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="parallel") as refused:
        ParallelConfig(**layout).check(world_size, ModelConfig(**tiny))
    assert message in str(refused.value)


def test_a_model_without_experts_has_no_expert_parallelism(tiny: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"parallel\.ep=2, etp=1: the model has no experts"):
        ParallelConfig(ep=2).check(2, ModelConfig(**tiny | {"moe": None}))


def test_shared_experts_are_cut_over_tensor_parallel_ranks(tiny: dict[str, Any]) -> None:
    odd = changed({"model": tiny}, "model.moe.ffn_hidden_size", 127)["model"]
    with pytest.raises(ValueError, match=r"parallel\.tp=2 does not divide the shared experts' .*127"):
        ParallelConfig(tp=2, sequence_parallel=True).check(2, ModelConfig(**odd))


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (1, {}),
        (2, {}),
        (2, {"ep": 2}),
        (2, {"tp": 2, "sequence_parallel": True}),
        (2, {"tp": 2, "sequence_parallel": True, "etp": 2}),
        (2, {"pp": 2}),
        (2, {"pp": 2, "vpp": 2}),
        (2, {"cp": 2}),
        (4, {"tp": 2, "pp": 2, "ep": 2, "sequence_parallel": True}),
        (8, {"ep": 8}),
    ],
    ids=str,
)
def test_possible_layouts_pass(tiny: dict[str, Any], world_size: int, layout: dict[str, Any]) -> None:
    ParallelConfig(**layout).check(world_size, ModelConfig(**tiny))


@pytest.mark.parametrize("kept", [False, True])
def test_a_cut_of_the_vocabulary_is_warned_of_unless_its_masks_are_kept(
    values: dict[str, Any], kept: bool, caplog: pytest.LogCaptureFixture
) -> None:
    run = validate(RlRun, changed(changed(values, "rollout.top_k", 20), "rollout.keep_sampling_mask", kept))
    tell_outlook(scheduler_settings(run), run)
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warned == [] if kept else (len(warned) == 1 and "top_k=20: log-probs are those before the cut" in warned[0])
