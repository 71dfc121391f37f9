"""Hugging Face names and Megatron names, from one table per family that is read in both directions.

A `Rule` says: the rows (or columns) of one Megatron parameter are those of these Hugging Face tensors, in this order, split over
tensor-parallel ranks in this way. Everything else follows from it: which tensors a model has and their shapes, which ranges of
which file a rank reads, where a shard's ranges lie in the full tensors. No data is ever transposed or computed with, so both
directions are copies of `Span`s and a round trip is bitwise.

A multi-token-prediction layer is one more layer in Hugging Face's numbering, and a table speaks of it as such; Megatron's
`mtp.layers.0.` is layer `num_layers`.

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
Where = Literal["model", "layer", "dense", "moe", "mtp"]
Split = Literal["column", "row", "vocab", "replicated"]


def always(model: ModelConfig) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of a family's table; `{layer}` and `{expert}` stand for numbers. Experts are split over ETP, all else over TP.

    `megatron` lists the spellings of one parameter: the local layer spec's first, Transformer Engine's where it differs.
    """

    hf: tuple[str, ...]
    megatron: tuple[str, ...]
    shapes: tuple[str, ...]  # of each Hugging Face tensor, in the words of `dimensions`: "ffn hidden"
    split: Split
    where: Where = "layer"  # once a model, in every layer, in its dense, MoE or multi-token-prediction layers
    when: Callable[[ModelConfig], bool] = always
    grouped: bool = False  # Megatron interleaves queries, keys and values per KV group
    copy: bool = False  # the checkpoint repeats a parameter that another rule brings

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
    shapes: tuple[Shape, ...]  # of each Hugging Face tensor
    layer: int | None
    source: str  # the first Hugging Face name of the parameter that this one copies; its own where it is no copy


@dataclass(frozen=True, slots=True)
class Span:
    """`length` rows (axis 0) or columns (axis 1), at `hf_start` of the Hugging Face tensor and at `local_start` of a shard."""

    tensor: int  # index into Parameter.hf
    axis: int
    hf_start: int
    local_start: int
    length: int


def dimensions(model: ModelConfig) -> dict[str, int]:
    heads, q, kv = model.num_attention_heads, model.num_attention_heads * model.head_dim, model.num_kv_heads * model.head_dim
    sizes = {
        "vocab": model.vocab_size,
        "hidden": model.hidden_size,
        "2hidden": 2 * model.hidden_size,
        "head": model.head_dim,
        "q": q,
        "kv": kv,
        "q+k+v": q + 2 * kv,
        "ffn": model.ffn_hidden_size,
    }
    if model.mla:
        sizes |= {
            "q_lora": model.mla.q_lora_rank or 0,
            "kv_lora": model.mla.kv_lora_rank,
            "kv_lora+rope": model.mla.kv_lora_rank + model.mla.qk_rope_head_dim,
            "k+v": heads * (model.mla.qk_nope_head_dim + model.mla.v_head_dim),
            "v": heads * model.mla.v_head_dim,
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
        self._by_megatron = {_key(pattern): rule for rule in self._rules if not rule.copy for pattern in rule.megatron}
        self.parameters = {parameter.hf[0]: parameter for parameter in self._enumerate()}

    @property
    def hf_shapes(self) -> dict[str, Shape]:
        """Every tensor of the model's Hugging Face checkpoint."""
        return {
            name: shape
            for parameter in self.parameters.values()
            for name, shape in zip(parameter.hf, parameter.shapes, strict=True)
        }

    def resolve(self, megatron: str) -> Parameter:
        """The parameter that a Megatron name with global layer and expert numbers stands for; ValueError for a stranger."""
        plain = _MTP.sub(lambda match: f"decoder.layers.{self.model.num_layers + int(match[1])}.", megatron)
        rule = self._by_megatron.get(_key(plain))
        first = _fill(rule.hf[0], [int(number) for number in _NUMBER.findall(plain)]) if rule else ""
        if first not in self.parameters:
            raise ValueError(f"{megatron}: no such parameter in a {self.model.family} model of this configuration")
        return self.parameters[first]

    def spans(self, parameter: Parameter, local: Shape, shard: int, shards: int) -> tuple[Span, ...]:
        """Where shard `shard` of `shards`, of shape `local`, lies in the Hugging Face tensors; ValueError if nowhere."""
        rule = parameter.rule
        if rule.split == "replicated":
            shard, shards = 0, 1
        axis = 1 if rule.split == "row" else 0
        sizes = [shape[axis] for shape in parameter.shapes]
        if not _fits(rule, local, parameter.shapes[0], axis, sum(sizes), shards):
            full = [sum(sizes) if i == axis else n for i, n in enumerate(parameter.shapes[0])]
            raise ValueError(f"a shard of {' + '.join(parameter.hf)} has shape {list(local)}; {shards} of them cannot make {full}")
        if rule.grouped:
            blocks = _kv_groups(self.model, len(sizes), shard, shards)
        elif rule.split == "vocab":
            start = shard * local[0]
            blocks = [(0, start, max(0, min(local[0], sizes[0] - start)))]
        else:
            blocks = [(tensor, shard * size // shards, size // shards) for tensor, size in enumerate(sizes)]
        spans, at = [], 0
        for tensor, start, length in blocks:
            if length:
                spans.append(Span(tensor, axis, start, at, length))
            at += length
        return tuple(spans)

    def _enumerate(self) -> Iterator[Parameter]:
        sizes, moe = dimensions(self.model), self.model.moe
        layers = range(self.model.num_layers + self.model.num_mtp_layers)
        first_moe_layer = moe.first_dense_layers if moe else len(layers)
        places: dict[Where, Sequence[int | None]] = {
            "model": [None],
            "layer": layers,
            "dense": layers[:first_moe_layer],
            "moe": layers[first_moe_layer:],
            "mtp": layers[self.model.num_layers :],
        }
        for layer in (None, *layers):
            for rule in self._rules:
                if layer not in places[rule.where]:
                    continue
                shapes = tuple(tuple(sizes[word] for word in shape.split()) for shape in rule.shapes)
                for expert in range(moe.num_experts) if moe and rule.per_expert else [None]:
                    numbers = [number for number in (layer, expert) if number is not None]
                    names = tuple(_fill(pattern, numbers) for pattern in rule.hf)
                    source = self._by_megatron[_key(rule.megatron[0])].hf[0] if rule.copy else names[0]
                    yield Parameter(rule, names, shapes, layer, source)


_MTP = re.compile(r"^mtp\.layers\.(\d+)\.(?:transformer_layer\.)?")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|(?<=\.weight)\d+$")  # layers.7. and experts.linear_fc1.weight12, but not linear_fc1


def _key(name: str) -> str:
    return _NUMBER.sub("#", name.replace("{layer}", "#").replace("{expert}", "#"))


def _fill(pattern: str, numbers: list[int]) -> str:
    return pattern.format(**dict(zip(("layer", "expert"), numbers, strict=False)))


def _kv_groups(model: ModelConfig, tensors: int, shard: int, shards: int) -> list[tuple[int, int, int]]:
    """Megatron interleaves per KV group [its queries, key, value]; Hugging Face has [all Q, all K, all V], in `tensors` tensors."""
    groups, dim = model.num_kv_heads, model.head_dim
    queries = model.num_attention_heads // groups * dim
    k, keys, v, values = (1, 0, 2, 0) if tensors == 3 else (0, groups * queries, 0, groups * (queries + dim))
    mine = range(shard * groups // shards, (shard + 1) * groups // shards)
    return [block for g in mine for block in ((0, g * queries, queries), (k, keys + g * dim, dim), (v, values + g * dim, dim))]


def _fits(rule: Rule, local: Shape, first: Shape, axis: int, full: int, shards: int) -> bool:
    if len(local) != len(first) or local[:axis] + local[axis + 1 :] != first[:axis] + first[axis + 1 :]:
        return False
    if rule.split == "vocab":  # padded to a multiple of the shards, or beyond
        return local[0] * shards >= full
    return local[axis] * shards == full
