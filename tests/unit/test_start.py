"""What `model.init_from` takes and refuses, and what it makes of the weights. (Layouts: tests/dist/test_conversion.py.)"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_families import model_of, write_family

from megatron_rl.checkpoint.store import CheckpointStore
from megatron_rl.config.errors import UserError
from megatron_rl.config.model import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_rl.convert import hf_to_megatron
from megatron_rl.data.tokenizer import Tokenizer, conflict, export_hf_tokenizer, load_tokenizer, train_sentencepiece
from megatron_rl.policy import MegatronPolicy, MegatronRanks
from megatron_rl.start import start_from

ALONE = ParallelConfig()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face checkpoint `hf` with the tokenizer `ours.model` beside its weights, the conversion `megatron` of it, and
    `other.model`."""
    folder = tmp_path_factory.mktemp("start")
    write_family(folder / "hf", "qwen3_moe", seed=5, num_hidden_layers=2)
    export_hf_tokenizer(train_sentencepiece(["abcdef", "123"], folder / "ours.model", 40), folder / "hf")
    train_sentencepiece(["fedxyz", "123"], folder / "other.model", 40)
    hf_to_megatron(folder / "hf", folder / "megatron", [], None, 100_000)
    return folder


@pytest.fixture(scope="module")
def ours(folder: Path) -> Tokenizer:
    return load_tokenizer(folder / "ours.model")


@pytest.fixture(scope="module")
def model(folder: Path) -> ModelConfig:
    return model_of(json.loads((folder / "hf/config.json").read_text()))


@pytest.fixture(scope="module")
def ranks(folder: Path, model: ModelConfig) -> Iterator[MegatronRanks]:
    ranks = MegatronRanks(ALONE, model)
    yield ranks
    ranks.close()


def policy_from(path: Path, model: ModelConfig, ranks: MegatronRanks, tokenizer: Tokenizer) -> MegatronPolicy:
    start = start_from(path, model, ALONE, ranks, tokenizer)
    return MegatronPolicy(model, ALONE, OptimizerConfig(lr=1e-3), total_steps=1, seed=0, ranks=ranks, load=start)


def refused(path: Path, model: ModelConfig, ranks: MegatronRanks, tokenizer: Tokenizer) -> str:
    with pytest.raises(UserError) as caught:
        policy_from(path, model, ranks, tokenizer)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 1
    return str(caught.value)


@pytest.fixture(scope="module")
def run(folder: Path, model: ModelConfig, ranks: MegatronRanks, ours: Tokenizer) -> Path:
    """A run's checkpoint of the same weights."""
    policy = policy_from(folder / "hf", model, ranks, ours)
    step = CheckpointStore(folder / "run/checkpoints", policy, ranks, 1, lambda path: None).save(7, {})
    record = {"model": model.model_dump(mode="json"), "data": {"tokenizer": str(folder / "ours.model")}}
    (folder / "run/config.yaml").write_text(yaml.safe_dump(record))
    return step


def test_checkpoints_of_all_kinds_start_the_same_policy(
    folder: Path, run: Path, model: ModelConfig, ranks: MegatronRanks, ours: Tokenizer
) -> None:
    from_hf, *others = (policy_from(path, model, ranks, ours) for path in (folder / "hf", folder / "megatron", run))
    stored = load_file(folder / "hf/model.safetensors")
    assert torch.equal(from_hf.weights()["embedding.word_embeddings.weight"], stored["model.embed_tokens.weight"])
    for policy in others:
        assert policy.weights().keys() == from_hf.weights().keys()
        assert all(torch.equal(tensor, from_hf.weights()[name]) for name, tensor in policy.weights().items())


def test_a_megatron_checkpoint_starts_a_policy_of_another_data_type(
    folder: Path, model: ModelConfig, ranks: MegatronRanks, ours: Tokenizer
) -> None:
    half = model.model_copy(update={"dtype": "bfloat16"})
    wanted, found = (policy_from(folder / kind, half, ranks, ours).weights() for kind in ("hf", "megatron"))
    assert all(tensor.dtype == wanted[name].dtype and torch.equal(tensor, wanted[name]) for name, tensor in found.items())


def test_weights_of_another_tokenizer_are_refused(folder: Path, run: Path, model: ModelConfig, ranks: MegatronRanks) -> None:
    other = load_tokenizer(folder / "other.model")
    for path, theirs in (
        (folder / "hf", folder / "hf"),
        (folder / "megatron", folder / "megatron/hf"),
        (run, folder / "ours.model"),
    ):
        message = refused(path, model, ranks, other)
        assert message.startswith(f"model.init_from={path}: the weights were trained with another tokenizer: id ")
        assert f" in {folder / 'other.model'} and " in message and message.endswith(f" in {theirs}")


def test_tokens_beyond_the_others_are_no_conflict(folder: Path, tmp_path: Path, ours: Tokenizer) -> None:
    more = export_hf_tokenizer(ours, tmp_path / "more")[0]
    config = json.loads(more.read_text())
    config["added_tokens"].append(config["added_tokens"][0] | {"id": ours.vocab_size, "content": "<more>"})
    more.write_text(json.dumps(config))
    assert load_tokenizer(tmp_path / "more").vocab_size == ours.vocab_size + 1
    assert conflict(ours, load_tokenizer(tmp_path / "more")) is None
    assert conflict(load_tokenizer(tmp_path / "more"), ours) is None


def test_a_checkpoint_of_another_model_is_named(
    folder: Path, run: Path, model: ModelConfig, ranks: MegatronRanks, ours: Tokenizer
) -> None:
    deeper = model.model_copy(update={"num_layers": 3})
    for path in (folder / "hf", folder / "megatron", run):
        assert "model.num_layers=3 (checkpoint: 2)" in refused(path, deeper, ranks, ours)


def test_what_is_no_checkpoint_is_named(folder: Path, model: ModelConfig, ranks: MegatronRanks, ours: Tokenizer, run: Path) -> None:
    assert refused(folder / "absent", model, ranks, ours).startswith(f"model.init_from={folder / 'absent'}: no such folder; give ")
    assert "has neither config.json nor .metadata; give a Hugging Face checkpoint" in refused(run.parent, model, ranks, ours)
    alone = Path(shutil.copytree(run, folder / "alone"))
    assert "neither a conversion's checkpoint nor a run's checkpoints/step_N" in refused(alone, model, ranks, ours)


def test_a_damaged_checkpoint_is_named(
    folder: Path, tmp_path: Path, model: ModelConfig, ranks: MegatronRanks, ours: Tokenizer
) -> None:
    torn = Path(shutil.copytree(folder / "megatron", tmp_path / "torn"))
    file = torn / "__0_0.distcp"
    content = file.read_bytes()
    for at in range(len(content) // 16, len(content), len(content) // 8):
        flipped = bytearray(content)
        flipped[at] ^= 1
        file.write_bytes(flipped)
        message = refused(torn, model, ranks, ours)
        assert message.startswith(f"{file}: ") and message.endswith(" is damaged: its bytes are not what was written")
    file.write_bytes(content[:-100])
    assert f"__0_0.distcp has {len(content) - 100} bytes instead of {len(content)}" in refused(torn, model, ranks, ours)
    (torn / ".metadata").write_bytes(b"no pickle")
    assert "not a Megatron distributed checkpoint: .metadata" in refused(torn, model, ranks, ours)

    hf = Path(shutil.copytree(folder / "hf", tmp_path / "hf"))
    tensors = load_file(hf / "model.safetensors")
    name = next(iter(tensors))
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, hf / "model.safetensors")
    assert f"missing {name}" in refused(hf, model, ranks, ours)
    (hf / "model.safetensors").write_bytes((folder / "hf/model.safetensors").read_bytes()[:-100])
    assert "not a complete safetensors file" in refused(hf, model, ranks, ours)


def test_a_run_does_not_go_on_from_damaged_files(run: Path, model: ModelConfig, ranks: MegatronRanks, tmp_path: Path) -> None:
    policy = MegatronPolicy(model, ALONE, OptimizerConfig(lr=1e-3), total_steps=1, seed=0, ranks=ranks)
    store = CheckpointStore(tmp_path, policy, ranks, 1, lambda path: None)
    step = Path(shutil.copytree(run, tmp_path / "step_7"))
    assert store.restore() == (7, {})
    for file in (".metadata", "common.pt", "__0_0.distcp"):
        content = (step / file).read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 1
        (step / file).write_bytes(flipped)
        with pytest.raises(UserError, match=f"{file}.* is damaged: its bytes are not what was written"):
            store.restore()
        (step / file).write_bytes(content)
    assert store.restore() == (7, {})


def test_weights_that_are_not_finite_are_not_saved(model: ModelConfig, ranks: MegatronRanks, tmp_path: Path) -> None:
    policy = MegatronPolicy(model, ALONE, OptimizerConfig(lr=1e-3), total_steps=1, seed=0, ranks=ranks)
    store = CheckpointStore(tmp_path, policy, ranks, 2, lambda path: None)
    store.save(1, {})
    name = next(name for name in policy.weights() if name.endswith("linear_fc2.weight"))
    with torch.no_grad():
        policy.weights()[name].view(-1)[3] = torch.nan
    with pytest.raises(UserError, match=f"step_2: not saved: {name} is not finite on rank 0; older checkpoints are as they were"):
        store.save(2, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]
