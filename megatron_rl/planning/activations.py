"""What a training forward keeps for its backward, on one rank.

After Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198), section 4: sequence
parallelism divides norms and residuals by TP as tensor parallelism does everything else, and attention keeps no scores (flash
attention). Different here: no dropout, so no masks; RMSNorm, SwiGLU, grouped or latent attention; routed experts, which see every
token top_k times; one packed microbatch as the sequence. Kept once per microbatch in flight, which is 1F1B's count.

Recomputation in Megatron's words: `selective` is recompute_modules=[layernorm, moe_act, mla_up_proj], `mlp` adds the whole MLP or
MoE layer ([mlp, moe]), `full` keeps the input of each layer (uniform, one layer).

Invariants: more recomputation never keeps more; `none` is close to what torch saves for a real layer (the tolerance is the test's).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rl.config.model import ModelConfig, ParallelConfig, Recompute
from megatron_rl.planning.parameters import Stage

RECOMPUTE: Sequence[Recompute] = ("none", "selective", "mlp", "full")


@dataclass(frozen=True, slots=True)
class Tokens:
    """Of one microbatch on one rank."""

    whole: float  # behind a column-parallel linear: the microbatch over CP
    split: float  # between them: also over TP under sequence parallelism
    routed: float  # that the experts of a rank get

    @classmethod
    def of(cls, model: ModelConfig, parallel: ParallelConfig, microbatch_tokens: int, imbalance: float) -> Tokens:
        whole = microbatch_tokens / parallel.cp
        split = whole / parallel.tp if parallel.sequence_parallel else whole
        top_k = model.moe.top_k if model.moe else 0
        # Every rank dispatches its own tokens; with ETP, the ranks of one expert each see those of all.
        return cls(whole, split, split * top_k * parallel.etp * (imbalance if parallel.ep > 1 else 1.0))


@dataclass(frozen=True, slots=True)
class Parts:
    """Elements that a layer keeps, by what brings them back."""

    input: float
    kept: float  # under everything but full recomputation
    selective: float  # dropped by `selective`
    mlp: float  # dropped by `mlp`

    def under(self, recompute: Recompute) -> float:
        if recompute == "full":
            return self.input
        dropped = 0.0 if recompute == "none" else self.selective
        return self.input + self.kept + self.selective - dropped + (0.0 if recompute == "mlp" else self.mlp)


def layer_parts(model: ModelConfig, parallel: ParallelConfig, tokens: Tokens, moe: bool) -> Parts:
    hidden, tp = model.hidden_size, parallel.tp
    kept, selective = _attention(model, tp, tokens)
    mlp_kept, mlp_act = _moe(model, parallel, tokens) if moe else _dense(model, tp, tokens)
    norms = 2 * hidden * tokens.split  # the outputs of both, which the linears behind them keep
    between = hidden * tokens.split  # the residual stream in the middle: the second norm's input
    return Parts(hidden * tokens.split, kept + between, selective + norms + mlp_act, mlp_kept)


def _attention(model: ModelConfig, tp: int, tokens: Tokens) -> tuple[float, float]:
    heads = model.num_attention_heads
    if model.mla:
        mla = model.mla
        latents = 2 * ((mla.q_lora_rank or 0) + mla.kv_lora_rank) + mla.qk_rope_head_dim  # before and after their norms
        projected = heads * (2 * model.head_dim + mla.qk_nope_head_dim + mla.v_head_dim)  # Q, K, and the up-projection V lies in
        return latents * tokens.split + heads * mla.v_head_dim / tp * tokens.whole, projected / tp * tokens.whole
    q, kv = heads * model.head_dim, model.num_kv_heads * model.head_dim
    qkv = q + 2 * kv
    before_norm = (q + kv) * model.qk_norm
    return (qkv + before_norm + q) / tp * tokens.whole, 0.0


def _dense(model: ModelConfig, tp: int, tokens: Tokens) -> tuple[float, float]:
    return 3 * model.ffn_hidden_size / tp * tokens.whole, 0.0


def _moe(model: ModelConfig, parallel: ParallelConfig, tokens: Tokens) -> tuple[float, float]:
    """An expert's input, gate and up; and its activation, which `moe_act` brings back."""
    moe = model.moe
    assert moe
    shared = 3 * moe.num_shared_experts * moe.ffn_hidden_size / parallel.tp * tokens.whole
    router = 4 * 2 * moe.num_experts * tokens.split  # logits, scores, probabilities and map: fp32, hence twice
    width = moe.ffn_hidden_size / parallel.etp
    return shared + router + tokens.routed * (model.hidden_size + 2 * width), tokens.routed * width


def in_flight(parallel: ParallelConfig, rank: int, microbatches: int) -> list[int]:
    """Of each chunk of pipeline rank `rank`, for how many microbatches its activations lie in memory at the fullest moment
    (megatron/core/pipeline_parallel/schedules.py, get_pp_rank_microbatches)."""
    pp, vpp = parallel.pp, parallel.vpp
    if vpp == 1:
        return [min(pp - rank, microbatches)]
    most = min((pp - rank - 1) * 2 + (vpp - 1) * pp + 1, microbatches * vpp)
    counts = [0] * vpp
    for number in range(most):
        counts[number // pp % vpp] += 1
    return counts


def logits_bytes(model: ModelConfig, parallel: ParallelConfig, tokens: Tokens, item: int) -> float:
    """At the fullest moment of the last stage: our kernel holds logits and their gradient; a vocabulary split over TP is worked on
    in fp32 (policy/logprobs.py: four such tensors in its backward, beside the gradient in the model's type)."""
    per_logit = 2 * item if parallel.tp == 1 else 16 + item
    return per_logit * tokens.whole * model.padded_vocab_size(parallel.tp) / parallel.tp


def stage_bytes(
    model: ModelConfig,
    parallel: ParallelConfig,
    stage: Stage,
    in_flight: Sequence[int],
    tokens: Tokens,
    parts: tuple[Parts, Parts],
    recompute: Recompute,
    item: int,
) -> float:
    """`parts`: of a dense and of a MoE layer."""
    sizes = [part.under(recompute) for part in parts]
    kept, working = 0.0, 0.0
    for chunk, times in zip(stage.chunks, in_flight, strict=True):
        kept += times * (chunk.dense * sizes[0] + chunk.moe * sizes[1])
    if recompute != "none":  # one layer at a time comes back whole
        here = [kind for kind, layers in enumerate((stage.dense, stage.moe)) if layers]
        working = max(parts[kind].under("none") - sizes[kind] for kind in here)
    total = item * (kept + working)
    if stage.last:
        total += logits_bytes(model, parallel, tokens, item) + 2 * item * model.hidden_size * tokens.split
    return total
