"""Conversions in one process: there and back, what resumes, what is refused. (Layouts: tests/dist/test_conversion.py.)"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from disk_limit import files_at_most
from safetensors.torch import load_file, save_file
from tiny_families import write_family

from megatron_rl.config.errors import UserError
from megatron_rl.convert import hf_to_megatron, megatron_to_hf

SMALL = {"num_hidden_layers": 2, "num_experts": 4, "n_group": 2, "vocab_size": 67}
BUCKET = 40_000  # bytes


def checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_family(tmp_path / "hf", "bailing_moe_v2", seed=3, dtype=torch.bfloat16, **SMALL)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Beside the checkpoint that it was made of, `hf`."""
    folder = tmp_path_factory.mktemp("converted")
    source = write_family(folder / "hf", "bailing_moe_v2", seed=3, dtype=torch.bfloat16, **SMALL)
    (source / "tokenizer.json").write_text("{}")
    (source / "README.md").write_text("weights")
    hf_to_megatron(source, folder / "megatron", ["parallel.tp=2", "parallel.ep=2"], None, BUCKET)
    return folder / "megatron"


def refused(act: Callable[..., None], *args: Any) -> str:
    with pytest.raises(UserError) as caught:
        act(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_there_and_back_is_bitwise_with_its_config_json_and_tokenizer(converted: Path, tmp_path: Path) -> None:
    megatron_to_hf(converted, tmp_path / "back", None, BUCKET)
    source, back = converted.parent / "hf", tmp_path / "back"
    assert same(checkpoint(back), checkpoint(source))
    assert (back / "config.json").read_text() == (source / "config.json").read_text()
    assert (back / "tokenizer.json").exists()
    assert not (back / "README.md").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["back"]
    files = sorted(back.glob("*.safetensors"))
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert len(files) > 3
    assert {path.name for path in files} == set(index["weight_map"].values())
    assert all(sum(tensor.nbytes for tensor in load_file(path).values()) <= BUCKET for path in files)


def test_another_data_type_leaves_the_expert_bias(converted: Path, tmp_path: Path) -> None:
    megatron_to_hf(converted, tmp_path / "back", "float32", BUCKET)
    wanted = {name: tensor.float() for name, tensor in checkpoint(converted.parent / "hf").items()}
    assert same(checkpoint(tmp_path / "back"), wanted)
    assert json.loads((tmp_path / "back/config.json").read_text())["torch_dtype"] == "float32"
    hf_to_megatron(tmp_path / "back", tmp_path / "half", [], "bfloat16", BUCKET)
    megatron_to_hf(tmp_path / "half", tmp_path / "again", None, BUCKET)
    assert same(checkpoint(tmp_path / "again"), checkpoint(converted.parent / "hf"))


def test_the_layout_cuts_the_chunks(converted: Path) -> None:
    from megatron_rl.checkpoint.boxes import BoxReader

    stored = BoxReader(converted).metadata.state_dict_metadata
    sizes = {key: [tuple(chunk.sizes) for chunk in value.chunks] for key, value in stored.items() if hasattr(value, "chunks")}
    assert sizes["embedding.word_embeddings.weight"] == [(34, 64), (33, 64)]  # TP2 with a padded vocabulary
    assert sizes["decoder.layers.0.mlp.linear_fc1.weight"] == [(48, 64)] * 4  # gate and up, each in two
    assert sizes["decoder.layers.1.mlp.experts.experts.linear_fc2.weight"] == [(1, 64, 32)] * 4  # ETP1


def fail_half_way(source: Path, target: Path) -> dict[str, int]:
    """When the pieces that were done were written, by name."""
    with files_at_most(30_000):
        message = refused(hf_to_megatron, source, target, [], None, 1)  # a file per chunk
    assert "megatron: cannot write the checkpoint: File too large" in message
    assert not target.exists()
    done = {path.name for path in target.with_name("megatron.tmp").glob("pieces/*")}
    assert len(done) > 1
    return {
        path.name: path.stat().st_mtime_ns
        for path in target.with_name("megatron.tmp").glob("folder/*_0.distcp")
        if path.name.split("_")[2] in done
    }


def test_a_full_disk_leaves_no_destination_and_the_same_command_goes_on(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "megatron"
    before = fail_half_way(write_family(source, "qwen3", num_hidden_layers=2), target)
    hf_to_megatron(source, target, [], None, 1)
    assert before == {name: (target / name).stat().st_mtime_ns for name in before}  # not made again
    megatron_to_hf(target, tmp_path / "back", None, BUCKET)
    assert same(checkpoint(tmp_path / "back"), checkpoint(source))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "hf", "megatron"]


def test_a_changed_source_starts_anew(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    target = tmp_path / "megatron"
    fail_half_way(write_family(source, "qwen3", num_hidden_layers=2), target)
    write_family(source, "qwen3", seed=1, num_hidden_layers=2)
    with caplog.at_level(logging.INFO):
        hf_to_megatron(source, target, [], None, 1)
    assert f"{target}: starting anew, since the unfinished one differs in source" in caplog.messages
    megatron_to_hf(target, tmp_path / "back", None, BUCKET)
    assert same(checkpoint(tmp_path / "back"), checkpoint(source))


def test_a_full_disk_on_the_way_back(converted: Path, tmp_path: Path) -> None:
    with files_at_most(30_000):
        message = refused(megatron_to_hf, converted, tmp_path / "back", None, 1)
    assert "back: cannot write the checkpoint: File too large" in message
    assert not (tmp_path / "back").exists()
    megatron_to_hf(converted, tmp_path / "back", None, 1)
    assert same(checkpoint(tmp_path / "back"), checkpoint(converted.parent / "hf"))


def test_an_existing_destination_is_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "megatron").mkdir()
    assert "--dst=" in refused(hf_to_megatron, source, tmp_path / "megatron", [], None, BUCKET)
    assert list((tmp_path / "megatron").iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.tp=3"], "parallel.tp: model.num_attention_heads=4 is not divisible by 3"),
        (["parallel.ep=8"], "parallel.ep=8 does not divide model.moe.num_experts=4"),
        (["parallel.etp=64"], "parallel.etp=64 does not divide model.moe.ffn_hidden_size=32"),
        (["parallel.tp=0"], "parallel.tp=0: Input should be greater than 0"),
        (["parallel.zp=2"], "parallel.zp: unknown key"),
        (["parallel"], "parallel=None: Input should be a valid dictionary"),
        (["cluster.gpus=2"], "cluster: unknown key"),
        (["model.num_layers=3"], "disagrees with the configured model: model.num_layers=3 (checkpoint: 2)"),
    ],
)
def test_an_impossible_layout_is_refused_before_a_byte_is_written(
    source: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    assert message in refused(hf_to_megatron, source, tmp_path / "megatron", overrides, None, BUCKET)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("bucket_mb", ["nan", "inf", "0", "-1"])
def test_a_bucket_without_a_size_is_refused(repo_root: Path, tmp_path: Path, bucket_mb: str) -> None:
    command = [repo_root / "tools/convert.py", "megatron-to-hf", "--src", tmp_path, "--dst", tmp_path / "out"]
    done = subprocess.run([sys.executable, *command, f"--bucket-mb={bucket_mb}"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"convert.py: error: --bucket-mb={bucket_mb}: has to be positive\n"


def test_a_config_json_without_what_its_family_needs_is_refused(source: Path, tmp_path: Path) -> None:
    file = source / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in config.items() if key != "partial_rotary_factor"}))
    message = refused(hf_to_megatron, source, tmp_path / "megatron", [], None, BUCKET)
    assert message == f"{file}: missing partial_rotary_factor"
    file.write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    assert "LlamaForCausalLM" in refused(hf_to_megatron, source, tmp_path / "megatron", [], None, BUCKET)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_prediction_layer_with_an_embedding_of_its_own_is_refused(tmp_path: Path) -> None:
    source = write_family(tmp_path / "hf", "deepseek_v3", num_hidden_layers=2, n_routed_experts=4, n_group=2)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.2.embed_tokens.weight"][5, 7] += 1
    save_file(tensors, source / "model.safetensors")
    message = refused(hf_to_megatron, source, tmp_path / "megatron", [], None, BUCKET)
    assert "model.layers.2.embed_tokens.weight differs from model.embed_tokens.weight" in message
    hf_to_megatron(source, tmp_path / "megatron", ["model.num_mtp_layers=0"], None, BUCKET)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", None, BUCKET)
    without = {name: tensor for name, tensor in tensors.items() if "model.layers.2." not in name}
    assert same(checkpoint(tmp_path / "back"), without)
    assert json.loads((tmp_path / "back/config.json").read_text())["num_nextn_predict_layers"] == 0


def test_a_tied_checkpoint_may_repeat_the_embedding(tmp_path: Path) -> None:
    source = write_family(tmp_path / "hf", "qwen3_tied", num_hidden_layers=2)
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, source / "model.safetensors")
    hf_to_megatron(source, tmp_path / "megatron", [], None, BUCKET)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", None, BUCKET)
    assert same(checkpoint(tmp_path / "back"), tensors)
    save_file(tensors | {"lm_head.weight": torch.zeros(64, 64)}, source / "model.safetensors")
    message = refused(hf_to_megatron, source, tmp_path / "other", [], None, BUCKET)
    assert "lm_head.weight differs from model.embed_tokens.weight" in message


def test_fp8_blocks_are_read_as_what_they_stand_for(tmp_path: Path) -> None:
    """Sizes that are no multiple of a block, and a layout that cuts through blocks."""
    sizes = {"hidden_size": 160, "intermediate_size": 200, "num_hidden_layers": 2, "n_routed_experts": 4, "n_group": 2}
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    source = write_family(tmp_path / "hf", "deepseek_v3", dtype=torch.bfloat16, **sizes, quantization_config=quantization)
    tensors, wanted = load_file(source / "model.safetensors"), {}
    for name, tensor in list(tensors.items()):
        wanted[name] = tensor
        if "_proj" in name and "eh_proj" not in name:
            rows, columns = tensor.shape
            tensors[name] = (tensor.float() * 100).to(torch.float8_e4m3fn)
            scale = tensors[f"{name}_scale_inv"] = torch.rand(-(-rows // 128), -(-columns // 128)) / 100
            whole = torch.empty(rows, columns)
            for i in range(rows):
                for j in range(0, columns, 128):
                    whole[i, j : j + 128] = tensors[name][i, j : j + 128].float() * scale[i // 128, j // 128]
            wanted[name] = whole.bfloat16()
    save_file(tensors, source / "model.safetensors")
    hf_to_megatron(source, tmp_path / "megatron", ["parallel.tp=2", "parallel.etp=2"], None, BUCKET)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", None, BUCKET)
    assert same(checkpoint(tmp_path / "back"), wanted)
    assert "quantization_config" not in json.loads((tmp_path / "back/config.json").read_text())

    lost = next(name for name in tensors if name.endswith("_scale_inv"))
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, source / "model.safetensors")
    assert f"missing {lost}" in refused(hf_to_megatron, source, tmp_path / "other", [], None, BUCKET)
    (source / "config.json").write_text((source / "config.json").read_text().replace('"fp8"', '"int4"'))
    assert "quantization_config" in refused(hf_to_megatron, source, tmp_path / "other", [], None, BUCKET)


def test_a_torn_megatron_checkpoint_is_named(converted: Path, tmp_path: Path) -> None:
    torn = Path(shutil.copytree(converted, tmp_path / "torn"))
    file = torn / "__0_0.distcp"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-100])
    assert f"__0_0.distcp has {size - 100} bytes instead of {size}" in refused(
        megatron_to_hf, torn, tmp_path / "back", None, BUCKET
    )
    file.unlink()
    assert "__0_0.distcp is missing" in refused(megatron_to_hf, torn, tmp_path / "back", None, BUCKET)
    (torn / ".metadata").write_bytes(b"no pickle")
    assert f"{torn}: not a Megatron distributed checkpoint" in refused(megatron_to_hf, torn, tmp_path / "back", None, BUCKET)
    shutil.rmtree(torn / "hf")
    message = refused(megatron_to_hf, torn, tmp_path / "back", None, BUCKET)
    assert "neither a conversion's checkpoint nor a run's checkpoints/step_N" in message
    assert [path.name for path in tmp_path.iterdir()] == ["torn"]


def test_a_megatron_checkpoint_of_another_model_is_named(converted: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(converted, tmp_path / "other"))
    config = json.loads((other / "hf/config.json").read_text())
    for changes, message in (
        ({"num_hidden_layers": 1}, "not part of the model: decoder.layers.1."),
        ({"num_hidden_layers": 3}, "missing decoder.layers.2."),
        ({"intermediate_size": 128}, "wrong shapes: decoder.layers.0.mlp.linear_fc1.weight [192, 64] instead of [256, 64]"),
    ):
        (other / "hf/config.json").write_text(json.dumps(config | changes))
        assert message in refused(megatron_to_hf, other, tmp_path / "back", None, BUCKET)
