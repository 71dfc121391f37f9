"""Names, shapes and spans against the published model and against layouts written out by hand."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
import yaml
from tiny_checkpoint import TINY_CONFIG, weight_shapes
from toy_shards import cut, small_model

from megatron_rl.config.model import ModelConfig, ParallelConfig
from megatron_rl.resharding.families import family_of, names_of
from megatron_rl.resharding.names import Span


def configured(root: Path, name: str) -> ModelConfig:
    return ModelConfig.model_validate(yaml.safe_load((root / "conf/model" / f"{name}.yaml").read_text()))


def test_names_and_shapes_are_those_of_the_tiny_checkpoint(repo_root: Path) -> None:
    assert names_of(configured(repo_root, "tiny_ling")).hf_shapes == weight_shapes(TINY_CONFIG)


def test_names_and_shapes_are_those_of_ling_mini(repo_root: Path, shared_data: Path) -> None:
    published = json.loads(gzip.decompress((shared_data / "model_configs/ling_mini_2_0_tensor_shapes.json.gz").read_bytes()))
    wanted = {name: tuple(shape) for name, shape in published.items()}
    assert names_of(configured(repo_root, "ling_mini_2_0")).hf_shapes == wanted


@pytest.mark.parametrize(
    ("megatron", "hf"),
    [
        ("embedding.word_embeddings.weight", ["model.word_embeddings.weight"]),
        ("decoder.layers.3.input_layernorm.weight", ["model.layers.3.input_layernorm.weight"]),
        ("decoder.layers.3.self_attention.linear_qkv.layer_norm_weight", ["model.layers.3.input_layernorm.weight"]),
        ("decoder.layers.0.mlp.linear_fc1.layer_norm_weight", ["model.layers.0.post_attention_layernorm.weight"]),
        ("decoder.layers.0.mlp.linear_fc1.weight", ["model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"]),
        ("decoder.layers.2.mlp.experts.local_experts.3.linear_fc2.weight", ["model.layers.2.mlp.experts.3.down_proj.weight"]),
        ("decoder.layers.2.mlp.experts.linear_fc2.weight3", ["model.layers.2.mlp.experts.3.down_proj.weight"]),
        ("decoder.layers.1.mlp.router.expert_bias", ["model.layers.1.mlp.gate.expert_bias"]),
    ],
)
def test_both_layer_specs_are_understood(megatron: str, hf: list[str]) -> None:
    assert list(names_of(small_model()).resolve(megatron).hf) == hf


@pytest.mark.parametrize(
    "stranger",
    [
        "decoder.layers.0.mlp.router.weight",  # a dense layer
        "decoder.layers.1.mlp.linear_fc1.weight",  # a MoE layer
        "decoder.layers.9.input_layernorm.weight",
        "decoder.layers.1.mlp.experts.linear_fc1.weight4",
        "decoder.layers.1.self_attention.linear_qkv.bias",
    ],
)
def test_a_stranger_is_named(stranger: str) -> None:
    with pytest.raises(ValueError, match=stranger):
        names_of(small_model()).resolve(stranger)


def test_qkv_is_interleaved_per_kv_group() -> None:
    names = names_of(small_model(num_attention_heads=4, num_kv_heads=2, head_dim=2))
    qkv = names.parameters["model.layers.0.attention.query_key_value.weight"]
    # Hugging Face rows: Q 0..8 (4 heads of 2), K 8..12, V 12..16. Rank 1 of 2 holds KV group 1.
    assert names.spans(qkv, (8, 16), 1, 2) == (Span(0, 0, 4, 0, 4), Span(0, 0, 10, 4, 2), Span(0, 0, 14, 6, 2))


def test_gate_and_up_are_each_split() -> None:
    names = names_of(small_model())
    fc1 = names.parameters["model.layers.0.mlp.gate_proj.weight"]
    assert names.spans(fc1, (24, 16), 1, 2) == (Span(0, 0, 12, 0, 12), Span(1, 0, 12, 12, 12))


def test_a_padded_vocabulary_gives_its_own_rows_only() -> None:
    names = names_of(small_model(vocab_size=10))
    head = names.parameters["lm_head.weight"]
    assert [names.spans(head, (4, 16), shard, 4) for shard in range(4)] == [
        (Span(0, 0, 0, 0, 4),),
        (Span(0, 0, 4, 0, 4),),
        (Span(0, 0, 8, 0, 2),),
        (),
    ]


@pytest.mark.parametrize(("name", "shape"), [("lm_head.weight", (4, 16)), ("model.layers.0.attention.dense.weight", (16, 32))])
def test_a_misshapen_shard_is_named(name: str, shape: tuple[int, int]) -> None:
    names = names_of(small_model())
    with pytest.raises(ValueError, match=name):
        names.spans(names.parameters[name], shape, 0, 2)


def test_a_shard_is_covered_but_for_vocabulary_padding() -> None:
    model, parallel = small_model(vocab_size=10), ParallelConfig(tp=4, ep=2, etp=2, sequence_parallel=True)
    full = {name: torch.randn(shape) for name, shape in names_of(model).hf_shapes.items()}
    for rank in range(4):
        for name, shard in cut(full, names_of(model), parallel, 4, rank).items():
            padding = {"embedding.word_embeddings.weight", "output_layer.weight"} if rank == 3 else set()
            assert shard.isnan().any() == (name in padding), (rank, name)


def test_config_json_and_model_config_agree_in_both_directions(repo_root: Path) -> None:
    for name in ("tiny_ling", "ling_mini_2_0"):
        model = configured(repo_root, name)
        again = ModelConfig.model_validate(family_of(model).from_hf_config(family_of(model).to_hf_config(model)))
        assert again.model_dump(exclude={"init_std"}) == model.model_dump(exclude={"init_std"})


def test_config_json_has_every_key_the_engine_reads() -> None:
    family = family_of(small_model())
    ours = family.to_hf_config(ModelConfig.model_validate(family.from_hf_config(TINY_CONFIG) | {"init_std": 0.05}))
    tokenizer = {"dtype", "pad_token_id", "eos_token_id"}
    assert {key: ours.get(key) for key in TINY_CONFIG.keys() - tokenizer} == {
        key: value for key, value in TINY_CONFIG.items() if key not in tokenizer
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"partial_rotary_factor": None}, "partial_rotary_factor"),
        ({"routed_scaling_factor": None}, "routed_scaling_factor"),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "Qwen3MoeForCausalLM"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
        ({"use_qkv_bias": True}, "use_qkv_bias"),
    ],
)
def test_a_config_json_that_says_too_little_or_too_much_is_refused(change: dict[str, object], message: str) -> None:
    config = {key: value for key, value in TINY_CONFIG.items() if key != "rope_parameters"} | change
    with pytest.raises(ValueError, match=message):
        family_of(small_model()).from_hf_config(config)
