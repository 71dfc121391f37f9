"""A Hugging Face checkpoint to read from: found to be whole and of the model, then read by ranges.

Weights in FP8 blocks (DeepSeek-V3 as published: float8_e4m3fn with a `<name>_scale_inv` per 128 x 128 block) read as what they
stand for, in the data type of config.json.

Invariants:
- names, shapes, data types and config.json are checked before the first tensor is read; what is missing, unused, misshapen or
  truncated is one error that names it;
- a source is pickled without open files: one rank checks, and all read;
- memory: the range that is read. Files are mapped, and let go by `close`.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_rl.config.errors import UserError, some
from megatron_rl.config.model import ModelConfig
from megatron_rl.resharding.families import family_of, names_of
from megatron_rl.resharding.names import Names, Parameter, Shape, Span

log = logging.getLogger(__name__)
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
}  # safetensors' words
SCALE = "_scale_inv"
COMPARED_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Stored:
    file: str
    shape: Shape
    dtype: str


class HfSource:
    def __init__(self, path: Path, model: ModelConfig) -> None:
        check_config(path, model)
        self.path, self.config = path, read_json(path / "config.json")
        found = _headers(path)
        self._block = _fp8_block(path / "config.json", self.config)
        self._scales = _take_scales(path, found, self._block)
        _leave_out(path, found, model, self.config)
        names = names_of(model)
        self._has_tied_head = model.tie_embeddings and TIED_HEAD in found
        tied = {TIED_HEAD: (model.vocab_size, model.hidden_size)} if self._has_tied_head else {}
        _check_tensors(path, {name: stored.shape for name, stored in found.items()}, names.hf_shapes | tied)
        self._found: dict[str, Stored] = found
        self._open: dict[str, Any] = {}
        self._check_copies(names)
        self.close()

    @property
    def files(self) -> list[Path]:
        """All that the weights depend on."""
        return [self.path / name for name in sorted({stored.file for stored in (*self._found.values(), *self._scales.values())})]

    def dtype(self, name: str) -> str:
        """As it reads."""
        stored = self._found[name].dtype
        return config_dtype(self.config) if name in self._scales else stored

    def fill(self, out: torch.Tensor, parameter: Parameter, spans: Sequence[Span], start: Shape | None = None) -> None:
        """Read what lies at `spans` into `out`: a Megatron shard, or the part of it that begins at `start`."""
        start = start or (0,) * out.dim()
        for span in spans:
            first = max(span.local_start, start[span.axis])
            last = min(span.local_start + span.length, start[span.axis] + out.shape[span.axis])
            if first < last:
                index = [slice(at, at + length) for at, length in zip(start, out.shape, strict=True)]
                there = span.hf_start + first - span.local_start
                index[span.axis] = slice(there, there + last - first)
                target = out.narrow(span.axis, first - start[span.axis], last - first)
                target.copy_(self.read(parameter.hf[span.tensor], tuple(index)))

    def read(self, name: str, index: tuple[slice, ...]) -> torch.Tensor:
        part = self._slice(self._found[name].file, name)[index]
        if name not in self._scales:
            return part
        (rows, columns), (height, width) = index, self._block
        blocks = (
            slice(rows.start // height, -(-rows.stop // height)),
            slice(columns.start // width, -(-columns.stop // width)),
        )
        scale = self._slice(self._scales[name].file, name + SCALE)[blocks].float()
        scale = scale.repeat_interleave(height, 0)[rows.start % height :][: part.shape[0]]
        scale = scale.repeat_interleave(width, 1)[:, columns.start % width :][:, : part.shape[1]]
        return (part.float() * scale).to(getattr(torch, self.dtype(name)))

    def close(self) -> None:
        self._open.clear()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def _slice(self, file: str, name: str) -> Any:
        if file not in self._open:
            self._open[file] = _open(self.path / file)
        return self._open[file].get_slice(name)

    def _check_copies(self, names: Names) -> None:
        """What the checkpoint repeats has to be the same, since Megatron-Core shares it."""
        copies = {copy.hf[0]: copy.source for copy in names.parameters.values() if copy.rule.copy}
        if self._has_tied_head:
            copies[TIED_HEAD] = names.resolve("embedding.word_embeddings.weight").hf[0]
        for name, source in copies.items():
            rows, columns = names.hf_shapes[source]
            for at in range(0, rows, COMPARED_ROWS):
                index = slice(at, min(at + COMPARED_ROWS, rows)), slice(0, columns)
                if not torch.equal(self.read(name, index), self.read(source, index)):
                    way_out = "" if name == TIED_HEAD else "; model.num_mtp_layers=0 leaves its layer out"
                    raise UserError(f"{self.path}: {name} differs from {source}, which it has to equal{way_out}", exit_code=1)


TIED_HEAD = "lm_head.weight"  # some tied checkpoints hold the embedding under this name, too: Qwen3-0.6B


def check_config(path: Path, model: ModelConfig) -> None:
    """Raises UserError naming every key of config.json that disagrees with `model`."""
    check_facts(path / "config.json", read_json(path / "config.json"), model)


def check_facts(file: Path, config: Mapping[str, Any], model: ModelConfig) -> None:
    """The same of the `config` that `file` holds or stands for."""
    try:
        theirs = family_of(model).from_hf_config(config)
    except ValueError as error:
        raise UserError(f"{file}: {error}", exit_code=1) from None
    theirs.pop("max_position_embeddings")  # a run may train on shorter sequences, and no tensor depends on it
    theirs.pop("num_mtp_layers", None)  # a run may leave them out; that they are there shows in the tensors
    wrong = list(_differences("model", theirs, model.model_dump()))
    if wrong:
        raise UserError(f"{file} disagrees with the configured model: {'; '.join(wrong)}", exit_code=1)


def config_dtype(config: Mapping[str, Any]) -> str:
    return str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")


def read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{file}: no such file", exit_code=1) from None
    except ValueError as error:
        raise UserError(f"{file}: {error}", exit_code=1) from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: not a JSON object", exit_code=1)
    return content


def _headers(path: Path) -> dict[str, Stored]:
    """Every tensor of the checkpoint, in one file or in those of an index."""
    index = path / INDEX
    where: dict[str, str] = read_json(index).get("weight_map", {}) if index.exists() else {}
    found: dict[str, Stored] = {}
    for name in sorted(set(where.values())) or [SINGLE]:
        try:
            handle = _open(path / name)
        except FileNotFoundError:
            raise UserError(f"{path / name}: no such file" + (f" ({index} names it)" if where else ""), exit_code=1) from None
        for tensor in handle.keys():  # noqa: SIM118 (a handle is no mapping)
            part = handle.get_slice(tensor)
            if part.get_dtype() not in DTYPES:
                raise UserError(f"{path / name}: {tensor} has data type {part.get_dtype()}: not supported", exit_code=1)
            found[tensor] = Stored(name, tuple(part.get_shape()), DTYPES[part.get_dtype()])
    lost = sorted(name for name, file in where.items() if name not in found or found[name].file != file)
    if lost:
        raise UserError(f"{index}: {some(lost)} not in the files it names", exit_code=1)
    return found


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a complete safetensors file: {error}", exit_code=1) from None


def _fp8_block(file: Path, config: Mapping[str, Any]) -> tuple[int, int]:
    quantization = config.get("quantization_config")
    if not quantization:
        return 0, 0
    kind = quantization.get("quant_method"), quantization.get("fmt", "e4m3")
    said = f"quantization_config={dict(quantization)}"
    height, width = quantization.get("weight_block_size") or (0, 0)
    if kind != ("fp8", "e4m3") or not height or not width:
        raise UserError(f"{file}: {said}: only fp8 (e4m3) in weight blocks is supported", exit_code=1)
    return height, width


def _take_scales(path: Path, found: dict[str, Stored], block: tuple[int, int]) -> dict[str, Stored]:
    """Out of `found`, by the name of the weight that each belongs to."""
    scales = {}
    for name in [name for name, stored in found.items() if stored.dtype == "float8_e4m3fn"]:
        if not block[0]:
            raise UserError(f"{path}: {name} is FP8, but config.json has no quantization_config", exit_code=1)
        if name + SCALE not in found:
            raise UserError(f"{path}: missing {name + SCALE} of the FP8 tensor {name}", exit_code=1)
        scales[name] = scale = found.pop(name + SCALE)
        wanted = tuple(-(-size // side) for size, side in zip(found[name].shape, block, strict=True))
        if scale.shape != wanted:
            raise UserError(f"{path}: wrong shapes: {name + SCALE} {list(scale.shape)} instead of {list(wanted)}", exit_code=1)
    return scales


def _leave_out(path: Path, found: dict[str, Stored], model: ModelConfig, config: Mapping[str, Any]) -> None:
    layers = range(model.num_layers, model.num_layers + (config.get("num_nextn_predict_layers") or 0))
    if layers and not model.num_mtp_layers:
        prediction = [name for name in found if (match := _LAYER.match(name)) and int(match[1]) in layers]
        log.info("%s: leaving out %d tensors of its multi-token-prediction layer (model.num_mtp_layers=0)", path, len(prediction))
        for name in prediction:
            del found[name]


_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def _check_tensors(path: Path, found: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> None:
    problems = []
    if missing := sorted(wanted.keys() - found.keys()):
        problems.append(f"missing {some(missing)}")
    if unused := sorted(found.keys() - wanted.keys()):
        problems.append(f"not part of the model: {some(unused)}")
    wrong = sorted(name for name in wanted.keys() & found.keys() if found[name] != wanted[name])
    if wrong:
        problems.append("wrong shapes: " + some([f"{name} {list(found[name])} instead of {list(wanted[name])}" for name in wrong]))
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}", exit_code=1)


def _differences(prefix: str, theirs: Mapping[str, Any], ours: Mapping[str, Any] | None) -> Iterator[str]:
    for key, value in theirs.items():
        mine = ours.get(key) if ours else None
        if isinstance(value, Mapping) and isinstance(mine, Mapping):
            yield from _differences(f"{prefix}.{key}", value, mine)
        elif value != mine:
            yield f"{prefix}.{key}={mine} (checkpoint: {value})"
