"""What rank 0 generates with: the engines, the reward workers, the scheduler's loop and the evaluator of a run.

Whatever is started is entered on the ExitStack given, so that it is taken down in reverse order however the run ends.
"""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_rl.config import EvalRun, RlRun, UserError
from megatron_rl.config.model import ModelConfig
from megatron_rl.config.rollout import EngineConfig, RewardConfig
from megatron_rl.data.prompts import read_prompts
from megatron_rl.data.stream import PromptStream
from megatron_rl.data.tokenizer import Tokenizer
from megatron_rl.loops.evaluate import Evaluator
from megatron_rl.loops.signals import StopFlag
from megatron_rl.ports import WeightSink
from megatron_rl.rewards.pool import RewardPool
from megatron_rl.rewards.shaping import length_shape
from megatron_rl.rewards.worker import Limits
from megatron_rl.scheduler.messages import Settings
from megatron_rl.scheduler.outlook import outlook
from megatron_rl.types import Group, Prompt, RoutingShape, SamplingParams

if TYPE_CHECKING:
    from megatron_rl.engine.launcher import SglangEngines
    from megatron_rl.loops.conductor import Conductor

log = logging.getLogger("megatron_rl")


@dataclass(frozen=True)
class RolloutParts:
    """Nothing on other ranks than 0."""

    conductor: Conductor | None = None
    engines: SglangEngines | None = None
    sink: WeightSink | None = None
    evaluator: Evaluator | None = None


def reward_pool(reward: RewardConfig, tokenizer: Tokenizer, max_response_tokens: int) -> RewardPool:
    length = reward.length
    shape = None
    if length.method != "none":
        numbers = length.model_dump(include={"correct", "correct_cap", "wrong", "cache_tokens"})
        shape = length_shape(length.method, length.max_tokens or max_response_tokens, **numbers)
    return RewardPool(
        reward.workers,
        reward.timeout_s,
        tokenizer.decode,
        limits=Limits(reward.cpu_s, reward.memory_mb),
        metadata={"math_mode": reward.math_mode, "format": reward.format},
        mixture=reward.mixture,
        shape=shape,
        code=reward.code.model_dump(),
    )


def rollout_parts(config: RlRun, run_dir: Path, tokenizer: Tokenizer, stop: StopFlag, stack: ExitStack) -> RolloutParts:
    from megatron_rl.engine.weights import EngineWeights
    from megatron_rl.loops.batches import usable_groups
    from megatron_rl.loops.conductor import Conductor
    from megatron_rl.loops.journal import Journal
    from megatron_rl.resharding.quantizing import QuantizingSink

    rollout, algorithm, sync, data = config.rollout, config.algorithm, config.engine.sync, config.data
    prompts = read_prompts(data.train, tokenizer, rollout.max_prompt_tokens, data)
    stream = PromptStream(prompts, config.run.seed, data.shuffle, data.stages, data.curriculum)
    stack.callback(lambda: stream.history.write(run_dir / "pass_history.jsonl", stream.prompts))
    rewards = reward_pool(config.reward, tokenizer, rollout.max_response_tokens)
    stack.callback(rewards.close)
    rewards.expect(prompts)
    runner = stack.enter_context(asyncio.Runner())
    shape = architecture_only(config, run_dir, tokenizer)
    dtype = config.model.dtype if config.engine.dtype == "auto" else config.engine.dtype
    empty = config.engine.model_copy(update={"dtype": dtype, "server_args": {"load_format": "dummy"} | config.engine.server_args})
    needs_experts = algorithm.routing.needs_engines_experts
    routing = routing_shape(config.model) if any(map(needs_experts, range(config.run.steps))) else None
    engines = sglang_engines(empty, shape, run_dir, config.model.max_position_embeddings, config.run.seed, stack, routing, stop)
    sink: WeightSink = EngineWeights(engines, config.engine.tp, sync.timeout_s, sync.transport)
    if sync.quantize == "fp8":
        sink = QuantizingSink(sink, sync.verify)
    sampling = sampling_params(
        rollout.temperature, rollout.max_response_tokens, tokenizer, rollout.top_p, rollout.top_k, config.run.seed
    )
    settings = scheduler_settings(config)
    tell_outlook(settings, config)
    about = {"format": 3, "model": config.model.model_dump(mode="json"), "reward": config.reward.model_dump(mode="json")}
    about |= {"routing": algorithm.routing.model_dump(mode="json"), "advantage": algorithm.advantage}
    about |= {"data": data.model_dump(mode="json", include={"stages", "curriculum"})}
    journal = Journal(run_dir / "journal", about)

    def is_useful(group: Group) -> bool:
        failed, advantage = config.reward.exclude_failed, algorithm.advantage
        return bool(usable_groups([group], advantage=advantage, zero_variance="drop", exclude_failed=failed))

    kept = replace(sampling, report_support=rollout.keep_sampling_mask)
    conductor = Conductor(
        settings, kept, engines, rewards, stream, journal, stop, runner, rollout.timeout_s, is_useful, needs_experts
    )
    evaluator = None
    if config.eval.every or config.eval.at_ends:
        held_out = evaluation_prompts(config, tokenizer, rollout.max_prompt_tokens)
        rewards.expect(held_out)
        evaluator = Evaluator(config.eval, held_out, sampling, engines, rewards, tokenizer.encode, tokenizer.decode, runner)
    return RolloutParts(conductor, engines, sink, evaluator)


def scheduler_settings(config: RlRun) -> Settings:
    rollout = config.rollout
    return Settings(
        token_budget=rollout.token_budget,
        pool_capacity=rollout.pool_capacity,
        group_size=rollout.group_size,
        retention_bound=rollout.sigma,
        budget_counts=rollout.budget_counts,
        on_stale=rollout.on_stale,
        policy=rollout.scheduler,
        groups_per_phase=rollout.groups_per_phase or 0,
        unfinished=rollout.unfinished,
        warm_start=rollout.warm_start,
        group_release=rollout.group_release,
        dynamic_sampling=config.algorithm.zero_variance == "resample",
    )


def tell_outlook(settings: Settings, config: RlRun) -> None:
    rollout, engine = config.rollout, config.engine
    kv_tokens = engine.max_total_tokens and engine.max_total_tokens * engine.count
    line, warnings = outlook(settings, rollout.max_prompt_tokens, rollout.max_response_tokens, kv_tokens)
    log.info("%s", line)
    if (rollout.top_p < 1.0 or rollout.top_k > 0) and not rollout.keep_sampling_mask:
        warnings.append(
            f"rollout.top_p={rollout.top_p:g}, top_k={rollout.top_k}: log-probs are those before the cut, on both sides; no ratio "
            "is that of what sampled (keep_sampling_mask=true: all are)"
        )
    if config.model.moe is None and config.algorithm.router_z_loss + config.algorithm.load_balance > 0:
        warnings.append("algorithm.router_z_loss, load_balance: without effect, the model has no experts")
    for warning in warnings:
        log.warning("%s", warning)


def evaluation_prompts(config: RlRun | EvalRun, tokenizer: Tokenizer, max_prompt_tokens: int) -> tuple[Prompt, ...]:
    assert config.data.eval is not None
    prompts = read_prompts(config.data.eval, tokenizer, max_prompt_tokens, config.data)[: config.eval.prompts]
    without = [prompt.id for prompt in prompts if not isinstance(prompt.metadata.get("forced_prefix"), str)]
    if config.eval.forced_prefix and without:
        raise UserError(f"eval.forced_prefix=true: prompt {without[0]!r} of {config.data.eval} has no metadata.forced_prefix")
    return prompts


def architecture_only(config: RlRun, run_dir: Path, tokenizer: Tokenizer) -> Path:
    """A checkpoint without weights: engines start from it at once, since the first push brings them everything."""
    from megatron_rl.resharding.hf import hf_config

    path = run_dir / "engines" / "model"
    path.mkdir(parents=True, exist_ok=True)
    facts = hf_config(config.model, dtype="float32", **tokenizer.special_ids)
    (path / "config.json").write_text(json.dumps(facts, indent=1))
    return path


def routing_shape(model: ModelConfig) -> RoutingShape | None:
    moe = model.moe
    return RoutingShape(model.num_layers, moe.first_dense_layers, moe.top_k, moe.num_experts) if moe else None


def sglang_engines(
    config: EngineConfig,
    model: Path,
    run_dir: Path,
    context_length: int,
    seed: int,
    stack: ExitStack,
    routing: RoutingShape | None = None,
    stop: StopFlag | None = None,
) -> SglangEngines:
    from megatron_rl.engine.launcher import SglangEngines

    stop_requested = (lambda: stop.requested) if stop else (lambda: False)
    engines = SglangEngines(config, str(model), run_dir, context_length, seed, routing, stop_requested)
    stack.callback(engines.stop)
    return engines


def sampling_params(
    temperature: float, max_response_tokens: int, tokenizer: Tokenizer, top_p: float = 1.0, top_k: int = -1, seed: int = 0
) -> SamplingParams:
    return SamplingParams(temperature, top_p, top_k, max_response_tokens, (tokenizer.eos_id,), seed=seed)
