"""Hugging Face names and Megatron names, from one table per family that is read in both directions.

A `Rule` says: the rows (or columns) of one Megatron parameter are those of these Hugging Face tensors, in this order, split over
tensor-parallel ranks in this way. Everything else follows from it: which tensors a model has and their shapes, which ranges of
which file a rank reads, where a shard's ranges lie in the full tensors. No data is ever transposed or computed with, so both
directions are copies of `Span`s and a round trip is bitwise.

Invariants:
- names and shapes of a model are exactly those of its family's published checkpoint;
- the spans of all shards of a parameter cover every element of its Hugging Face tensors exactly once;
- a shard's spans cover the shard, but for the padding of a vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_rl.config.model import ModelConfig

Shape = tuple[int, ...]
Where = Literal["model", "layer", "dense", "moe"]
Split = Literal["column", "row", "vocab", "replicated"]
Transform = Literal["copy", "gate_up", "qkv"]


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of a family's table; `{layer}` and `{expert}` stand for numbers. Experts are split over ETP, all else over TP.

    `megatron` lists the spellings of one parameter: the local layer spec's first, Transformer Engine's where it differs.
    """

    hf: tuple[str, ...]
    megatron: tuple[str, ...]
    shape: tuple[str, ...]  # of each Hugging Face tensor, in the words of `dimensions`
    split: Split
    transform: Transform = "copy"
    where: Where = "layer"  # once a model, in every layer, in its dense or in its MoE layers
    when: Callable[[ModelConfig], bool] = lambda model: True

    @property
    def per_expert(self) -> bool:
        return "{expert}" in self.hf[0]


@dataclass(frozen=True)
class Family:
    """A table, and what the family's config.json says about a model."""

    rules: tuple[Rule, ...]
    to_hf_config: Callable[[ModelConfig], dict[str, Any]]
    from_hf_config: Callable[[Mapping[str, Any]], dict[str, Any]]  # values of ModelConfig; ValueError naming the wrong key


@dataclass(frozen=True, slots=True)
class Parameter:
    """One rule at one layer and expert: a parameter of the model, whoever holds it and however it is sharded."""

    rule: Rule
    hf: tuple[str, ...]
    shape: Shape  # of each Hugging Face tensor


@dataclass(frozen=True, slots=True)
class Span:
    """`length` rows (axis 0) or columns (axis 1), at `hf_start` of the Hugging Face tensor and at `local_start` of a shard."""

    tensor: int  # index into Parameter.hf
    axis: int
    hf_start: int
    local_start: int
    length: int


def dimensions(model: ModelConfig) -> dict[str, int]:
    q, kv = model.num_attention_heads * model.head_dim, model.num_kv_heads * model.head_dim
    sizes = {
        "vocab": model.vocab_size,
        "hidden": model.hidden_size,
        "head": model.head_dim,
        "q": q,
        "q+k+v": q + 2 * kv,
        "ffn": model.ffn_hidden_size,
    }
    if model.moe:
        sizes |= {
            "experts": model.moe.num_experts,
            "expert_ffn": model.moe.ffn_hidden_size,
            "shared_ffn": model.moe.ffn_hidden_size * model.moe.num_shared_experts,
        }
    return sizes


class Names:
    """A family's table applied to one model."""

    def __init__(self, rules: tuple[Rule, ...], model: ModelConfig) -> None:
        self.model = model
        self._rules = [rule for rule in rules if rule.when(model)]
        self._by_megatron = {_key(pattern): rule for rule in self._rules for pattern in rule.megatron}
        self.parameters = {parameter.hf[0]: parameter for parameter in self._enumerate()}

    @property
    def hf_shapes(self) -> dict[str, Shape]:
        """Every tensor of the model's Hugging Face checkpoint."""
        return {name: parameter.shape for parameter in self.parameters.values() for name in parameter.hf}

    def resolve(self, megatron: str) -> Parameter:
        """The parameter that a Megatron name with global layer and expert numbers stands for; ValueError for a stranger."""
        rule = self._by_megatron.get(_key(megatron))
        numbers = [int(number) for number in _NUMBER.findall(megatron)]
        first = _fill(rule.hf[0], numbers) if rule else ""
        if first not in self.parameters:
            raise ValueError(f"{megatron}: no such parameter in a {self.model.family} model of this configuration")
        return self.parameters[first]

    def spans(self, parameter: Parameter, local: Shape, shard: int, shards: int) -> tuple[Span, ...]:
        """Where shard `shard` of `shards`, of shape `local`, lies in the Hugging Face tensors; ValueError if nowhere."""
        rule = parameter.rule
        if rule.split == "replicated":
            shard, shards = 0, 1
        axis = 1 if rule.split == "row" else 0
        size = parameter.shape[axis]
        if rule.transform == "qkv":
            blocks = _kv_groups(self.model, shard, shards)
        else:
            block = local[axis] // len(parameter.hf)
            start = shard * block
            blocks = [(tensor, start, max(0, min(block, size - start))) for tensor in range(len(parameter.hf))]
        full = [size * len(parameter.hf) if axis == i else n for i, n in enumerate(parameter.shape)]
        if not _fits(rule, list(local), full, axis, shards):
            raise ValueError(f"a shard of {' + '.join(parameter.hf)} has shape {list(local)}; {shards} of them cannot make {full}")
        spans, at = [], 0
        for tensor, start, length in blocks:
            if length:
                spans.append(Span(tensor, axis, start, at, length))
            at += length
        return tuple(spans)

    def _enumerate(self) -> Iterator[Parameter]:
        sizes, moe = dimensions(self.model), self.model.moe
        first_moe_layer = moe.first_dense_layers if moe else self.model.num_layers
        layers = range(self.model.num_layers)
        places: dict[Where, Sequence[int | None]] = {
            "model": [None],
            "layer": layers,
            "dense": layers[:first_moe_layer],
            "moe": layers[first_moe_layer:],
        }
        for layer in (None, *layers):
            for rule in self._rules:
                for expert in range(moe.num_experts) if moe and rule.per_expert else [None]:
                    if layer in places[rule.where]:
                        numbers = [number for number in (layer, expert) if number is not None]
                        names = tuple(_fill(pattern, numbers) for pattern in rule.hf)
                        yield Parameter(rule, names, tuple(sizes[word] for word in rule.shape))


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|(?<=\.weight)\d+$")  # layers.7. and experts.linear_fc1.weight12, but not linear_fc1


def _key(name: str) -> str:
    return _NUMBER.sub("#", name.replace("{layer}", "#").replace("{expert}", "#"))


def _fill(pattern: str, numbers: list[int]) -> str:
    return pattern.format(**dict(zip(("layer", "expert"), numbers, strict=False)))


def _kv_groups(model: ModelConfig, shard: int, shards: int) -> list[tuple[int, int, int]]:
    """Megatron interleaves per KV group [its queries, key, value]; Hugging Face has [all Q, all K, all V]."""
    groups, dim = model.num_kv_heads, model.head_dim
    queries = model.num_attention_heads // groups * dim
    keys, values = groups * queries, groups * queries + groups * dim
    mine = range(shard * groups // shards, (shard + 1) * groups // shards)
    return [
        block for g in mine for block in ((0, g * queries, queries), (0, keys + g * dim, dim), (0, values + g * dim, dim))
    ]


def _fits(rule: Rule, local: list[int], full: list[int], axis: int, shards: int) -> bool:
    others = local[:axis] + local[axis + 1 :] == full[:axis] + full[axis + 1 :]
    if rule.split == "vocab":  # padded to a multiple of the shards, or beyond
        return others and local[axis] * shards >= full[axis]
    return others and local[axis] * shards == full[axis]
