"""The planner's arithmetic against published numbers, against the table of names, and against the plan of a real push."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_families import TINY, tiny_model
from toy_shards import shard_shapes

from megatron_rl.config import PlanRun, UserError, validate
from megatron_rl.config.model import ModelConfig, ParallelConfig
from megatron_rl.config.plan import GPUS, ClusterConfig
from megatron_rl.planning.activations import RECOMPUTE, Tokens, in_flight, layer_parts
from megatron_rl.planning.memory import engine_of, item_bytes, policy_bytes
from megatron_rl.planning.parameters import Census, stages
from megatron_rl.planning.search import search, uneven_stages
from megatron_rl.planning.sync import pushed_bytes
from megatron_rl.resharding.families import model_values, names_of
from megatron_rl.resharding.plan import ALIGNMENT, Shard, make_plan

CONF = Path(__file__).resolve().parents[2] / "conf"
FILES = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
PUBLISHED = {  # total and active parameters, billions, and the tolerance of the last printed digit
    "ling_mini_2_0": (16.26, 1.43, 0.005),
    "ling_flash_2_0": (103, 6.1, 0.5),
    "ling_1t": (1000, 51, 0.5),
    "ling_lite": (16.8, 2.75, 0.05),
    "qwen3_30b_a3b": (30.5, 3.3, 0.06),
    "qwen3_235b_a22b": (235, 22, 0.5),
    "qwen3_8b": (8.2, 8.2, 0.05),
    "deepseek_v3": (671, 37, 0.6),
}
HF_CONFIGS = {
    "ling_lite": "ling_lite_chat",
    "qwen3_30b_a3b": "qwen3-30B-A3B",
    "qwen3_235b_a22b": "qwen3-235B-A22B",
    "qwen3_8b": "qwen3-8B",
    "deepseek_v3": "deepseek_v3",
}


def model_file(name: str) -> ModelConfig:
    return ModelConfig.model_validate(yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text()))


def plan_run(model: ModelConfig, gpus: int = 8, gpu: str = "h100", **values: Any) -> PlanRun:
    cluster = {"gpus": gpus, "gpu": gpu} | values.pop("cluster", {})
    return validate(PlanRun, {"model": model.model_dump(), "cluster": cluster} | values)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_totals_are_the_published_ones(name: str) -> None:
    total, active, tolerance = PUBLISHED[name]
    census = Census.of(model_file(name))
    assert census.total(with_mtp=False) / 1e9 == pytest.approx(total, abs=tolerance)
    assert census.active() / 1e9 == pytest.approx(active, abs=tolerance)


@pytest.mark.parametrize("name", [*FILES, *sorted(TINY)])
def test_tensors_are_those_of_the_checkpoint(name: str) -> None:
    model = model_file(name) if name in FILES else tiny_model(name)
    census, elements, buffers = Census.of(model), 0, 0
    for parameter in names_of(model).parameters.values():
        if not parameter.rule.copy:
            size = sum(math.prod(shape) for shape in parameter.shapes)
            is_buffer = parameter.rule.megatron[0].endswith("router.expert_bias")
            buffers += size * is_buffer
            elements += size * (not is_buffer)
    assert (census.total(), census.buffers()) == (elements, buffers)


def test_ling_mini_is_the_published_checkpoint(shared_data: Path) -> None:
    file = shared_data / "model_configs" / "ling_mini_2_0_tensor_shapes.json.gz"
    if not file.exists():
        pytest.skip(f"{file} is absent")
    shapes = json.loads(gzip.decompress(file.read_bytes()))
    shapes = shapes.get("tensors", shapes)
    sizes = {name: math.prod(entry["shape"] if isinstance(entry, dict) else entry) for name, entry in shapes.items()}
    census = Census.of(model_file("ling_mini_2_0"))
    assert sum(sizes.values()) == census.total() + census.buffers()


@pytest.mark.parametrize("name", sorted(HF_CONFIGS))
def test_model_files_say_what_config_json_says(name: str, shared_data: Path) -> None:
    file = shared_data / "model_configs" / f"{HF_CONFIGS[name]}_config.json"
    if not file.exists():
        pytest.skip(f"{file} is absent")
    config = json.loads(file.read_text())
    theirs = ModelConfig.model_validate(model_values(config) | {"init_std": config["initializer_range"]})
    assert model_file(name) == theirs


@pytest.mark.parametrize("name", FILES)
def test_every_key_stands_in_a_model_file(name: str) -> None:
    values = yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text())
    full = model_file(name).model_dump(mode="json")
    assert values.keys() == full.keys()
    for part in ("moe", "mla", "rope_scaling"):
        assert (values[part] or {}).keys() == (full[part] or {}).keys(), part


LAYOUTS = {
    "single": (1, {}),
    "tp2-ep2-pp2": (8, {"tp": 2, "ep": 2, "pp": 2, "sequence_parallel": True}),
    "etp2-pp2": (4, {"tp": 2, "etp": 2, "pp": 2, "sequence_parallel": True}),
    "ep4": (4, {"ep": 4}),
}


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("quantize", ["none", "fp8"])
@pytest.mark.parametrize("family", sorted(TINY))
def test_pushed_bytes_are_those_of_the_real_plan(family: str, layout: str, quantize: str) -> None:
    model = tiny_model(family).model_copy(update={"dtype": "bfloat16", "num_mtp_layers": 0})
    world, values = LAYOUTS[layout]
    if model.moe is None:
        values = {key: value for key, value in values.items() if key not in ("ep", "etp")}
    parallel, names = ParallelConfig(**values), names_of(model)
    inventories = [
        {
            name: Shard(shape, "float32" if name.endswith("expert_bias") else "bfloat16")
            for name, shape in shard_shapes(names, parallel, world, rank).items()
        }
        for rank in range(world)
    ]
    buckets = make_plan(names, parallel, inventories, 1 << 16).buckets
    tensors = [tensor for bucket in buckets for tensor in bucket.tensors]
    exact = sum(tensor.nbytes for tensor in tensors)
    run = plan_run(model, sequence_tokens=512, engine={"sync": {"quantize": quantize}})
    planned = pushed_bytes(run, Census.of(model), with_mtp=False)
    if quantize == "fp8":
        assert exact / 2 < planned < exact
        return
    assert planned == exact
    assert 0 <= sum(bucket.nbytes for bucket in buckets) - planned < ALIGNMENT * len(tensors)


def test_the_first_push_has_the_frozen_layers_and_what_the_family_repeats() -> None:
    for family in ("bailing_moe_v2", "deepseek_v3"):
        model = tiny_model(family).model_copy(update={"dtype": "float32"})
        elements = sum(math.prod(shape) for shape in names_of(model).hf_shapes.values())
        assert pushed_bytes(plan_run(model), Census.of(model), with_mtp=True) == 4 * elements


def test_in_flight_by_hand() -> None:
    pp4, pp2_vpp2 = ParallelConfig(pp=4), ParallelConfig(pp=2, vpp=2)
    assert [in_flight(pp4, rank, 100) for rank in range(4)] == [[4], [3], [2], [1]]
    assert in_flight(pp4, 0, 2) == [2]
    # Rank 0 warms up with (2 - 0 - 1) * 2 + (2 - 1) * 2 = 4 forward passes and adds one: microbatches 0 1 of chunk 0, 0 1 of
    # chunk 1, 2 of chunk 0.
    assert in_flight(pp2_vpp2, 0, 100) == [3, 2]
    assert in_flight(pp2_vpp2, 1, 100) == [2, 1]


@pytest.mark.parametrize("name", FILES)
def test_more_recomputation_never_keeps_more(name: str) -> None:
    model = model_file(name)
    for tp in (1, 2):
        parallel = ParallelConfig(tp=tp, sequence_parallel=tp > 1)
        tokens = Tokens.of(model, parallel, 4096, 1.0)
        for moe in {False, model.moe is not None}:
            kept = [layer_parts(model, parallel, tokens, moe).under(recompute) for recompute in RECOMPUTE]
            assert kept == sorted(kept, reverse=True)
            assert kept[-1] == model.hidden_size * 4096 / tp


def test_activations_of_a_dense_layer_are_korthikantis() -> None:
    """34 s b h bytes less what dropout (2 masks of 1 byte) costs, at 4 h wide ReLU-like MLPs: here SwiGLU at 8/3 h and MHA.

    Theirs: norms 4, QKV input 2, Q and K 4, V 2, projection input 2, MLP 2 + 8 + 8, dropout masks 2. Ours has no dropout (-2), and
    the MLP keeps the norm's output (2), gate and up (2 x 16/3) and the activation (16/3).
    """
    values = model_file("qwen3_8b").model_dump() | {
        "hidden_size": 768,
        "num_attention_heads": 6,
        "num_kv_heads": 6,
        "qk_norm": False,
    }
    model = ModelConfig.model_validate(values | {"ffn_hidden_size": 2048})
    parallel = ParallelConfig()
    parts = layer_parts(model, parallel, Tokens.of(model, parallel, 1000, 1.0), moe=False)
    assert 2 * parts.under("none") / (1000 * 768) == pytest.approx(4 + 2 + 4 + 2 + 2 + 2 + 3 * 16 / 3)


def test_an_engine_holds_its_share() -> None:
    model = model_file("ling_1t")
    run, census = plan_run(model, gpus=64), Census.of(model)
    whole, eighth = engine_of(run, census, 1), engine_of(run, census, 8)
    assert whole.weights == pytest.approx(2 * census.total(), rel=1e-5)
    assert whole.weights / 8 < eighth.weights < whole.weights / 7.9
    assert whole.kv_per_token == 2 * 2 * 8 * 128 * 80
    assert (
        engine_of(run, census, 8).kv_per_token == engine_of(run, census, 64).kv_per_token == 2 * 2 * 128 * 80
    )  # one head at least
    latent = Census.of(model_file("deepseek_v3"))
    assert engine_of(plan_run(latent.model), latent, 8).kv_per_token == 2 * (512 + 64) * 61


def test_bytes_of_a_trained_parameter_by_hand() -> None:
    """bfloat16: 2 + 4 + 12 / replicas; float32: 4 + 4 + 8 / replicas."""
    census = Census.of(model_file("qwen3_8b"))
    parallel = ParallelConfig()
    (stage,) = stages(census.model, parallel)
    held = census.held(stage, parallel)
    for item, state in ((2, 12), (4, 8)):
        got = policy_bytes(held, parallel, 4, item)
        count = census.total()
        assert (got.weights, got.gradients, got.optimizer) == (item * count, 4 * count, state * count / 4)
    whole = policy_bytes(held, ParallelConfig(distributed_optimizer=False), 4, 2)
    assert (whole.optimizer, whole.fixed) == (12 * count, 2 * count)


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["ling_mini_2_0", "qwen3_30b_a3b", "qwen3_8b", "deepseek_v3"]),
    gpus=st.sampled_from([1, 2, 8, 16, 64]),
    gpu=st.sampled_from(sorted(GPUS)),
    longest=st.sampled_from([2048, 16384]),
)
def test_every_offered_layout_is_possible_and_fits(name: str, gpus: int, gpu: str, longest: int) -> None:
    run = plan_run(model_file(name), gpus, gpu, sequence_tokens=longest)
    found = search(run, ())
    for plan in found.plans:
        plan.parallel.check(gpus, run.model)
        for usage in plan.usages:
            assert usage.total <= run.cluster.usable_bytes * (1 + 1e-9)
        assert plan.kv_tokens >= run.kv_sequences * longest
        assert gpus % plan.engine.tp == 0
    assert found.looked_at == sum(count for _, count in found.rejected) + found.fitting
    times = [plan.time.total for plan in found.plans]
    assert times == sorted(times)
    assert found.plans or found.nearest


def test_named_keys_are_kept() -> None:
    model = model_file("ling_mini_2_0")
    run = plan_run(model, 16, parallel={"tp": 2, "ep": 8}, engine={"tp": 4}, sequence_tokens=8192)
    found = search(run, ("parallel.tp", "parallel.ep", "engine.tp"))
    assert found.plans
    assert {(plan.parallel.tp, plan.parallel.ep, plan.engine.tp) for plan in found.plans} == {(2, 8, 4)}
    assert all(plan.parallel.sequence_parallel for plan in found.plans)


def test_a_small_static_fraction_is_refused() -> None:
    run = plan_run(model_file("ling_mini_2_0"), 16, engine={"tp": 4, "mem_fraction_static": 0.1}, sequence_tokens=8192)
    found = search(run, ("engine.tp", "engine.mem_fraction_static"))
    assert not found.plans
    assert found.nearest
    assert "engine.mem_fraction_static=0.1 leaves the KV cache" in found.nearest.problem


def test_more_memory_and_a_faster_network_never_hurt() -> None:
    model = model_file("ling_mini_2_0")
    best = [search(plan_run(model, 16, gpu, sequence_tokens=8192), ()).plans[0].time.total for gpu in ("h100", "h200")]
    assert best[1] <= best[0]
    slow, fast = (search(plan_run(model, 16, cluster={"network_gb_s": rate}, sequence_tokens=8192), ()) for rate in (5, 50))
    assert fast.plans[0].time.total <= slow.plans[0].time.total


def test_what_does_not_fit_says_where_and_why() -> None:
    found = search(plan_run(model_file("ling_1t"), 8, cluster={}), ())
    assert not found.plans
    assert found.nearest
    assert "does not fit: needs " in found.nearest.problem
    assert " of 71.1 GiB in phase " in found.nearest.problem
    assert ", because of " in found.nearest.problem
    assert dict(found.rejected)["does not fit in phase train"] > 0


def test_impossible_layouts_name_their_key() -> None:
    model = model_file("ling_mini_2_0")
    for key, value, message in (
        ("tp", 3, "tp x pp x cp"),
        ("tp", 8, "num_kv_heads=4 is not divisible by 8"),
        ("ep", 16, "parallel.ep"),
    ):
        with pytest.raises(UserError, match=message):
            search(plan_run(model, 8, parallel={key: value}), {f"parallel.{key}"})
    with pytest.raises(UserError, match=r"engine\.tp=3"):
        search(plan_run(model, 8, engine={"tp": 3}), {"engine.tp"})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cluster": {"gpu": "h101"}}, "cluster.gpu"),
        ({"cluster": {"gpus": 12}}, "cluster: gpus=12"),
        ({"cluster": {"reserve_gib": 80}}, "cluster: reserve_gib=80"),
        ({"sequence_tokens": 99_999}, "sequence_tokens=99999"),
        ({"parallel": {"recompute": "some"}}, "recompute="),
    ],
)
def test_wrong_values_are_one_line_with_their_key(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        plan_run(model_file("ling_mini_2_0"), **values)
    assert "\n" not in str(error.value)


def test_uneven_stages_spare_the_ends() -> None:
    model = model_file("deepseek_v3")
    sizes = uneven_stages(model, 16)
    assert sizes is not None
    assert (sum(sizes), len(sizes), sizes[0], sizes[-1], max(sizes) - min(sizes)) == (61, 16, 3, 3, 1)
    assert uneven_stages(model_file("ling_1t"), 16) is None
    ParallelConfig(pp=16, layers_per_stage=sizes).check(16, model)


def test_the_cluster_config_knows_its_gpus() -> None:
    cluster = ClusterConfig(gpus=4)
    assert (cluster.node_size, cluster.network) == (4, 50e9)
    assert cluster.usable_bytes == (79.1 - 8) * 2**30
    assert item_bytes(model_file("tiny_ling")) == 2
