"""The policy's architecture, in Hugging Face's terms where they exist. Families differ in tensor names and defaults only."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from megatron_rl.config.base import Config


class MoeConfig(Config):
    num_experts: PositiveInt
    top_k: PositiveInt
    ffn_hidden_size: PositiveInt
    num_shared_experts: int = Field(default=1, ge=0)
    first_dense_layers: int = Field(default=1, ge=0)
    num_groups: PositiveInt = 1
    topk_groups: PositiveInt = 1
    routed_scaling_factor: PositiveFloat = 1.0
    score_function: Literal["sigmoid", "softmax"] = "sigmoid"
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
        return self


class ModelConfig(Config):
    family: Literal["bailing_moe_v2"] = "bailing_moe_v2"
    init_from: str | None = None  # a Hugging Face checkpoint to start from; null: seeded random weights
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    num_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    ffn_hidden_size: PositiveInt  # of the dense layers
    moe: MoeConfig | None = None
    qk_norm: bool = True
    rotary_base: PositiveFloat = 600_000.0
    rotary_percent: float = Field(default=0.5, gt=0.0, le=1.0)  # HF: partial_rotary_factor; no silent 1.0
    max_position_embeddings: PositiveInt = 32_768
    rms_norm_eps: PositiveFloat = 1e-6
    tie_embeddings: bool = False
    init_std: PositiveFloat = 0.02
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on CUDA, float32 on CPU

    @model_validator(mode="after")
    def _heads(self) -> Self:
        if self.num_attention_heads % self.num_kv_heads:
            raise ValueError(f"num_attention_heads={self.num_attention_heads} is not divisible by num_kv_heads={self.num_kv_heads}")
        if self.moe and self.moe.first_dense_layers > self.num_layers:
            raise ValueError(f"moe.first_dense_layers={self.moe.first_dense_layers} is more than num_layers={self.num_layers}")
        return self


class ParallelConfig(Config):
    """The layout. World size = TP x PP x CP x DP; experts are spread over EP x ETP of the same ranks."""

    nproc: PositiveInt = 1  # ranks to start here when not under torchrun
    tp: PositiveInt = 1
    pp: PositiveInt = 1
    vpp: PositiveInt = 1  # model chunks per pipeline rank
    cp: PositiveInt = 1
    ep: PositiveInt = 1
    etp: PositiveInt = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    microbatch_tokens: PositiveInt = 8192  # packed tokens per microbatch and replica; a longer sequence gets one of its own
    timeout_s: PositiveFloat = 7200.0  # of one collective; the other ranks wait in one while rank 0 generates

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
            ("tp", model.vocab_size, self.tp, "model.vocab_size"),
            ("pp", model.num_layers, self.pp * self.vpp, "model.num_layers"),
        ):
            if value % by:
                raise ValueError(f"parallel.{key}: {what}={value} is not divisible by {by}")
        if self.vpp > 1 and self.pp == 1:
            raise ValueError("parallel.vpp: more than one chunk per rank needs parallel.pp > 1")
        if self.sequence_parallel and self.tp == 1:
            raise ValueError("parallel.sequence_parallel=true needs parallel.tp > 1")
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
