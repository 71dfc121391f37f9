"""Plans for random models and layouts: every element once, buckets bounded, sources balanced, mistakes named."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_shards import cut, shard_shapes, small_model

from megatron_rl.config.model import ModelConfig, ParallelConfig
from megatron_rl.resharding.execute import _assemble
from megatron_rl.resharding.families import names_of
from megatron_rl.resharding.plan import Bucket, Inventory, Shard, make_plan

LAYOUTS = list(itertools.product((1, 2, 4, 8), (1, 2, 4), (1, 2, 4), (1, 2, 4), (1, 2)))  # world, tp, pp, ep, etp


def possible(model: ModelConfig) -> list[tuple[int, ParallelConfig]]:
    found = []
    for world, tp, pp, ep, etp in LAYOUTS:
        parallel = ParallelConfig(tp=tp, pp=pp, ep=ep, etp=etp, sequence_parallel=tp > 1)
        try:
            parallel.check(world, model)
        except ValueError:
            continue
        found.append((world, parallel))
    return found


@st.composite
def cases(draw: st.DrawFn) -> tuple[ModelConfig, int, ParallelConfig]:
    moe = {
        "num_experts": 4,
        "top_k": 2,
        "ffn_hidden_size": draw(st.sampled_from([4, 8])),
        "num_shared_experts": draw(st.integers(0, 2)),
        "first_dense_layers": draw(st.integers(0, 4)),
        "expert_bias": draw(st.booleans()),
    }
    kv = draw(st.sampled_from([1, 2, 4]))
    model = small_model(
        vocab_size=draw(st.integers(9, 16)),
        num_kv_heads=kv,
        num_attention_heads=kv * draw(st.sampled_from([1, 2])),
        head_dim=draw(st.sampled_from([2, 4])),
        qk_norm=draw(st.booleans()),
        tie_embeddings=draw(st.booleans()),
        moe=draw(st.sampled_from([moe, None])),
    )
    world, parallel = draw(st.sampled_from(possible(model)))
    return model, world, parallel


def inventories(model: ModelConfig, world: int, parallel: ParallelConfig, spelling: int = 0) -> list[Inventory]:
    names = names_of(model)
    return [
        {name: Shard(shape, "float32") for name, shape in shard_shapes(names, parallel, world, rank, spelling).items()}
        for rank in range(world)
    ]


@settings(max_examples=80, deadline=None)
@given(case=cases(), bucket_bytes=st.integers(1, 20_000), spelling=st.integers(0, 1))
def test_every_element_is_delivered_exactly_once(
    case: tuple[ModelConfig, int, ParallelConfig], bucket_bytes: int, spelling: int
) -> None:
    model, world, parallel = case
    names = names_of(model)
    plan = make_plan(names, parallel, inventories(model, world, parallel, spelling), bucket_bytes)
    times = {name: torch.zeros(shape, dtype=torch.int32) for name, shape in names.hf_shapes.items()}
    for bucket in plan:
        for item in bucket.items:
            for piece in item.pieces:
                for span in piece.spans:
                    times[item.hf[span.tensor]].narrow(span.axis, span.hf_start, span.length).add_(1)
    assert all(bool((count == 1).all()) for count in times.values())
    delivered = [name for bucket in plan for item in bucket.items for name in item.hf]
    assert sorted(delivered) == sorted(names.hf_shapes)


@settings(max_examples=80, deadline=None)
@given(case=cases(), bucket_bytes=st.integers(1, 20_000))
def test_buckets_are_bounded_or_hold_one_parameter(case: tuple[ModelConfig, int, ParallelConfig], bucket_bytes: int) -> None:
    model, world, parallel = case
    for bucket in make_plan(names_of(model), parallel, inventories(model, world, parallel), bucket_bytes):
        assert bucket.nbytes <= bucket_bytes or len(bucket.items) == 1


@settings(max_examples=60, deadline=None)
@given(case=cases(), seed=st.integers(0, 100))
def test_cutting_and_assembling_is_the_identity(case: tuple[ModelConfig, int, ParallelConfig], seed: int) -> None:
    model, world, parallel = case
    names = names_of(model)
    generator = torch.Generator().manual_seed(seed)
    full = {name: torch.randn(shape, generator=generator) for name, shape in names.hf_shapes.items()}
    shards = {rank: cut(full, names, parallel, world, rank) for rank in range(world)}
    for bucket in make_plan(names, parallel, inventories(model, world, parallel), 4096):
        buffer = torch.full((bucket.nbytes,), 255, dtype=torch.uint8)
        for name, tensor in _assemble(bucket, shards, buffer):
            assert torch.equal(tensor, full[name]), name


def test_the_destinations_own_shard_is_preferred_and_replicas_share_the_rest() -> None:
    model = small_model(num_layers=8)
    parallel = ParallelConfig(pp=2, ep=1)  # 8 ranks: 4 replicas of 2 stages
    plan = make_plan(names_of(model), parallel, inventories(model, 8, parallel), 1 << 20)
    sent = [sum(piece.shard.nbytes for b in plan for i in b.items for piece in i.pieces if piece.rank == rank) for rank in range(8)]
    assert sent[1:4] == [0, 0, 0]  # the first stage is rank 0's own
    assert max(sent[4:]) < 1.5 * min(sent[4:])


def test_a_parameter_that_nobody_holds_is_named() -> None:
    model, parallel = small_model(), ParallelConfig(ep=2)
    found = [dict(inventory) for inventory in inventories(model, 2, parallel)]
    del found[1]["decoder.layers.2.mlp.experts.local_experts.3.linear_fc1.weight"]
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.experts\.3\.gate_proj\.weight"):
        make_plan(names_of(model), parallel, found, 1 << 20)


def test_packets_do_not_overlap() -> None:
    model, parallel = small_model(), ParallelConfig(tp=2, sequence_parallel=True)
    (bucket,) = make_plan(names_of(model), parallel, inventories(model, 2, parallel), 1 << 20)
    assert isinstance(bucket, Bucket)
    assert bucket.sources() == [0, 1]
    layout, nbytes = bucket.sent_by(1)
    ends = [at + shard.nbytes for shard, at in layout.values()]
    starts = [*[at for _, at in layout.values()][1:], nbytes]
    assert all(end <= start for end, start in zip(ends, starts, strict=True))
