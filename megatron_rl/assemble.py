"""Binds the loops to Megatron-Core, SGLang and the disk: builds a run's parts from its configuration and takes them down again.

Whatever is started is entered on an ExitStack, so that it is taken down in reverse order however the run ends. Heavy rooms are
imported where they are used: an evaluation never loads Megatron.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from megatron_rl import rundir
from megatron_rl.config import EvalRun, RlRun, SftRun, UserError
from megatron_rl.config.model import ModelConfig
from megatron_rl.config.rollout import EngineConfig, RewardConfig
from megatron_rl.data.prompts import PromptStream, read_prompts
from megatron_rl.data.sft import SftStream, read_sft
from megatron_rl.data.tokenizer import Tokenizer, export_hf_tokenizer, load_tokenizer
from megatron_rl.loops.evaluate import Evaluator
from megatron_rl.loops.signals import StopFlag
from megatron_rl.observability.alarms import mismatch_alarms
from megatron_rl.observability.console import set_up_logging
from megatron_rl.observability.report import write_report
from megatron_rl.observability.summary import read_rows, rl_summary
from megatron_rl.observability.tracker import EVALUATIONS, METRICS, NullTracker, RunTracker
from megatron_rl.ports import Tracker, WeightSink
from megatron_rl.rewards.pool import RewardPool
from megatron_rl.rewards.shaping import length_shape
from megatron_rl.rewards.worker import Limits
from megatron_rl.scheduler.messages import Settings
from megatron_rl.scheduler.outlook import outlook
from megatron_rl.types import Group, Prompt, RoutingShape, SamplingParams

if TYPE_CHECKING:
    from megatron_rl.checkpoint.store import CheckpointStore
    from megatron_rl.engine.launcher import SglangEngines
    from megatron_rl.loops.conductor import Conductor
    from megatron_rl.loops.parts import RlParts
    from megatron_rl.policy import MegatronPolicy, MegatronRanks
    from megatron_rl.resharding.execute import Resharder

log = logging.getLogger("megatron_rl")
EXPORT_BUCKET_BYTES = 512 * 2**20  # of a checkpoint's shard file


def run_rl(config: RlRun) -> None:
    from megatron_rl.loops import rl

    run_dir = Path(config.run.dir)
    with ExitStack() as stack:
        stop = StopFlag().install()
        core = policy_parts(config, run_dir, stack)
        parts = rl_parts(config, run_dir, core, stop, stack)
        complete = rl.train(config, parts)
        if core.ranks.rank == 0:
            write_summary(run_dir, rl_summary(*(read_rows(run_dir / name) for name in (METRICS, EVALUATIONS))))
            write_report(run_dir)
            farewell(complete, run_dir)
        stop.exit_if_requested(complete)


def run_sft(config: SftRun) -> None:
    from megatron_rl.algorithms.loss import sft_loss
    from megatron_rl.loops import sft

    started = time.monotonic()
    run_dir = Path(config.run.dir)
    with ExitStack() as stack:
        stop = StopFlag().install()
        core = policy_parts(config, run_dir, stack)
        data = config.data
        stages = [(read_sft(s.data, core.tokenizer, config.max_tokens, data.chat_template), s.steps) for s in data.stages]
        examples = SftStream(stages, config.batch_size, config.run.seed)
        parts = sft.SftParts(core.ranks, core.policy, sft_loss, examples, core.store, core.tracker, core.ranks.device, stop)
        complete = sft.train(config, parts)
        if core.ranks.rank == 0:
            write_summary(run_dir, {"sft_steps": config.run.steps, "seconds_sft": round(time.monotonic() - started, 1)})
            farewell(complete, run_dir)
        stop.exit_if_requested(complete)


@dataclass(frozen=True)
class PolicyParts:
    """What RL and SFT share."""

    ranks: MegatronRanks
    policy: MegatronPolicy
    resharder: Resharder
    store: CheckpointStore
    tracker: Tracker
    tokenizer: Tokenizer


def policy_parts(config: RlRun | SftRun, run_dir: Path, stack: ExitStack) -> PolicyParts:
    set_up_logging(int(os.environ.get("RANK", 0)))  # before Megatron's imports, which warn of what a CPU has not
    from megatron_rl.checkpoint.store import CheckpointStore
    from megatron_rl.policy import MegatronPolicy, MegatronRanks
    from megatron_rl.resharding.execute import Resharder
    from megatron_rl.resharding.hf import export_hf, hf_config
    from megatron_rl.start import start_from

    rundir.make("run.dir", run_dir)
    tokenizer = load_tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(f"model.vocab_size={config.model.vocab_size}: {config.data.tokenizer} has {tokenizer.vocab_size} tokens")
    ranks = MegatronRanks(config.parallel, config.model, config.run.seed)
    stack.callback(ranks.close)
    if ranks.rank == 0:
        stack.enter_context(rundir.owned("run.dir", run_dir))
        rundir.record(run_dir, config)
    start = config.model.init_from
    of_rl: dict[str, Any] = {}
    if isinstance(config, RlRun):
        algorithm = config.algorithm
        of_rl = {"with_reference": algorithm.kl_weight > 0, "replay": algorithm.routing.kind}
        of_rl |= {"router_z_loss": algorithm.router_z_loss, "load_balance": algorithm.load_balance}
    policy = MegatronPolicy(
        config.model,
        config.parallel,
        config.optimizer,
        total_steps=config.run.steps,
        seed=config.run.seed,
        ranks=ranks,
        load=start_from(Path(start), config.model, config.parallel, ranks, tokenizer) if start else None,
        **of_rl,
    )
    resharder = Resharder(config.model, config.parallel, policy.weights, ranks, EXPORT_BUCKET_BYTES)
    facts = hf_config(config.model, dtype=str(policy.dtype).removeprefix("torch."), **special_tokens(tokenizer))

    def export(path: Path) -> None:
        with TemporaryDirectory() as folder:
            files = export_hf_tokenizer(tokenizer, folder) if ranks.rank == 0 else []
            export_hf(resharder, path, ranks.rank, facts, files)

    store = CheckpointStore(run_dir / "checkpoints", policy, ranks, config.checkpoint.keep, export)
    tracker: Tracker = NullTracker()
    if ranks.rank == 0:
        alarms = mismatch_alarms(**config.track.mismatch_alarm.model_dump()) if isinstance(config, RlRun) else []
        track = config.track.model_dump(exclude={"mismatch_alarm"})
        tracker = RunTracker(run_dir, steps=config.run.steps, decode=tokenizer.decode, alarms=alarms, **track)
    stack.callback(tracker.close)
    return PolicyParts(ranks, policy, resharder, store, tracker, tokenizer)


def rl_parts(config: RlRun, run_dir: Path, core: PolicyParts, stop: StopFlag, stack: ExitStack) -> RlParts:
    from megatron_rl.algorithms.correction import Correction
    from megatron_rl.algorithms.loss import policy_loss
    from megatron_rl.algorithms.surrogates import Surrogate
    from megatron_rl.loops.parts import RlParts
    from megatron_rl.resharding.execute import Resharder
    from megatron_rl.resharding.push import PushToEngines, frozen

    algorithm, sync = config.algorithm, config.engine.sync
    rollouts = rollout_parts(config, run_dir, core.tokenizer, stop, stack) if core.ranks.rank == 0 else RolloutParts()
    resharder = Resharder(
        config.model,
        config.parallel,
        core.policy.weights,
        core.ranks,
        int(sync.bucket_mb * 2**20),
        frozen=frozen(config.model),
        timeout_s=2 * sync.timeout_s,  # another rank may be waiting for an engine as long as it may
    )
    loss = policy_loss(
        correction=Correction(**algorithm.correction.model_dump()),
        surrogate=Surrogate(algorithm.surrogate, algorithm.clip_low, algorithm.clip_high, algorithm.dual_clip),
        kl_weight=algorithm.kl_weight if algorithm.kl_in == "loss" else 0.0,
        kl_estimator=algorithm.kl_estimator,
        entropy_weight=algorithm.entropy_weight,
        old_logprobs=algorithm.old_logprobs,
    )
    return RlParts(
        ranks=core.ranks,
        policy=core.policy,
        loss=loss,
        sync=PushToEngines(resharder, rollouts.sink, sync.verify),
        store=core.store,
        tracker=core.tracker,
        device=core.ranks.device,
        routing=routing_shape(config.model),
        conductor=rollouts.conductor,
        engines=rollouts.engines,
        evaluator=rollouts.evaluator,
    )


@dataclass(frozen=True)
class RolloutParts:
    """What rank 0 has."""

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

    rollout, algorithm, sync = config.rollout, config.algorithm, config.engine.sync
    prompts = read_prompts(config.data.train, tokenizer, rollout.max_prompt_tokens, config.data)
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
    sampling = sampling_params(rollout.temperature, rollout.max_response_tokens, tokenizer, rollout.top_p, rollout.top_k)
    settings = scheduler_settings(config)
    tell_outlook(settings, config)
    stream = PromptStream(prompts, config.run.seed, config.data.shuffle)
    about = {"format": 2, "model": config.model.model_dump(mode="json"), "reward": config.reward.model_dump(mode="json")}
    about |= {"routing": algorithm.routing.model_dump(mode="json"), "advantage": algorithm.advantage}
    journal = Journal(run_dir / "journal", about)

    def is_useful(group: Group) -> bool:
        failed, advantage = config.reward.exclude_failed, algorithm.advantage
        return bool(usable_groups([group], advantage=advantage, zero_variance="drop", exclude_failed=failed))

    conductor = Conductor(
        settings, sampling, engines, rewards, stream, journal, stop, runner, rollout.timeout_s, is_useful, needs_experts
    )
    evaluator = None
    if config.data.eval:
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
    if rollout.top_p < 1.0 or rollout.top_k > 0:
        warnings.append(
            f"rollout.top_p={rollout.top_p:g}, top_k={rollout.top_k}: log-probs are those before the cut, on both sides; no ratio "
            "is that of what sampled"
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
    facts = hf_config(config.model, dtype="float32", **special_tokens(tokenizer))
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
    temperature: float, max_response_tokens: int, tokenizer: Tokenizer, top_p: float = 1.0, top_k: int = -1
) -> SamplingParams:
    return SamplingParams(temperature, top_p, top_k, max_response_tokens, (tokenizer.eos_id,))


def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    return {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}


def write_summary(folder: Path, values: dict[str, Any]) -> None:
    partial = folder / "summary.json.tmp"
    partial.write_text(json.dumps(values, indent=2) + "\n")
    partial.replace(folder / "summary.json")


def farewell(complete: bool, run_dir: Path) -> None:
    if complete:
        log.info("done: %s", run_dir)
    else:
        log.info("stopped by a signal, nothing is lost: the same command goes on from %s", run_dir / "checkpoints")
