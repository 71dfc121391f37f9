"""The shards that Megatron ranks would hold, without Megatron: names and shapes of every rank at a layout, filled by hand."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

import torch

from megatron_rl.config.model import ModelConfig, ParallelConfig
from megatron_rl.resharding.families import names_of
from megatron_rl.resharding.names import Names, Parameter, Shape
from megatron_rl.resharding.plan import Shard, shard_count, spans_of
from megatron_rl.resharding.push import frozen


def all_shapes(names: Names, parallel: ParallelConfig, world: int, spelling: int = 0) -> list[dict[str, Shape]]:
    """Of each rank. Megatron's rank order is tp-cp-ep-dp-pp, for experts etp-ep-dp-pp: what a rank holds depends on its pipeline
    stage and its place in EP (and, in values alone, on its shard)."""
    held: dict[tuple[int, int], dict[str, Shape]] = {(stage, ep): {} for stage in range(parallel.pp) for ep in range(parallel.ep)}
    for parameter in names.parameters.values():
        if parameter.rule.copy:
            continue
        places: list[int] = list(range(parallel.ep))
        if parameter.rule.per_expert:
            assert names.model.moe
            places = [_numbers(parameter)[-1] // (names.model.moe.num_experts // parallel.ep)]
        for stage, name in _named_on(parameter, names.model, parallel, spelling):
            for ep in places:
                held[stage, ep][name] = _shape(parameter, parallel)
    ranks_of_stage = world // parallel.pp
    return [held[rank // ranks_of_stage, rank % ranks_of_stage // parallel.etp % parallel.ep] for rank in range(world)]


def shard_shapes(names: Names, parallel: ParallelConfig, world: int, rank: int, spelling: int = 0) -> dict[str, Shape]:
    return all_shapes(names, parallel, world, spelling)[rank]


def cut(
    full: Mapping[str, torch.Tensor], names: Names, parallel: ParallelConfig, world: int, rank: int, spelling: int = 0
) -> dict[str, torch.Tensor]:
    """This rank's shards of the given Hugging Face tensors; padding is NaN."""
    shapes = shard_shapes(names, parallel, world, rank, spelling)
    shards = {}
    for name, parameter, spans in spans_of(names, parallel, rank, shapes):
        shards[name] = torch.full(shapes[name], torch.nan, dtype=full[parameter.hf[0]].dtype)
        for span in spans:
            part = full[parameter.hf[span.tensor]].narrow(span.axis, span.hf_start, span.length)
            shards[name].narrow(span.axis, span.local_start, span.length).copy_(part)
    return shards


def seeded_weights(names: Names, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """By Hugging Face name; a copy equals what it copies."""
    generator = torch.Generator().manual_seed(seed)
    full = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in names.hf_shapes.items()}
    return full | {name: full[parameter.source] for name, parameter in names.parameters.items() if parameter.rule.copy}


def inventories(
    model: ModelConfig, world: int, parallel: ParallelConfig, spelling: int = 0, dtype: str = "float32"
) -> list[dict[str, Shard]]:
    """Of each rank; ranks that hold the same have each their own, as after a gather of objects."""
    is_frozen = frozen(model)
    return [
        {name: Shard(shape, dtype, is_frozen(name)) for name, shape in shapes.items()}
        for shapes in all_shapes(names_of(model), parallel, world, spelling)
    ]


def small_model(**overrides: object) -> ModelConfig:
    """tiny_ling's architecture at a size for exhaustive tests."""
    moe = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 8, "num_groups": 2, "topk_groups": 1}
    values: dict[str, object] = {
        "vocab_size": 12,
        "hidden_size": 16,
        "num_layers": 4,
        "num_attention_heads": 8,
        "num_kv_heads": 4,
        "head_dim": 4,
        "ffn_hidden_size": 24,
        "moe": moe,
    }
    return ModelConfig.model_validate(values | overrides)


def _named_on(parameter: Parameter, model: ModelConfig, parallel: ParallelConfig, spelling: int) -> list[tuple[int, str]]:
    """The stages that hold it, and its name there."""
    rule, last = parameter.rule, parallel.pp - 1
    pattern = rule.megatron[min(spelling, len(rule.megatron) - 1)]
    if rule.where == "model":
        if "embedding" not in rule.megatron[0]:
            return [(last, pattern)]
        word, *tied = rule.megatron
        return [(0, word), *((last, copy) for copy in tied if last > 0)]  # a tied output layer has a copy of its own
    assert parameter.layer is not None
    name = pattern.format(**dict(zip(("layer", "expert"), _numbers(parameter), strict=False)))
    if parameter.layer >= model.num_layers:
        between = "" if rule.where == "mtp" else "transformer_layer."
        ours = f"mtp.layers.{parameter.layer - model.num_layers}.{between}"
        return [(last, name.replace(f"decoder.layers.{parameter.layer}.", ours))]
    ends = accumulate(parallel.stages(model.num_layers))
    chunk = next(chunk for chunk, end in enumerate(ends) if parameter.layer < end)
    return [(chunk % parallel.pp, name)]


def _numbers(parameter: Parameter) -> list[int]:
    return [int(part) for part in parameter.hf[0].split(".") if part.isdigit()]


def _shape(parameter: Parameter, parallel: ParallelConfig) -> Shape:
    split, shape = shard_count(parameter, parallel), list(parameter.shapes[0])
    if parameter.rule.split == "row":
        shape[1] //= split
    elif parameter.rule.split == "vocab":
        shape[0] = -(-shape[0] // split)
    elif parameter.rule.split == "column":
        shape[0] = sum(each[0] for each in parameter.shapes) // split
    return tuple(shape)
