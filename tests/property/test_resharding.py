"""Resharding for random models of every family and random layouts: every element once, buckets bounded, the result bit for bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from toy_shards import cut, inventories, seeded_weights

from megatron_rl.checksum import checksum
from megatron_rl.config.model import ModelConfig, ParallelConfig
from megatron_rl.resharding import plan as plan_module
from megatron_rl.resharding.families import FAMILIES, names_of
from megatron_rl.resharding.gather import Shards, Tensors, held, packed, unpack, view
from megatron_rl.resharding.plan import Bucket, make_plan

POWERS = (1, 2, 4)


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    family = draw(st.sampled_from(sorted(FAMILIES)))
    kv, head_dim = draw(st.sampled_from(POWERS)), draw(st.sampled_from([2, 4]))
    heads = kv * draw(st.sampled_from([1, 2, 3]))
    layers = draw(st.integers(1, 5))
    mtp = draw(st.integers(0, 2)) if family in ("bailing_moe_v2", "deepseek_v3") else 0
    values: dict[str, Any] = {
        "family": family,
        "vocab_size": draw(st.integers(7, 20)),
        "hidden_size": draw(st.sampled_from([4, 8, 12])),
        "num_layers": layers,
        "num_attention_heads": heads,
        "num_kv_heads": kv,
        "head_dim": head_dim,
        "ffn_hidden_size": 4 * draw(st.integers(1, 3)),
        "num_mtp_layers": mtp,
        "tie_embeddings": not mtp and draw(st.booleans()),
        "qk_norm": family in ("qwen3", "qwen3_moe") or (family == "bailing_moe_v2" and draw(st.booleans())),
        "qkv_bias": family == "qwen2" or (family == "bailing_moe" and draw(st.booleans())),
    }
    if family == "deepseek_v3":
        nope, rope = draw(st.integers(1, 3)), 2
        sizes = {"kv_lora_rank": draw(st.integers(2, 5)), "v_head_dim": draw(st.integers(1, 4))}
        mla = {"q_lora_rank": draw(st.sampled_from([None, 3])), "qk_nope_head_dim": nope, "qk_rope_head_dim": rope}
        values |= {"mla": mla | sizes, "head_dim": nope + rope, "num_kv_heads": heads}
    if "moe" in family or family == "deepseek_v3":
        sigmoid = family in ("bailing_moe_v2", "deepseek_v3")
        values["moe"] = {
            "num_experts": draw(st.sampled_from([4, 8])),
            "top_k": 2,
            "ffn_hidden_size": 4 * draw(st.integers(1, 2)),
            "num_shared_experts": 0 if family == "qwen3_moe" else draw(st.integers(0, 2)),
            "first_dense_layers": draw(st.integers(0, layers)),
            "score_function": "sigmoid" if sigmoid else "softmax",
            "expert_bias": sigmoid,
        }
    return ModelConfig.model_validate(values)


@st.composite
def layouts(draw: st.DrawFn, model: ModelConfig) -> tuple[int, ParallelConfig]:
    tp, cp, pp = (draw(st.sampled_from(POWERS)) for _ in range(3))
    ep, etp = (draw(st.sampled_from(POWERS)) if model.moe else 1 for _ in range(2))
    vpp = draw(st.sampled_from([1, 2])) if pp > 1 else 1
    assume(pp * vpp <= model.num_layers)
    cuts = draw(st.sets(st.integers(1, model.num_layers - 1), min_size=pp * vpp - 1, max_size=pp * vpp - 1)) if pp > 1 else set()
    ends = [0, *sorted(cuts), model.num_layers]
    stages = tuple(end - start for start, end in pairwise(ends)) if pp > 1 else None
    parallel = ParallelConfig(tp=tp, cp=cp, pp=pp, vpp=vpp, ep=ep, etp=etp, layers_per_stage=stages, sequence_parallel=tp > 1)
    world = pp * max(tp * cp, ep * etp) * draw(st.sampled_from([1, 2]))
    try:
        parallel.check(world, model)
    except ValueError:
        assume(False)
    return world, parallel


@st.composite
def cases(draw: st.DrawFn) -> tuple[ModelConfig, int, ParallelConfig, tuple[int, ...], int]:
    """Model, ranks, layout, destinations, spelling of the names (local or Transformer Engine's)."""
    model = draw(models())
    world, parallel = draw(layouts(model))
    destinations = draw(st.lists(st.integers(0, world - 1), min_size=1, max_size=2, unique=True))
    spelling = 0 if model.tie_embeddings else draw(st.integers(0, 1))
    return model, world, parallel, tuple(destinations), spelling


Case = tuple[ModelConfig, int, ParallelConfig, tuple[int, ...], int]
SETTINGS = settings(max_examples=60, deadline=None)


@pytest.fixture(autouse=True, scope="module")
def small_messages() -> Any:
    """So that random models have parts that travel as they lie."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "DIRECT_BYTES", 48)
        yield


@SETTINGS
@given(case=cases(), bucket_bytes=st.integers(1, 20_000))
def test_every_element_is_delivered_exactly_once_and_buckets_are_bounded(case: Case, bucket_bytes: int) -> None:
    model, world, parallel, destinations, spelling = case
    names = names_of(model)
    plan = make_plan(names, parallel, inventories(model, world, parallel, spelling), bucket_bytes, destinations)
    delivered = Counter(tensor.name for bucket in plan.buckets for tensor in bucket.tensors)
    assert delivered == Counter(names.hf_shapes.keys())
    for bucket in plan.buckets:
        for tensor in bucket.tensors:
            times = torch.zeros(tensor.shape, dtype=torch.int32)
            for part in tensor.parts:
                times.narrow(part.axis, part.start, part.length).add_(1)
            assert bool((times == 1).all()), tensor.name
        for destination in destinations:
            ends = [message.at + message.nbytes for message in bucket.messages(destination)]
            assert max([bucket.nbytes, *ends]) <= bucket.room
        if bucket.room > bucket_bytes:
            names_here = [tensor.name for tensor in bucket.tensors]
            assert len(names_here) == 1 or (len(names_here) == 2 and names_here[1].endswith("kv_a_proj_with_mqa.weight"))
            assert {tensor.name for tensor in plan.oversized} >= set(names_here)


def carried(bucket: Bucket, weights: Sequence[Shards], destination: int) -> Tensors:
    """What gather.py does, without a process group: a message is a copy."""
    memory = torch.full((bucket.room,), 255, dtype=torch.uint8)
    tensors = {tensor.name: view(memory, at, tensor.shape, tensor.sent) for tensor, at in bucket.places()}
    for tensor in bucket.tensors:
        for part in tensor.parts:
            if part.rank == destination:
                tensors[tensor.name].narrow(part.axis, part.start, part.length).copy_(held(weights[destination], part))
    messages = bucket.messages(destination)
    for message in messages:
        memory[message.at : message.at + message.nbytes].copy_(packed(message, weights[message.source]))
    for message in messages:
        if not message.in_place:
            unpack(message, memory, tensors)
    return list(tensors.items())


@SETTINGS
@given(case=cases(), seed=st.integers(0, 100), bucket_bytes=st.integers(1, 20_000), half=st.booleans())
def test_what_arrives_is_what_was_cut(case: Case, seed: int, bucket_bytes: int, half: bool) -> None:
    model, world, parallel, destinations, spelling = case
    names = names_of(model)
    full = seeded_weights(names, seed)
    weights = [cut(full, names, parallel, world, rank, spelling) for rank in range(world)]
    plan = make_plan(names, parallel, inventories(model, world, parallel, spelling), bucket_bytes, destinations)
    dtype = "bfloat16" if half else "float32"
    plan = plan.only(dict.fromkeys(names.hf_shapes, dtype), destinations, frozen=True)
    for destination in destinations:
        arrived = {name: tensor for bucket in plan.buckets for name, tensor in carried(bucket, weights, destination)}
        assert arrived.keys() == full.keys()
        for name, tensor in arrived.items():
            assert torch.equal(tensor.to(getattr(torch, dtype)), full[name].to(getattr(torch, dtype))), name


@SETTINGS
@given(case=cases(), bucket_bytes=st.integers(1, 20_000), data=st.data())
def test_a_selection_is_bounded_and_keeps_together_what_was(case: Case, bucket_bytes: int, data: st.DataObject) -> None:
    model, world, parallel, destinations, spelling = case
    plan = make_plan(names_of(model), parallel, inventories(model, world, parallel, spelling), bucket_bytes, destinations)
    everything = sorted(names_of(model).hf_shapes)
    wanted = data.draw(st.sets(st.sampled_from(everything)))
    chosen = plan.only(dict.fromkeys(wanted, "bfloat16"), destinations, frozen=data.draw(st.just(True)))
    where = {tensor.name: number for number, bucket in enumerate(chosen.buckets) for tensor in bucket.tensors}
    assert where.keys() == wanted
    assert list(where.values()) == sorted(where.values())
    for bucket in plan.buckets:
        assert len({where[tensor.name] for tensor in bucket.tensors if tensor.name in where}) <= 1
    oversized = {tensor.name for tensor in plan.oversized}
    for bucket in chosen.buckets:
        assert bucket.room <= bucket_bytes or oversized >= {tensor.name for tensor in bucket.tensors}


@SETTINGS
@given(case=cases(), seed=st.integers(0, 100))
def test_checksums_of_the_parts_add_up(case: Case, seed: int) -> None:
    model, world, parallel, destinations, spelling = case
    names = names_of(model)
    full = seeded_weights(names, seed)
    weights = [cut(full, names, parallel, world, rank, spelling) for rank in range(world)]
    plan = make_plan(names, parallel, inventories(model, world, parallel, spelling), 4096, destinations)
    for bucket in plan.buckets:
        for tensor in bucket.tensors:
            strides = full[tensor.name].stride()
            parts = [checksum(held(weights[part.rank], part), part.start * strides[part.axis], strides) for part in tensor.parts]
            assert torch.stack(parts).sum() == checksum(full[tensor.name]), tensor.name
