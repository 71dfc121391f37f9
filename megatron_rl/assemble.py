"""Binds the loops to Megatron-Core, SGLang and the disk: builds a run's parts from its configuration and takes them down again.

Whatever is started is entered on an ExitStack, so that it is taken down in reverse order however the run ends. Heavy rooms are
imported where they are used: an evaluation never loads Megatron.
"""

from __future__ import annotations

import logging
import os
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from megatron_rl import rundir
from megatron_rl.config import RlRun, SftRun, UserError
from megatron_rl.data.sft import SftStream, read_sft
from megatron_rl.data.tokenizer import Tokenizer, export_hf_tokenizer, load_tokenizer
from megatron_rl.generation import RolloutParts, rollout_parts, routing_shape
from megatron_rl.loops.signals import StopFlag
from megatron_rl.observability.alarms import mismatch_alarms
from megatron_rl.observability.console import set_up_logging
from megatron_rl.observability.report import write_report
from megatron_rl.observability.summary import read_rows, rl_summary
from megatron_rl.observability.tracker import EVALUATIONS, METRICS, NullTracker, RunTracker
from megatron_rl.ports import Tracker

if TYPE_CHECKING:
    from megatron_rl.checkpoint.store import CheckpointStore
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
            rundir.write_summary(run_dir, rl_summary(*(read_rows(run_dir / name) for name in (METRICS, EVALUATIONS))))
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
            rundir.write_summary(run_dir, {"sft_steps": config.run.steps, "seconds_sft": round(time.monotonic() - started, 1)})
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
    facts = hf_config(config.model, dtype=str(policy.dtype).removeprefix("torch."), **tokenizer.special_ids)

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


def farewell(complete: bool, run_dir: Path) -> None:
    if complete:
        log.info("done: %s", run_dir)
    else:
        log.info("stopped by a signal, nothing is lost: the same command goes on from %s", run_dir / "checkpoints")
