"""The shards that Megatron ranks would hold, without Megatron: names and shapes of every rank at a layout, filled by hand."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megatron_rl.config.model import ModelConfig, ParallelConfig
from megatron_rl.resharding.names import Names, Shape
from megatron_rl.resharding.plan import spans_of


def shard_shapes(names: Names, parallel: ParallelConfig, world: int, rank: int, spelling: int = 0) -> dict[str, Shape]:
    """Megatron's rank order is tp-cp-ep-dp-pp; stage p of the pipeline holds the p-th run of layers, experts go in runs over EP."""
    model = names.model
    stage_ranks = world // parallel.pp
    stage, place = rank // stage_ranks, rank % stage_ranks
    layers = range(model.num_layers)[stage * model.num_layers // parallel.pp : (stage + 1) * model.num_layers // parallel.pp]
    shapes: dict[str, Shape] = {}
    for parameter in names.parameters.values():
        rule, numbers = parameter.rule, [int(part) for part in parameter.hf[0].split(".") if part.isdigit()]
        spellings = rule.megatron if not model.tie_embeddings else rule.megatron[:1]
        name = spellings[min(spelling, len(spellings) - 1)].format(**dict(zip(("layer", "expert"), numbers, strict=False)))
        split = parallel.etp if rule.per_expert else parallel.tp
        if rule.where == "model":
            if stage != (0 if "embedding" in name else parallel.pp - 1):
                continue
        elif numbers[0] not in layers:
            continue
        if rule.per_expert:
            assert model.moe
            per_rank = model.moe.num_experts // parallel.ep
            if numbers[1] // per_rank != place // parallel.etp % parallel.ep:
                continue
        shape = list(parameter.shapes[0])
        if rule.split == "row":
            shape[1] //= split
        elif rule.split == "vocab":
            shape[0] = -(-shape[0] // split)
        elif rule.split == "column":
            shape[0] = sum(each[0] for each in parameter.shapes) // split
        shapes[name] = tuple(shape)
    return shapes


def cut(
    full: Mapping[str, torch.Tensor], names: Names, parallel: ParallelConfig, world: int, rank: int, spelling: int = 0
) -> dict[str, torch.Tensor]:
    """This rank's shards of the given Hugging Face tensors; padding is NaN."""
    shapes = shard_shapes(names, parallel, world, rank, spelling)
    shards = {}
    for name, parameter, spans in spans_of(names, parallel, rank, shapes):
        shards[name] = torch.full(shapes[name], torch.nan)
        for span in spans:
            part = full[parameter.hf[span.tensor]].narrow(span.axis, span.hf_start, span.length)
            shards[name].narrow(span.axis, span.local_start, span.length).copy_(part)
    return shards


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
