"""The planner's numbers against real Megatron ranks: parameters, weights and optimizer state exactly, activations nearly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_families import tiny_model

from megatron_rl.config.model import ModelConfig, ParallelConfig
from megatron_rl.planning.activations import Tokens, layer_parts
from megatron_rl.planning.memory import item_bytes, policy_bytes
from megatron_rl.planning.parameters import Census, stages

pytestmark = pytest.mark.dist

WORLD = 4
SP = {"sequence_parallel": True}
LAYOUTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ling-tp2-pp2-ep2": ("bailing_moe_v2", "float32", {"tp": 2, "pp": 2, "ep": 2, **SP}),
    "ling-tp2-pp2-ep2-bf16": ("bailing_moe_v2", "bfloat16", {"tp": 2, "pp": 2, "ep": 2, **SP}),
    "ling-pp2-vpp2-bf16": ("bailing_moe_v2", "bfloat16", {"pp": 2, "vpp": 2}),
    "ling-uneven": ("bailing_moe_v2", "float32", {"pp": 2, "layers_per_stage": [1, 3], "ep": 2}),
    "ling-ep4": ("bailing_moe_v2", "bfloat16", {"ep": 4}),
    "ling-cp2-undivided": ("bailing_moe_v2", "bfloat16", {"cp": 2, "distributed_optimizer": False}),
    "lite-tp2-etp2": ("bailing_moe", "bfloat16", {"tp": 2, "etp": 2, **SP}),
    "deepseek-tp2-pp2": ("deepseek_v3", "bfloat16", {"tp": 2, "pp": 2, "etp": 2, **SP}),
    "tied-pp2-tp2": ("qwen3_tied", "float32", {"pp": 2, "tp": 2}),
    "qwen2-tp2": ("qwen2", "bfloat16", {"tp": 2, **SP}),
}
VOCABULARY = 67  # padded under TP
TOKENS = 512
# Without Transformer Engine norms, SwiGLU and the rotary embedding keep what fused ones compute again: measured 1.33 and 1.40.
SAVED_OVER_PLANNED = (1.0, 1.6)


def model_of(family: str, dtype: str) -> ModelConfig:
    return tiny_model(family, vocab_size=VOCABULARY).model_copy(update={"dtype": dtype})


def deep(dense: int, moe: int) -> ModelConfig:
    """Wide enough for its activations to count."""
    values = tiny_model("bailing_moe_v2").model_dump() | {"num_layers": dense + moe, "num_mtp_layers": 0, "hidden_size": 256}
    values |= {"num_attention_heads": 8, "num_kv_heads": 4, "ffn_hidden_size": 768}
    experts = values["moe"] | {"first_dense_layers": dense, "ffn_hidden_size": 128}
    return ModelConfig.model_validate(values | {"moe": experts, "dtype": "float32"})


CASES = [deep(1, 1), deep(1, 2), deep(2, 1)]


def test_ranks_hold_what_was_planned(torchrun: Callable[..., str], tmp_path: Path, repo_root: Path) -> None:
    models = {name: model_of(family, dtype) for name, (family, dtype, _) in LAYOUTS.items()}
    layouts = {name: {"model": models[name].model_dump(), "parallel": LAYOUTS[name][2]} for name in LAYOUTS}
    cases = [{"model": model.model_dump(), "tokens": TOKENS} for model in CASES]
    script = repo_root / "tests" / "support" / "planned_ranks.py"
    torchrun(WORLD, script, tmp_path, json.dumps(layouts), json.dumps(cases), timeout=580)
    for name, model in models.items():
        ranks = [json.loads((tmp_path / f"{name}.{rank}.json").read_text()) for rank in range(WORLD)]
        check_layout(name, model, ParallelConfig(**LAYOUTS[name][2]), ranks)
    check_activations(json.loads((tmp_path / "saved.json").read_text()))


def check_layout(name: str, model: ModelConfig, parallel: ParallelConfig, ranks: list[dict[str, int]]) -> None:
    census, planned = Census.of(model), stages(model, parallel)
    states = 0.0
    for rank, real in enumerate(ranks):
        where = f"{name}, rank {rank}"
        held = census.held(planned[real["pipeline_rank"]], parallel)
        for kind in ("dense", "experts", "frozen", "buffers"):
            assert getattr(held, kind) == real[kind], f"{where}: {kind}"
        policy = policy_bytes(held, parallel, WORLD, item_bytes(model))
        assert policy.weights == real["weights"], where
        padding = 4 * (64 * real["tensors"] + 2 * parallel.vpp * 128 * WORLD) if parallel.distributed_optimizer else 0
        assert 0 <= real["gradients"] - policy.gradients <= padding, where
        states += policy.optimizer
    assert sum(real["optimizer"] for real in ranks) == states, name  # a rank's own share depends on where its buffers are cut


def check_activations(saved: list[int]) -> None:
    """One more MoE layer, and one more dense layer."""
    model, parallel = CASES[0], ParallelConfig()
    tokens = Tokens.of(model, parallel, TOKENS, 1.0)
    for kind, more, moe in (("MoE", saved[1], True), ("dense", saved[2], False)):
        planned = 4 * layer_parts(model, parallel, tokens, moe).under("none")
        ratio = (more - saved[0]) / planned
        low, high = SAVED_OVER_PLANNED
        assert low <= ratio <= high, f"a {kind} layer keeps {ratio:.2f} times what was planned ({planned / 2**20:.2f} MiB)"
        print(f"a {kind} layer keeps {ratio:.2f} times what was planned")
