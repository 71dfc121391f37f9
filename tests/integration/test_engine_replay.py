"""Qwen3-MoE in a bf16 engine: with its experts replayed an fp32 policy routes all tokens as the engine did, and is nearer to it."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import pytest
import torch
from ranks import SUPPORT
from tiny_families import model_of, write_family

from megatron_rl.config.rollout import EngineConfig
from megatron_rl.engine.client import SglangEngine
from megatron_rl.engine.launcher import SglangEngines
from megatron_rl.types import GenerateRequest, Prompt, Rollout, RoutingShape, SamplingParams

pytestmark = [pytest.mark.sglang, pytest.mark.dist]
COUNT, NEW = 32, 40
LAYOUTS = {"EP2": {"ep": 2}, "TP2": {"tp": 2, "sequence_parallel": True}}


def rollouts_of(engine: SglangEngine) -> list[Rollout]:
    random = torch.Generator().manual_seed(0)
    prompts = torch.randint(2, 64, (COUNT, 8), generator=random).tolist()
    requests = [GenerateRequest(f"0:{i}#0", tuple(p), NEW, SamplingParams(), report_experts=True) for i, p in enumerate(prompts)]
    rollouts = {r.rollout_id: Rollout(r.rollout_id, Prompt("", "", r.tokens, "", ""), 0) for r in requests}

    async def run() -> None:
        async for messages in engine.generate(requests):
            for message in messages:
                rollouts[message.rollout_id] = rollouts[message.rollout_id].extended(message)

    asyncio.run(asyncio.wait_for(run(), 60))
    return list(rollouts.values())


def test_replay_routes_as_the_engine_did_and_shrinks_the_gap(tmp_path: Path, torchrun: Callable[..., str]) -> None:
    path = write_family(tmp_path / "hf", "qwen3_moe", seed=0)
    model = model_of(json.loads((path / "config.json").read_text()))
    assert model.moe
    shape = RoutingShape(model.num_layers, model.moe.first_dense_layers, model.moe.top_k, model.moe.num_experts)
    config = EngineConfig(device="cpu", dtype="bfloat16", max_total_tokens=4096)
    engines = SglangEngines(config, str(path), tmp_path, 128, seed=0, routing=shape)
    try:
        engines.start()
        rollouts = rollouts_of(engines.alive[0])
    finally:
        engines.stop()
    dump = [
        {
            "prompt": rollout.prompt.tokens,
            "tokens": rollout.tokens,
            "engine_logprobs": rollout.engine_logprobs,
            "experts": base64.b64encode(rollout.experts).decode(),
        }
        for rollout in rollouts
    ]
    (tmp_path / "rollouts.json").write_text(json.dumps(dump))
    lines = [json.loads(line) for line in torchrun(2, SUPPORT / "engine_replay_run.py", tmp_path, json.dumps(LAYOUTS)).splitlines()]
    for layout in LAYOUTS:
        off, r3 = ([line for line in lines if line["layout"] == layout and line["kind"] == kind] for kind in ("off", "r3"))
        assert sum(line["choices"] for line in r3) >= sum(len(r.tokens) for r in rollouts) * shape.moe_layers * shape.top_k
        assert all(line["same"] == line["choices"] for line in r3), "every choice of every recorded position"
        assert sum(line["same"] for line in off) < sum(line["choices"] for line in off), "bf16 chooses differently somewhere"
        mean_off, mean_r3 = (fmean(gap for line in lines for gap in line["gaps"]) for lines in (off, r3))
        assert mean_r3 < 0.9 * mean_off
