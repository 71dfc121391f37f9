"""Hugging Face checkpoints in and out, with the shards of every layout cut by hand; what a wrong one is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from disk_limit import files_at_most
from safetensors.torch import load_file, save_file
from tiny_checkpoint import random_weights, write_checkpoint
from toy_shards import cut, shard_shapes, small_model

from megatron_rl.config.errors import UserError
from megatron_rl.config.model import ModelConfig, ParallelConfig
from megatron_rl.resharding.families import family_of, names_of
from megatron_rl.resharding.hf import hf_config, load_hf
from megatron_rl.resharding.hf_source import check_config
from megatron_rl.resharding.hf_target import write_hf

MODEL = small_model()
FULL = {name: torch.randn(shape, generator=torch.Generator().manual_seed(7)) for name, shape in names_of(MODEL).hf_shapes.items()}


def checkpoint(folder: Path, tensors: dict[str, torch.Tensor] = FULL, **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(family_of(MODEL).to_hf_config(MODEL) | config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def load(path: Path, parallel: ParallelConfig, world: int, rank: int, model: ModelConfig = MODEL, spelling: int = 0) -> Any:
    shapes = shard_shapes(names_of(model), parallel, world, rank, spelling)
    weights = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
    load_hf(path, weights, model, parallel, rank)
    return weights


@pytest.mark.parametrize("spelling", [0, 1])
@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (1, {}),
        (2, {"ep": 2}),
        (2, {"pp": 2}),
        (2, {"tp": 2, "etp": 2}),
        (4, {"tp": 2, "pp": 2, "ep": 2}),
        (4, {"tp": 4, "ep": 2, "etp": 2}),
    ],
)
def test_a_rank_reads_its_shards(tmp_path: Path, world: int, layout: dict[str, int], spelling: int) -> None:
    path = checkpoint(tmp_path / "hf")
    parallel = ParallelConfig(**layout, sequence_parallel=layout.get("tp", 1) > 1)
    for rank in range(world):
        wanted = cut(FULL, names_of(MODEL), parallel, world, rank, spelling)
        loaded = load(path, parallel, world, rank, spelling=spelling)
        assert loaded.keys() == wanted.keys()
        assert all(torch.equal(loaded[name], wanted[name]) for name in wanted)


def write(path: Path, tensors: dict[str, torch.Tensor], per_shard: int, files: tuple[Path, ...] = ()) -> None:
    entries = list(tensors.items())
    with write_hf(path, {"model_type": "x"}, files) as consume:
        for at in range(0, len(entries), per_shard):
            consume(entries[at : at + per_shard])


def test_one_bucket_becomes_one_file(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.model"
    tokenizer.write_bytes(b"spm")
    write(tmp_path / "hf", FULL, 10_000, (tokenizer,))
    assert sorted(file.name for file in (tmp_path / "hf").iterdir()) == ["config.json", "model.safetensors", "tokenizer.model"]
    written = load_file(tmp_path / "hf/model.safetensors")
    assert written.keys() == FULL.keys()
    assert all(torch.equal(written[name], FULL[name]) for name in FULL)


def test_several_buckets_become_numbered_files_with_an_index_that_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "hf"
    write(path, FULL, 20)
    (path / "config.json").write_text(json.dumps(family_of(MODEL).to_hf_config(MODEL)))
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in FULL.values())
    assert index["weight_map"].keys() == FULL.keys()
    assert set(index["weight_map"].values()) == {file.name for file in path.glob("model-*-of-*.safetensors")}
    loaded, parallel = load(path, ParallelConfig(), 1, 0), ParallelConfig()
    wanted = cut(FULL, names_of(MODEL), parallel, 1, 0)
    assert all(torch.equal(loaded[name], wanted[name]) for name in wanted)


def test_an_existing_checkpoint_is_replaced_only_when_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "hf"
    write(path, {"a": torch.zeros(4)}, 1)
    with pytest.raises(ZeroDivisionError), write_hf(path, {}) as consume:
        consume([("a", torch.ones(4))])
        raise ZeroDivisionError
    assert torch.equal(load_file(path / "model.safetensors")["a"], torch.zeros(4))
    assert [file.name for file in tmp_path.iterdir()] == ["hf"]
    write(path, {"a": torch.ones(4)}, 1)
    assert torch.equal(load_file(path / "model.safetensors")["a"], torch.ones(4))
    assert [file.name for file in tmp_path.iterdir()] == ["hf"]


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    with files_at_most(50_000), pytest.raises(UserError, match=r"hf: cannot write the checkpoint: .*File too large") as caught:
        write(tmp_path / "hf", {"a": torch.zeros(1000), "b": torch.zeros(100_000)}, 1)
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def refused(path: Path, model: ModelConfig = MODEL) -> str:
    before = {name: torch.zeros(shape) for name, shape in shard_shapes(names_of(model), ParallelConfig(), 1, 0).items()}
    with pytest.raises(UserError) as caught:
        load_hf(path, before, model, ParallelConfig(), 0)
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)
    assert not any(tensor.any() for tensor in before.values()), "a parameter changed"
    return str(caught.value)


def test_missing_and_unused_tensors_are_listed(tmp_path: Path) -> None:
    tensors = dict(FULL)
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    tensors["model.layers.1.attention.query_key_value.bias"] = torch.zeros(3)
    message = refused(checkpoint(tmp_path / "hf", tensors))
    assert "missing model.layers.1.mlp.experts.2.up_proj.weight" in message
    assert "not part of the model: model.layers.1.attention.query_key_value.bias" in message


def test_a_long_list_is_cut(tmp_path: Path) -> None:
    experts = {name: tensor for name, tensor in FULL.items() if ".experts." not in name}
    assert "and 31 more" in refused(checkpoint(tmp_path / "hf", experts))


def test_a_wrong_shape_is_named(tmp_path: Path) -> None:
    message = refused(checkpoint(tmp_path / "hf", FULL | {"model.norm.weight": torch.zeros(5)}))
    assert "model.norm.weight [5] instead of [16]" in message


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    file = checkpoint(tmp_path / "hf") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert str(file) in refused(tmp_path / "hf")


def test_an_index_that_promises_too_much_is_named(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "hf")
    where = dict.fromkeys([*FULL, "model.extra"], "model.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert "model.extra not in the files" in refused(path)
    where["model.extra"] = "model-2.safetensors"
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert f"{path / 'model-2.safetensors'}: no such file" in refused(path)


def test_a_config_json_of_another_model_names_the_keys(tmp_path: Path) -> None:
    message = refused(checkpoint(tmp_path / "hf", num_experts_per_tok=4, rope_theta=10000.0))
    assert "model.moe.top_k=2 (checkpoint: 4)" in message
    assert "model.rotary_base=600000.0 (checkpoint: 10000.0)" in message
    assert "num_layers" not in message


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "no such file"), ("{", "Expecting property name"), ("[]", "not a JSON object"), ("{}", "architectures")],
)
def test_a_bad_config_json_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    file = checkpoint(tmp_path / "hf") / "config.json"
    file.unlink()
    if text is not None:
        file.write_text(text)
    assert message in refused(tmp_path / "hf")
    assert str(file) in refused(tmp_path / "hf")


def test_the_prediction_layer_is_left_out_only_where_config_json_has_one(tmp_path: Path) -> None:
    extra = FULL | {"model.layers.4.eh_proj.weight": torch.zeros(2, 2)}
    load(checkpoint(tmp_path / "with", extra, num_nextn_predict_layers=1), ParallelConfig(), 1, 0)
    assert "model.layers.4.eh_proj.weight" in refused(checkpoint(tmp_path / "without", extra))


def test_the_tests_tiny_checkpoint_is_ours(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "hf", seed=3)
    theirs = json.loads((path / "config.json").read_text())
    model = ModelConfig.model_validate(family_of(MODEL).from_hf_config(theirs) | {"init_std": theirs["initializer_range"]})
    check_config(path, model)
    ours = hf_config(model, dtype="float32", eos_token_id=1, pad_token_id=0)
    assert {key: ours[key] for key in theirs} == theirs
    weights = load(path, ParallelConfig(), 1, 0, model)
    assert torch.equal(weights["output_layer.weight"], random_weights(theirs, 3)["lm_head.weight"])
