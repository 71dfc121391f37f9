"""Hugging Face checkpoints: into a sharded policy, and out of one.

Invariants:
- a rank reads the ranges it holds and nothing else;
- names, shapes and config.json are checked before the first parameter changes; what is missing, unused, misshapen or truncated
  is one error that names it;
- a written checkpoint is there completely or not at all, whatever happens meanwhile.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_rl.config.errors import UserError
from megatron_rl.config.model import ModelConfig, ParallelConfig
from megatron_rl.resharding.execute import Consume, Resharder, Tensors
from megatron_rl.resharding.families import family_of, names_of
from megatron_rl.resharding.names import Shape
from megatron_rl.resharding.plan import spans_of

log = logging.getLogger(__name__)
INDEX = "model.safetensors.index.json"


def hf_config(model: ModelConfig, *, dtype: str, eos_token_id: int, pad_token_id: int) -> dict[str, Any]:
    """What the model's config.json says."""
    tokens = {"eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    return family_of(model).to_hf_config(model) | tokens | {"dtype": dtype}


def check_config(path: Path, model: ModelConfig) -> None:
    """Raises UserError naming every key of config.json that disagrees with `model`."""
    file = path / "config.json"
    config = _json(file)
    try:
        theirs = family_of(model).from_hf_config(config)
    except ValueError as error:
        raise UserError(f"{file}: {error}", exit_code=1) from None
    theirs.pop("max_position_embeddings")  # a run may train on shorter sequences, and no tensor depends on it
    theirs.pop("num_mtp_layers", None)  # a run may leave them out; that they are there shows in the tensors
    wrong = list(_differences("model", theirs, model.model_dump()))
    if wrong:
        raise UserError(f"{file} disagrees with the configured model: {'; '.join(wrong)}", exit_code=1)


def load_hf(path: Path, weights: Mapping[str, torch.Tensor], model: ModelConfig, parallel: ParallelConfig, rank: int) -> None:
    """Copy a checkpoint, in one file or several, into this rank's shards (live storage), converting to their dtype."""
    check_config(path, model)
    names = names_of(model)
    with ExitStack() as stack:
        tensors = _open(path, stack)
        _check_tensors(path, {name: tuple(tensor.get_shape()) for name, tensor in tensors.items()}, names.hf_shapes, model)
        with torch.no_grad():
            shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
            for name, parameter, spans in spans_of(names, parallel, rank, shapes):
                for span in spans:
                    there = slice(span.hf_start, span.hf_start + span.length)
                    part = tensors[parameter.hf[span.tensor]][(slice(None), there) if span.axis else there]
                    weights[name].narrow(span.axis, span.local_start, span.length).copy_(part)


def export_hf(resharder: Resharder, path: Path, rank: int, config: Mapping[str, Any], files: Sequence[Path] = ()) -> None:
    """*Collective*: the policy's present weights as a checkpoint, one file per bucket, with `files` (the tokenizer's) beside it."""
    resharder.deliver(write_hf(path, config, files) if rank == 0 else None)


@contextmanager
def write_hf(path: Path, config: Mapping[str, Any], files: Sequence[Path] = ()) -> Iterator[Consume]:
    """Yields a function that writes its tensors as the next shard. A clean exit replaces `path`, an error leaves it alone."""
    building = path.with_name(f"{path.name}.tmp")
    shards: list[list[str]] = []
    total = 0

    def write(tensors: Tensors) -> None:
        nonlocal total
        save_file(dict(tensors), building / f"{len(shards)}", metadata={"format": "pt"})
        shards.append([name for name, _ in tensors])
        total += sum(tensor.nbytes for _, tensor in tensors)

    try:
        shutil.rmtree(building, ignore_errors=True)  # what a killed export left
        building.mkdir(parents=True)
        yield write
        for file in files:
            shutil.copyfile(file, building / file.name)
        (building / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        _name_shards(building, shards, total)
        mode = (building / "config.json").stat().st_mode
        for file in building.iterdir():
            file.chmod(mode)  # safetensors makes its files readable by their owner alone
            _fsync(file)
        _fsync(building)
        _replace(building, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot write the checkpoint: {error}", exit_code=1) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _name_shards(folder: Path, shards: Sequence[Sequence[str]], total: int) -> None:
    """The names that Hugging Face readers expect: one file, or numbered ones with an index."""
    if len(shards) == 1:
        (folder / "0").rename(folder / "model.safetensors")
        return
    where: dict[str, str] = {}
    for number, tensors in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number}").rename(folder / file)
        where |= dict.fromkeys(tensors, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1) + "\n")


def _replace(new: Path, path: Path) -> None:
    """Two renames where `path` exists: a folder cannot be renamed onto a full one."""
    old = path.with_name(f"{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    new.rename(path)
    _fsync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _open(path: Path, stack: ExitStack) -> dict[str, Any]:
    """Handles of all tensors, by name, without their data."""
    index = path / INDEX
    where: dict[str, str] = _json(index).get("weight_map", {}) if index.exists() else {}
    tensors: dict[str, Any] = {}
    for name in sorted(set(where.values())) or ["model.safetensors"]:
        file = path / name
        try:
            handle = stack.enter_context(safe_open(file, framework="pt"))
        except FileNotFoundError:
            raise UserError(f"{file}: no such file" + (f" ({index} names it)" if where else ""), exit_code=1) from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: not a complete safetensors file: {error}", exit_code=1) from None
        tensors |= {tensor: handle.get_slice(tensor) for tensor in handle.keys()}  # noqa: SIM118 (a handle is no mapping)
    lost = sorted(name for name in where if name not in tensors)
    if lost:
        raise UserError(f"{index}: {_some(lost)} not in the files it names", exit_code=1)
    return tensors


def _check_tensors(path: Path, found: Mapping[str, Shape], wanted: Mapping[str, Shape], model: ModelConfig) -> None:
    prediction = [name for name in found if name.startswith(f"model.layers.{model.num_layers}.")]
    if prediction and not model.num_mtp_layers and _json(path / "config.json").get("num_nextn_predict_layers"):
        log.info("%s: leaving out %d tensors of its multi-token-prediction layer (model.num_mtp_layers=0)", path, len(prediction))
        found = {name: shape for name, shape in found.items() if name not in set(prediction)}
    problems = []
    if missing := sorted(wanted.keys() - found.keys()):
        problems.append(f"missing {_some(missing)}")
    if unused := sorted(found.keys() - wanted.keys()):
        problems.append(f"not part of the model: {_some(unused)}")
    wrong = sorted(name for name in wanted.keys() & found.keys() if found[name] != wanted[name])
    if wrong:
        problems.append("wrong shapes: " + _some([f"{name} {list(found[name])} instead of {list(wanted[name])}" for name in wrong]))
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}", exit_code=1)


def _differences(prefix: str, theirs: Mapping[str, Any], ours: Mapping[str, Any] | None) -> Iterator[str]:
    for key, value in theirs.items():
        mine = ours.get(key) if ours else None
        if isinstance(value, Mapping) and isinstance(mine, Mapping):
            yield from _differences(f"{prefix}.{key}", value, mine)
        elif value != mine:
            yield f"{prefix}.{key}={mine} (checkpoint: {value})"


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{file}: no such file", exit_code=1) from None
    except ValueError as error:
        raise UserError(f"{file}: {error}", exit_code=1) from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: not a JSON object", exit_code=1)
    return content


def _some(names: Sequence[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
