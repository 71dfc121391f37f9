"""How many parameters a model has, and how many of them one rank holds.

A tensor is replicated, split over TP or over EP x ETP, or it is a vocabulary, padded to a multiple of TP. Biases of routers are
buffers, not parameters: they are published with the model, but neither trained by gradients nor counted by their authors.

Invariants:
- the tensors of a model at TP = PP = EP = 1 are those of its Hugging Face checkpoint;
- at any layout, a pipeline rank's numbers are those of the Megatron modules that `policy.model.build_chunks` makes for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from megatron_rl.config.model import ModelConfig, ParallelConfig


@dataclass(frozen=True, slots=True)
class Tensors:
    """Numbers of elements, by how they are divided."""

    replicated: int = 0
    tp: int = 0
    experts: int = 0  # over EP x ETP
    buffers: int = 0  # replicated, fp32

    def __add__(self, other: Tensors) -> Tensors:
        return Tensors(
            self.replicated + other.replicated, self.tp + other.tp, self.experts + other.experts, self.buffers + other.buffers
        )

    def __mul__(self, times: int) -> Tensors:
        return Tensors(self.replicated * times, self.tp * times, self.experts * times, self.buffers * times)


@dataclass(frozen=True, slots=True)
class Held:
    """Elements that one rank holds."""

    dense: int  # reduced over DP x CP
    experts: int  # reduced over expert data parallelism
    frozen: int  # without gradients: multi-token prediction
    buffers: int  # fp32 whatever the dtype

    @property
    def trained(self) -> int:
        return self.dense + self.experts

    @property
    def parameters(self) -> int:
        return self.trained + self.frozen


def attention(model: ModelConfig) -> Tensors:
    """With its two layer norms' first."""
    hidden, heads = model.hidden_size, model.num_attention_heads
    if model.mla:
        mla = model.mla
        down = hidden * (mla.kv_lora_rank + mla.qk_rope_head_dim) + mla.kv_lora_rank  # the rank's norm with it
        up = mla.kv_lora_rank * heads * (mla.qk_nope_head_dim + mla.v_head_dim)
        if mla.q_lora_rank:
            down += hidden * mla.q_lora_rank + mla.q_lora_rank
        up += (mla.q_lora_rank or hidden) * heads * model.head_dim
        return Tensors(replicated=hidden + down, tp=up + heads * mla.v_head_dim * hidden)
    q, kv = heads * model.head_dim, model.num_kv_heads * model.head_dim
    bias = (q + 2 * kv) * model.qkv_bias
    return Tensors(replicated=hidden + 2 * model.head_dim * model.qk_norm, tp=hidden * (2 * q + 2 * kv) + bias)


def dense_mlp(model: ModelConfig) -> Tensors:
    return Tensors(replicated=model.hidden_size, tp=3 * model.hidden_size * model.ffn_hidden_size)


def moe_mlp(model: ModelConfig) -> Tensors:
    moe = model.moe
    assert moe
    expert = 3 * model.hidden_size * moe.ffn_hidden_size
    return Tensors(
        replicated=model.hidden_size + moe.num_experts * model.hidden_size,
        tp=moe.num_shared_experts * expert,
        experts=moe.num_experts * expert,
        buffers=moe.num_experts * moe.expert_bias,
    )


def mtp_layer(model: ModelConfig) -> Tensors:
    """Norms of embedding, of hidden states and of the output, the projection of both, and a layer like the model's last."""
    hidden = model.hidden_size
    return Tensors(replicated=3 * hidden, tp=2 * hidden * hidden) + attention(model) + (moe_mlp if model.moe else dense_mlp)(model)


@dataclass(frozen=True, slots=True)
class Stage:
    """What one pipeline rank holds: `chunks` of layers, in the order they are computed."""

    chunks: tuple[Chunk, ...]
    first: bool
    last: bool

    @property
    def dense(self) -> int:
        return sum(chunk.dense for chunk in self.chunks)

    @property
    def moe(self) -> int:
        return sum(chunk.moe for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Numbers of layers."""

    dense: int
    moe: int


def stages(model: ModelConfig, parallel: ParallelConfig) -> list[Stage]:
    """By pipeline rank; chunk c of the model lies on rank c % pp."""
    chunks, dense_left = [], model.moe.first_dense_layers if model.moe else model.num_layers
    for size in parallel.stages(model.num_layers):
        dense = min(size, dense_left)
        chunks.append(Chunk(dense, size - dense))
        dense_left -= dense
    pp = parallel.pp
    return [Stage(tuple(chunks[rank::pp]), rank == 0, rank == pp - 1) for rank in range(pp)]


@dataclass(frozen=True, slots=True)
class Census:
    """The tensors of a model's parts, counted once."""

    model: ModelConfig
    attention: Tensors
    dense: Tensors  # layers, with their attention
    moe: Tensors
    mtp: Tensors
    layers: Tensors  # all of them

    @classmethod
    def of(cls, model: ModelConfig) -> Self:
        dense = attention(model) + dense_mlp(model)
        moe = attention(model) + moe_mlp(model) if model.moe else Tensors()
        (whole,) = stages(model, ParallelConfig())
        mtp = mtp_layer(model) * model.num_mtp_layers
        return cls(model, attention(model), dense, moe, mtp, moe * whole.moe + dense * whole.dense)

    def total(self, with_mtp: bool = True) -> int:
        """Of the checkpoint, without buffers; what it repeats is counted once."""
        model, tensors = self.model, self.layers + (self.mtp if with_mtp else Tensors())
        vocabularies = (2 - model.tie_embeddings) * model.vocab_size * model.hidden_size
        return tensors.replicated + tensors.tp + tensors.experts + model.hidden_size + vocabularies

    def active(self) -> int:
        """Per token, without multi-token prediction; embedding and output layer count, as Ling's and DeepSeek's authors have it."""
        moe = self.model.moe
        if moe is None:
            return self.total(with_mtp=False)
        idle = (moe.num_experts - moe.top_k) * 3 * self.model.hidden_size * moe.ffn_hidden_size
        return self.total(with_mtp=False) - idle * (self.model.num_layers - moe.first_dense_layers)

    def buffers(self) -> int:
        return (self.layers + self.mtp).buffers

    def held(self, stage: Stage, parallel: ParallelConfig) -> Held:
        model, tp, split = self.model, parallel.tp, parallel.ep * parallel.etp
        trained, frozen = self.moe * stage.moe + self.dense * stage.dense, self.mtp if stage.last else Tensors()
        vocabularies = stage.first + (stage.last and not (stage.first and model.tie_embeddings))
        vocabulary = model.padded_vocab_size(tp) // tp * model.hidden_size
        return Held(
            dense=trained.replicated + trained.tp // tp + vocabularies * vocabulary + stage.last * model.hidden_size,
            experts=trained.experts // split,
            frozen=frozen.replicated + frozen.tp // tp + frozen.experts // split,
            buffers=trained.buffers + frozen.buffers,
        )
