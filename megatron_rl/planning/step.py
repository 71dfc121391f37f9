"""How long a training step takes at peak rates with nothing overlapped: a measure to rank layouts by, not a forecast.

Matrix products at the GPU's dense bfloat16 rate, attention as if every token saw half of the longest sequence, and the bytes of
each collective over the slowest link its group crosses. Ranks are ordered tp-cp-ep-dp-pp, as Megatron orders them, so a group of
consecutive ranks that fits into a node stays in it.

Invariant: a layout that moves more bytes over a link, waits longer for its slowest stage or recomputes more never gets a smaller
number for that part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from megatron_rl.config.model import ModelConfig, ParallelConfig
from megatron_rl.config.plan import PlanRun
from megatron_rl.planning.activations import Tokens
from megatron_rl.planning.parameters import Census, Held, Stage

BF16 = 2  # bytes that travel per activation


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds."""

    compute: float
    recompute: float
    tensor_parallel: float
    expert_parallel: float
    context_parallel: float
    pipeline_bubble: float
    data_parallel: float

    @property
    def total(self) -> float:
        return float(sum(asdict(self).values()))


@dataclass(frozen=True, slots=True)
class Flops:
    """Of one token's forward pass through a layer."""

    attention: float
    mlp: float


def layer_flops(model: ModelConfig, census: Census, longest: int, imbalance: float, moe: bool) -> Flops:
    heads = model.num_attention_heads
    v_dim = model.mla.v_head_dim if model.mla else model.head_dim
    scores = 2 * heads * (model.head_dim + v_dim) * longest / 2
    whole = census.moe if moe else census.dense
    experts = 0.0
    if moe and model.moe:
        experts = whole.experts / model.moe.num_experts * model.moe.top_k * imbalance
    projections = census.attention.replicated + census.attention.tp
    mlp = whole.replicated + whole.tp - projections + experts
    return Flops(2 * projections + scores, 2 * mlp)


def microbatches(run: PlanRun, parallel: ParallelConfig) -> int:
    """Per replica and step; interleaving takes whole groups of pp."""
    replicas = run.cluster.gpus // (parallel.tp * parallel.pp * parallel.cp)
    number = math.ceil(run.step_tokens / (replicas * run.microbatch_tokens))
    return math.ceil(number / parallel.pp) * parallel.pp if parallel.vpp > 1 else number


def step_time(run: PlanRun, census: Census, parallel: ParallelConfig, stages: Sequence[Stage], held: Held) -> StepTime:
    """`held`: of the rank with the most parameters."""
    model, tokens = run.model, Tokens.of(run.model, parallel, run.microbatch_tokens, 1.0)
    number, peak = microbatches(run, parallel), run.cluster.specs.bf16_tflops * 1e12
    imbalance = run.expert_imbalance if parallel.ep > 1 else 1.0
    kinds = [layer_flops(model, census, run.longest, imbalance, moe) for moe in (False, True)]
    head = 2 * model.vocab_size * model.hidden_size
    forward, forward_mlp, layers, moe_layers = 0.0, 0.0, 0, 0  # of the slowest stage
    for stage in stages:
        dense, moe = stage.dense, stage.moe
        mlp = dense * kinds[0].mlp + moe * kinds[1].mlp
        whole = mlp + dense * kinds[0].attention + moe * kinds[1].attention + stage.last * head
        forward, forward_mlp = max((forward, forward_mlp), (whole, mlp))
        layers, moe_layers = max(layers, dense + moe), max(moe_layers, moe)
    again = {"none": 0.0, "selective": 0.03 * forward, "mlp": forward_mlp, "full": forward}[parallel.recompute]
    per_flop = run.microbatch_tokens / (parallel.cp * parallel.tp) / peak
    compute, repeated = 3 * forward * per_flop, again * per_flop
    repeats = 1.5 if parallel.recompute in ("mlp", "full") else 1.0  # forward collectives once more
    tp = layers * repeats * _tensor_parallel(run, parallel, tokens)
    ep = moe_layers * repeats * _expert_parallel(run, parallel, tokens)
    cp = layers * _context_parallel(run, parallel, tokens)
    one = compute + repeated + tp + ep + cp
    replicas = run.cluster.gpus // (parallel.tp * parallel.pp)
    return StepTime(
        compute=number * compute,
        recompute=number * repeated,
        tensor_parallel=number * tp,
        expert_parallel=number * ep,
        context_parallel=number * cp,
        pipeline_bubble=(parallel.pp - 1) / parallel.vpp * one,
        data_parallel=(4 + BF16) * held.trained / run.cluster.network if replicas > 1 else 0.0,
    )


def _link(run: PlanRun, span: int) -> float:
    """Bytes per second of a group that spans so many consecutive ranks."""
    return run.cluster.specs.nvlink_gb_s * 1e9 if span <= run.cluster.node_size else run.cluster.network


def _tensor_parallel(run: PlanRun, parallel: ParallelConfig, tokens: Tokens) -> float:
    """Around attention and around the MLP: all-gather and reduce-scatter, and both with another all-gather backwards."""
    nbytes = 2 * 5 * BF16 * run.model.hidden_size * tokens.whole * (parallel.tp - 1) / parallel.tp
    return nbytes / _link(run, parallel.tp)


def _expert_parallel(run: PlanRun, parallel: ParallelConfig, tokens: Tokens) -> float:
    """Dispatch and combine, forwards and backwards; what stays in the node goes over NVLink."""
    assert run.model.moe or parallel.ep == 1
    span = parallel.ep * parallel.etp
    nbytes = 4 * BF16 * run.model.hidden_size * tokens.split * (run.model.moe.top_k if run.model.moe else 0)
    away = max(0.0, 1 - run.cluster.node_size / span)
    seconds = nbytes * away / run.cluster.network
    seconds += nbytes * (1 - 1 / parallel.ep - away) / _link(run, 1) if parallel.ep > 1 else 0.0
    return seconds + nbytes * (parallel.etp - 1) / _link(run, parallel.etp)


def _context_parallel(run: PlanRun, parallel: ParallelConfig, tokens: Tokens) -> float:
    """Keys and values of the others, forwards and backwards, and their gradients."""
    model = run.model
    width = 2 * model.num_kv_heads * model.head_dim / parallel.tp
    return 3 * BF16 * width * tokens.whole * (parallel.cp - 1) / _link(run, parallel.tp * parallel.cp)
