"""Layouts of a model on a cluster: which are possible, which fit, and which of those is quickest on paper.

A key that the user named is kept; the others are searched: TP inside a node, EP x ETP inside a stage, PP with the fewest uneven
stages, VPP, CP where sequences are long, the least recomputation that fits, and the smallest engines that hold the model.

Invariants: a layout that is offered passes `ParallelConfig.check` and stays below the GPU's memory in every phase; every other one
that was looked at is counted under a reason.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from megatron_rl.config.errors import UserError
from megatron_rl.config.model import ModelConfig, ParallelConfig, Recompute
from megatron_rl.config.plan import PlanRun
from megatron_rl.planning.activations import RECOMPUTE, Tokens, in_flight, layer_parts, stage_bytes
from megatron_rl.planning.memory import Engine, PolicyBytes, Usage, engine_of, item_bytes, policy_bytes
from megatron_rl.planning.parameters import Census, Held, Stage, stages
from megatron_rl.planning.step import StepTime, microbatches, step_time
from megatron_rl.planning.sync import BUCKETS, Sync, sync_of

GIB = 2**30
POWERS = tuple(2**power for power in range(11))
SHORTEST_CP_SHARE = 4096  # tokens of a rank below which context parallelism is not tried
MOST_CHUNKS = 5  # VPP
SIZES = ("tp", "cp", "pp", "vpp", "ep", "etp")


@dataclass(frozen=True)
class Plan:
    parallel: ParallelConfig
    engine: Engine
    kv_tokens: float  # of an engine
    mem_fraction: float
    held: Held  # of the rank with the most parameters
    microbatches: int
    usages: tuple[Usage, ...]  # train, sync, generate
    sync: Sync
    time: StepTime
    problem: str = ""  # why it does not fit


@dataclass(frozen=True)
class Found:
    census: Census
    plans: list[Plan]  # those that fit, the best of each TP x PP x EP, the best first
    fitting: int
    nearest: Plan | None  # where none fits: the one that lacks least
    rejected: list[tuple[str, int]]  # reasons, the most frequent first
    looked_at: int


def search(run: PlanRun, named: Collection[str]) -> Found:
    """`named`: keys like parallel.tp that have to stay as they are. Raises UserError if no layout is even possible."""
    census = Census.of(run.model)
    engines = [engine_of(run, census, tp) for tp in engine_sizes(run, named)]
    reasons: Counter[str] = Counter()
    fitting: list[Plan] = []
    nearest: Plan | None = None
    looked_at = 0
    for parallel in candidates(run, named):
        looked_at += 1
        try:
            parallel.check(run.cluster.gpus, run.model)
        except ValueError as error:
            reasons[str(error)] += 1
            continue
        plan = evaluate(run, census, parallel, engines, named)
        if not plan.problem:
            fitting.append(plan)
            continue
        reasons[_kind(plan.problem)] += 1
        if nearest is None or _lack(run, plan) < _lack(run, nearest):
            nearest = plan
    if not looked_at:
        reasons[_why_none(run, named)] += 1
    rejected = reasons.most_common()
    if not fitting and nearest is None:
        raise UserError("; ".join(reason for reason, _ in rejected[:3]))
    return Found(census, _ranked(fitting), len(fitting), nearest, rejected, looked_at)


def _why_none(run: PlanRun, named: Collection[str]) -> str:
    """Of named keys that leave nothing to look at: what is wrong with them alone."""
    sizes = {key: getattr(run.parallel, key) if f"parallel.{key}" in named else 1 for key in SIZES}
    try:
        _layout(run, named, **sizes).check(run.cluster.gpus, run.model)
    except ValueError as error:
        return str(error)
    return f"parallel: no layout of {run.cluster.gpus} GPUs has " + ", ".join(
        f"{key}={size}" for key, size in sizes.items() if size > 1
    )


def _ranked(plans: Sequence[Plan]) -> list[Plan]:
    best: dict[tuple[int, int, int], Plan] = {}
    for plan in sorted(plans, key=_merit):
        best.setdefault((plan.parallel.tp, plan.parallel.pp, plan.parallel.ep), plan)
    return list(best.values())


def _merit(plan: Plan) -> tuple[float, float]:
    return plan.time.total, max(usage.total for usage in plan.usages)


def _kind(problem: str) -> str:
    """Without the numbers of the one layout."""
    phase = problem.partition(" in phase ")[2].split()[0]
    return f"does not fit in phase {phase}"


def _lack(run: PlanRun, plan: Plan) -> float:
    return max(usage.total for usage in plan.usages) - run.cluster.usable_bytes


def engine_sizes(run: PlanRun, named: Collection[str]) -> list[int]:
    heads, gpus = run.model.num_attention_heads, run.cluster.gpus
    if "engine.tp" in named:
        tp = run.engine.tp
        if gpus % tp or heads % tp:
            raise UserError(f"engine.tp={tp} does not divide cluster.gpus={gpus} and model.num_attention_heads={heads}")
        return [tp]
    return [tp for tp in POWERS if gpus % tp == 0 and heads % tp == 0]


def candidates(run: PlanRun, named: Collection[str]) -> Iterator[ParallelConfig]:
    """Those worth a look; what a named key makes impossible is found by `check`."""
    given, model, gpus = run.parallel, run.model, run.cluster.gpus

    def options(key: str, values: Sequence[int]) -> Sequence[int]:
        return [getattr(given, key)] if f"parallel.{key}" in named else values

    experts = model.moe.num_experts if model.moe else 1
    for tp in options("tp", [tp for tp in POWERS if tp <= run.cluster.node_size and _divides_heads(tp, model)]):
        for cp in options("cp", [cp for cp in POWERS if cp == 1 or run.microbatch_tokens // cp >= SHORTEST_CP_SHARE]):
            for pp in options("pp", [pp for pp in range(1, model.num_layers + 1) if gpus % (tp * cp * pp) == 0]):
                for etp in options("etp", sorted({1, tp}) if model.moe else [1]):
                    stage = gpus // pp if gpus % pp == 0 else 0
                    for ep in options("ep", [ep for ep in POWERS if experts % ep == 0 and stage % (ep * etp) == 0]):
                        for vpp in options("vpp", [vpp for vpp in range(1, MOST_CHUNKS + 1) if _worth_chunks(model, pp, vpp)]):
                            yield _layout(run, named, tp=tp, cp=cp, pp=pp, vpp=vpp, ep=ep, etp=etp)


def _divides_heads(tp: int, model: ModelConfig) -> bool:
    return model.num_attention_heads % tp == 0 and model.num_kv_heads % tp == 0


def _worth_chunks(model: ModelConfig, pp: int, vpp: int) -> bool:
    return vpp == 1 or (pp > 1 and model.num_layers >= pp * vpp and model.num_layers % (pp * vpp) in (0, pp * vpp - 2))


def _layout(run: PlanRun, named: Collection[str], **sizes: int) -> ParallelConfig:
    update: dict[str, object] = {"nproc": run.cluster.gpus, **sizes}
    if "parallel.sequence_parallel" not in named:
        update["sequence_parallel"] = sizes["tp"] > 1
    if "parallel.layers_per_stage" not in named:
        update["layers_per_stage"] = uneven_stages(run.model, sizes["pp"] * sizes["vpp"])
    return run.parallel.model_copy(update=update)


def uneven_stages(model: ModelConfig, number: int) -> tuple[int, ...] | None:
    """Null where all are the same. The last, which also has the output layer, and then the first are the shortest."""
    if model.num_layers < number or model.num_layers % number == 0:
        return None
    sizes = [model.num_layers // number + 1] * number
    short = number - model.num_layers % number
    for stage in [number - 1, 0, *range(number - 2, 0, -1)][:short]:
        sizes[stage] -= 1
    return tuple(sizes)


def evaluate(
    run: PlanRun, census: Census, parallel: ParallelConfig, engines: Sequence[Engine], named: Collection[str] = ()
) -> Plan:
    item = item_bytes(run.model)
    ranks = stages(run.model, parallel)
    held = [census.held(stage, parallel) for stage in ranks]
    policy = [policy_bytes(each, parallel, run.cluster.gpus, item) for each in held]
    number = microbatches(run, parallel)
    choices = [parallel.recompute] if "parallel.recompute" in named else RECOMPUTE
    recompute, train = _train(run, parallel, ranks, policy, number, item, choices)
    parallel = parallel.model_copy(update={"recompute": recompute})
    most = max(held, key=lambda each: each.parameters)
    fullest = max(range(parallel.pp), key=lambda rank: policy[rank].weights + policy[rank].optimizer)
    trains = train.total <= run.cluster.usable_bytes
    for engine in engines if trains else engines[-1:]:  # the smallest that fits
        sync = sync_of(run, census, engine, policy[fullest])
        served = _share(run, engine, policy[fullest], fullest, sync, named)
        if not served.problem:
            break
    return Plan(
        parallel=parallel,
        engine=served.engine,
        kv_tokens=served.tokens,
        mem_fraction=served.fraction,
        held=most,
        microbatches=number,
        usages=(train, *served.usages),
        sync=sync,
        time=step_time(run, census, parallel, ranks, most),
        problem=served.problem if trains else _does_not_fit(run, train),
    )


def _train(
    run: PlanRun,
    parallel: ParallelConfig,
    ranks: Sequence[Stage],
    policy: Sequence[PolicyBytes],
    number: int,
    item: int,
    choices: Sequence[Recompute],
) -> tuple[Recompute, Usage]:
    """The first of `choices` that fits, or else the last, and its fullest rank."""
    tokens = Tokens.of(run.model, parallel, run.microbatch_tokens, run.expert_imbalance)
    dense = layer_parts(run.model, parallel, tokens, moe=False)
    parts = (dense, layer_parts(run.model, parallel, tokens, moe=True) if run.model.moe else dense)
    states = max(each.weights + each.gradients + each.optimizer for each in policy)
    for recompute in choices if states < run.cluster.usable_bytes else choices[-1:]:
        usages = []
        for rank, stage in enumerate(ranks):
            flight = in_flight(parallel, rank, number)
            activations = stage_bytes(run.model, parallel, stage, flight, tokens, parts, recompute, item)
            held = policy[rank]
            kinds = {"weights": held.weights, "gradients": held.gradients, "optimizer": held.optimizer}
            usages.append(Usage("train", rank, kinds | {"activations": activations}))
        fullest = max(usages, key=lambda usage: usage.total)
        if fullest.total <= run.cluster.usable_bytes:
            break
    return recompute, fullest


@dataclass(frozen=True)
class Served:
    """Sync and generation with an engine."""

    engine: Engine
    fraction: float
    tokens: float
    usages: tuple[Usage, Usage]
    problem: str


def _share(run: PlanRun, engine: Engine, policy: PolicyBytes, rank: int, sync: Sync, named: Collection[str]) -> Served:
    usable = run.cluster.usable_bytes
    moving = {"weights": policy.weights, "engine weights": engine.weights, "buckets": BUCKETS * sync.bucket_bytes}
    resting = {"weights": policy.fixed, "engine weights": engine.weights}
    memory, wanted = run.cluster.specs.memory_gib * GIB, run.kv_sequences * run.longest
    if "engine.mem_fraction_static" in named:
        fraction = run.engine.mem_fraction_static
    else:  # all that the phase leaves
        fraction = max(0.0, math.floor(1000 * (usable - policy.fixed) / memory) / 1000)
    tokens = max(0.0, fraction * memory - engine.weights) / engine.kv_per_token
    if limit := run.engine.max_total_tokens:
        tokens, wanted = min(tokens, limit), min(wanted, limit)
    cache = {"KV cache": max(tokens, wanted) * engine.kv_per_token}
    usages = (
        Usage("sync", rank, moving),
        Usage("generate", rank, resting | cache),
    )
    over = [usage for usage in usages if usage.total > usable]
    problem = _does_not_fit(run, over[0]) if over else ""
    if not over and tokens < wanted:
        leaves = f"engine.mem_fraction_static={fraction:g} leaves the KV cache {tokens:,.0f} of {wanted:,} tokens"
        problem = f"does not fit: {leaves} in phase generate"
    return Served(engine, fraction, tokens, usages, problem)


def _does_not_fit(run: PlanRun, usage: Usage) -> str:
    largest = ", ".join(f"{kind} {usage.kinds[kind] / GIB:.1f}" for kind in usage.largest()[:3])
    return (
        f"does not fit: needs {usage.total / GIB:.1f} of {run.cluster.usable_bytes / GIB:.1f} GiB in phase {usage.phase} "
        f"on pipeline rank {usage.pipeline_rank}, because of {largest}"
    )
