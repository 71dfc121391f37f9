"""The policy's architecture, in Hugging Face's terms where they exist. Families differ in tensor names and defaults only."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from megatron_rl.config.base import Config


class MoeConfig(Config):
    num_experts: PositiveInt
    top_k: PositiveInt
    ffn_hidden_size: PositiveInt
    num_shared_experts: int = Field(default=1, ge=0)  # fused into one of that many times the width
    first_dense_layers: int = Field(default=1, ge=0)
    num_groups: PositiveInt = 1
    topk_groups: PositiveInt = 1
    routed_scaling_factor: PositiveFloat = 1.0
    score_function: Literal["sigmoid", "softmax"] = "sigmoid"
    norm_topk_prob: bool = True  # the chosen experts' weights sum to 1, before the scaling factor
    expert_bias: bool = True
    expert_bias_update_rate: float = Field(default=0.0, ge=0.0)  # 0: frozen, as in Ring-1T's RL

    @model_validator(mode="after")
    def _groups(self) -> Self:
        if self.num_experts % self.num_groups:
            raise ValueError(f"num_experts={self.num_experts} is not divisible by num_groups={self.num_groups}")
        if self.topk_groups > self.num_groups:
            raise ValueError(f"topk_groups={self.topk_groups} is more than num_groups={self.num_groups}")
        if self.top_k > self.num_experts // self.num_groups * self.topk_groups:
            raise ValueError(f"top_k={self.top_k} is more experts than the topk_groups={self.topk_groups} chosen groups hold")
        if self.topk_groups < self.num_groups and self.top_k != 2 * self.topk_groups:
            raise ValueError(
                f"top_k={self.top_k} is not 2 x topk_groups={self.topk_groups}: Megatron-Core scores a group by its best "
                f"top_k / topk_groups experts (moe_utils.py, group_limited_topk), Ling and SGLang by its best two"
            )
        if self.score_function == "sigmoid" and not self.norm_topk_prob:
            raise ValueError("norm_topk_prob=false: Megatron-Core always normalises sigmoid scores (moe_utils.py)")
        if self.score_function == "softmax" and self.expert_bias:
            raise ValueError("expert_bias=true: Megatron-Core has it with score_function=sigmoid only")
        return self


class MlaConfig(Config):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434)."""

    q_lora_rank: PositiveInt | None  # null: queries are projected at once
    kv_lora_rank: PositiveInt
    qk_nope_head_dim: PositiveInt
    qk_rope_head_dim: PositiveInt
    v_head_dim: PositiveInt


class YarnConfig(Config):
    """Rotary embedding beyond the trained length (arXiv 2309.00071), in the words of config.json's rope_scaling."""

    factor: PositiveFloat
    original_max_position_embeddings: PositiveInt
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0


Family = Literal["bailing_moe_v2", "bailing_moe", "qwen3_moe", "qwen3", "qwen2", "deepseek_v3"]


class ModelConfig(Config):
    family: Family = "bailing_moe_v2"
    init_from: str | None = None  # a Hugging Face or Megatron checkpoint to start from; null: seeded random weights
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    num_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt  # of queries and keys; with mla its qk_nope_head_dim + qk_rope_head_dim
    ffn_hidden_size: PositiveInt  # of the dense layers
    moe: MoeConfig | None = None
    mla: MlaConfig | None = None
    num_mtp_layers: int = Field(default=0, ge=0)  # multi-token prediction: frozen here, carried from checkpoint to checkpoint
    qk_norm: bool = True
    qkv_bias: bool = False
    norm_head: bool = False  # logits from lm_head.weight with columns of length 1 (Ling-lite)
    rotary_base: PositiveFloat = 600_000.0
    rotary_percent: float = Field(default=0.5, gt=0.0, le=1.0)  # HF: partial_rotary_factor; no silent 1.0
    rope_scaling: YarnConfig | None = None
    max_position_embeddings: PositiveInt = 32_768
    rms_norm_eps: PositiveFloat = 1e-6
    tie_embeddings: bool = False
    init_std: PositiveFloat = 0.02
    # auto: bfloat16 on CUDA, float32 on CPU. float16 trains with a dynamic loss scale. RL's engines follow while engine.dtype=auto.
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    fp32_lm_head: bool = False  # the product of the output layer in fp32, here and in the engines (by config.json)

    @model_validator(mode="after")
    def _parts(self) -> Self:
        if self.num_attention_heads % self.num_kv_heads:
            raise ValueError(f"num_attention_heads={self.num_attention_heads} is not divisible by num_kv_heads={self.num_kv_heads}")
        if self.moe and self.moe.first_dense_layers > self.num_layers:
            raise ValueError(f"moe.first_dense_layers={self.moe.first_dense_layers} is more than num_layers={self.num_layers}")
        if self.mla and self.head_dim != self.mla.qk_nope_head_dim + self.mla.qk_rope_head_dim:
            raise ValueError(f"head_dim={self.head_dim} is not mla.qk_nope_head_dim + mla.qk_rope_head_dim")
        if self.mla and self.num_kv_heads != self.num_attention_heads:
            raise ValueError(f"num_kv_heads={self.num_kv_heads}: with mla every head has keys of its own")
        if self.rope_scaling and not self.mla:
            raise ValueError("rope_scaling: only with mla")
        if self.tie_embeddings and (self.norm_head or self.num_mtp_layers):
            raise ValueError("tie_embeddings=true: not with norm_head, nor with num_mtp_layers")
        return self

    def padded_vocab_size(self, tp: int) -> int:
        """What tensor-parallel ranks hold together: the padding has no tokens and no probability."""
        return -(-self.vocab_size // tp) * tp


# What a backward computes again instead of keeping it: selective the norms, the activation inside experts and latent attention's
# up-projections; mlp the norms and whole MLPs; full whole layers.
Recompute = Literal["none", "selective", "mlp", "full"]


class ParallelConfig(Config):
    """The layout. World size = TP x PP x CP x DP; experts are spread over EP x ETP of the same ranks."""

    nproc: PositiveInt = 1  # ranks to start here when not under torchrun
    tp: PositiveInt = 1
    pp: PositiveInt = 1
    vpp: PositiveInt = 1  # model chunks per pipeline rank
    layers_per_stage: tuple[PositiveInt, ...] | None = None  # of every chunk, in the model's order; null: all the same
    cp: PositiveInt = 1
    ep: PositiveInt = 1
    etp: PositiveInt = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    microbatch_tokens: PositiveInt = 8192  # packed tokens per microbatch and replica; a longer sequence gets one of its own
    recompute: Recompute = "none"
    timeout_s: PositiveFloat = 7200.0  # of one collective; the other ranks wait in one while rank 0 generates

    def stages(self, num_layers: int) -> tuple[int, ...]:
        """How many layers every chunk has, in the model's order: chunk c lies on pipeline rank c % pp."""
        return self.layers_per_stage or (num_layers // (self.pp * self.vpp),) * (self.pp * self.vpp)

    def check(self, world_size: int, model: ModelConfig) -> None:
        """Refuse an impossible layout. Raises ValueError naming the key."""
        shard = self.tp * self.pp * self.cp
        if world_size % shard:
            raise ValueError(f"parallel: tp x pp x cp = {self.tp} x {self.pp} x {self.cp} does not divide the {world_size} ranks")
        if (world_size // self.pp) % (self.ep * self.etp):
            raise ValueError(
                f"parallel.ep: ep x etp = {self.ep} x {self.etp} does not divide the {world_size // self.pp} ranks of a stage"
            )
        for key, value, by, what in (
            ("tp", model.num_attention_heads, self.tp, "model.num_attention_heads"),
            ("tp", model.num_kv_heads, self.tp, "model.num_kv_heads"),
            ("tp", model.ffn_hidden_size, self.tp, "model.ffn_hidden_size"),
        ):
            if value % by:
                raise ValueError(f"parallel.{key}: {what}={value} is not divisible by {by}")
        stages = self.pp * self.vpp
        if self.layers_per_stage is None and model.num_layers % stages:
            many, few = model.num_layers % stages, stages - model.num_layers % stages
            example = [model.num_layers // stages + 1] * many + [model.num_layers // stages] * few
            raise ValueError(
                f"parallel.pp: model.num_layers={model.num_layers} is not divisible by {stages} stages; "
                f"parallel.layers_per_stage={example} would do"
            )
        if self.layers_per_stage and (len(self.layers_per_stage) != stages or sum(self.layers_per_stage) != model.num_layers):
            raise ValueError(
                f"parallel.layers_per_stage={list(self.layers_per_stage)} has to name {stages} stages (pp x vpp) "
                f"of {model.num_layers} layers together"
            )
        if self.vpp > 1 and self.pp == 1:
            raise ValueError("parallel.vpp: more than one chunk per rank needs parallel.pp > 1")
        if self.sequence_parallel and self.tp == 1:
            raise ValueError("parallel.sequence_parallel=true needs parallel.tp > 1")
        if model.mla and self.tp > 1 and not self.sequence_parallel:
            raise ValueError("parallel.sequence_parallel: must be true under tp > 1 where the model has latent attention")
        if model.moe is None:
            if self.ep * self.etp > 1:
                raise ValueError(f"parallel.ep={self.ep}, etp={self.etp}: the model has no experts (model.moe is null)")
            return
        if model.moe.num_experts % self.ep:
            raise ValueError(f"parallel.ep={self.ep} does not divide model.moe.num_experts={model.moe.num_experts}")
        if model.moe.ffn_hidden_size % self.etp:
            raise ValueError(f"parallel.etp={self.etp} does not divide model.moe.ffn_hidden_size={model.moe.ffn_hidden_size}")
        shared = model.moe.num_shared_experts * model.moe.ffn_hidden_size
        if shared % self.tp:
            raise ValueError(f"parallel.tp={self.tp} does not divide the shared experts' model.moe.ffn_hidden_size ({shared})")
        if self.tp > 1 and not self.sequence_parallel:
            raise ValueError("parallel.sequence_parallel: must be true, Megatron-Core trains MoE layers under tp > 1 only so")


class OptimizerConfig(Config):
    lr: PositiveFloat
    min_lr: float = Field(default=0.0, ge=0.0)
    warmup_steps: int = Field(default=0, ge=0)
    decay: Literal["constant", "linear", "cosine"] = "constant"
    decay_steps: PositiveInt | None = None  # null: the run's steps
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    beta2: float = Field(default=0.999, ge=0.0, lt=1.0)
    eps: PositiveFloat = 1e-8
    weight_decay: float = Field(default=0.01, ge=0.0)
    grad_clip: float = Field(default=1.0, ge=0.0)  # 0: off
    loss_scale_initial: float = Field(default=65_536.0, ge=1.0)  # of model.dtype=float16; an overflow skips the update, halves it
    loss_scale_window: PositiveInt = 100  # updates without an overflow that double it
