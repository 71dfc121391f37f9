"""Conversions between a Hugging Face checkpoint and a Megatron-Core distributed checkpoint, in buckets that any rank can make.

Where a parameter lies in the Megatron checkpoint is told by Megatron's own sharded state dict of the model, built whole on the meta
device; which bytes of the Hugging Face checkpoint it is made of, by the family's table. A checkpoint made here keeps the Hugging
Face config.json and tokenizer in `hf/`, so that the way back needs nothing else; one of a run is read with the run's config.yaml.

Invariants:
- from Hugging Face to Megatron and back gives the same names and the same bytes, whatever the layout in between;
- memory: one bucket, or one parameter where that is larger, and never the model;
- a destination is absent or complete; what a killed conversion had done is not done again (checkpoint/building.py);
- ranks share the buckets, and an error of one is raised on all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError

from megatron_rl import __version__, rundir
from megatron_rl.config import UserError, validate
from megatron_rl.config.base import Config
from megatron_rl.config.model import ModelConfig, ParallelConfig
from megatron_rl.observability.progress import progress
from megatron_rl.resharding.families import model_values, names_of
from megatron_rl.resharding.hf import hf_config
from megatron_rl.resharding.hf_source import INDEX, HfSource, read_json
from megatron_rl.resharding.hf_target import shard_name, write_facts, write_shard
from megatron_rl.resharding.names import Names, Parameter, Shape, Span
from megatron_rl.start import HF, run_of

if TYPE_CHECKING:
    from megatron_rl.checkpoint.boxes import Box, BoxReader

CARRIED = (".json", ".jinja", ".model", ".py", ".tiktoken", ".txt")  # tokenizers, chat templates, remote code
T = TypeVar("T")


class Conversion(Config):
    """`parallel` decides how the Megatron checkpoint is cut into chunks; it loads at any layout."""

    model: ModelConfig
    parallel: ParallelConfig


def hf_to_megatron(src: Path, dst: Path, overrides: Sequence[str], dtype: str | None, bucket_bytes: int) -> None:
    """`overrides`: of keys of `Conversion`, e.g. parallel.tp=2."""
    conversion = _conversion(src / "config.json", overrides)
    model, layout = conversion.model, conversion.parallel
    with _Work(model, dst) as work:
        from megatron_rl.checkpoint.boxes import BoxWriter
        from megatron_rl.checkpoint.writer import write_common

        source: Any = work.agree(lambda: HfSource(src, model) if work.rank == 0 else None)[0]
        boxes, objects = _whole_model(model)
        names = names_of(model)
        parts = [part for name, at in boxes.items() for part in _parts(names, source, names.resolve(name), at, layout, dtype)]
        buckets = _buckets(parts, bucket_bytes)
        files = [src / "config.json", *source.files]
        work.begin(
            source=[[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files],
            settings=[model.model_dump(mode="json"), layout.tp, layout.etp, dtype, bucket_bytes, __version__],
        )
        writer = BoxWriter(work.folder, [[(part.box, part.dtype) for part in bucket] for bucket in buckets], objects)

        def make(number: int) -> Any:
            by_box = {(part.box.key, part.box.offset): part for part in buckets[number]}
            result = writer.write(number, lambda key, offset: by_box[key, offset].read(source))
            source.close()
            return result

        def finish(results: list[Any]) -> None:
            writer.finish(results)
            write_common({}, work.folder)
            (work.folder / HF).mkdir(exist_ok=True)
            carried = sorted(f for f in src.iterdir() if f.suffix in CARRIED and f.name not in ("config.json", INDEX))
            write_facts(work.folder / HF, _carried(source.config, model), carried, [], 0)

        work.run([sum(part.nbytes for part in bucket) for bucket in buckets], make, finish)


def megatron_to_hf(src: Path, dst: Path, dtype: str | None, bucket_bytes: int) -> None:
    """`src`: made by `hf_to_megatron`, or a run's checkpoints/step_N."""
    with TemporaryDirectory() as scratch:
        model, config, files = _kept(src) if (src / HF / "config.json").exists() else _of_run(src, Path(scratch))
        with _Work(model, dst) as work:
            from megatron_rl.checkpoint.boxes import BoxReader
            from megatron_rl.checkpoint.intact import check_files_together

            reader, names = BoxReader(src), names_of(model)
            boxes, _ = _whole_model(model)
            reader.check([box for at in boxes.values() for box in at])
            check_files_together(src)
            held = {names.resolve(name).hf[0]: at for name, at in boxes.items()}
            wholes = [_whole(names, parameter, held[parameter.source], reader, dtype) for parameter in names.parameters.values()]
            buckets = _buckets(wholes, bucket_bytes)
            sizes = [sum(whole.nbytes for whole in bucket) for bucket in buckets]
            stat = (src / ".metadata").stat()
            work.begin(
                source=[str(src), stat.st_size, stat.st_mtime_ns],
                settings=[model.model_dump(mode="json"), dtype, bucket_bytes, __version__],
            )

            def make(number: int) -> None:
                tensors = [named for whole in buckets[number] for named in whole.read(reader)]
                write_shard(work.folder / shard_name(number, len(buckets)), tensors)

            def finish(results: list[None]) -> None:
                shards = [[name for whole in bucket for name in whole.parameter.hf] for bucket in buckets]
                key = "torch_dtype" if "torch_dtype" in config else "dtype"
                facts = config | {key: str(wholes[0].dtype).removeprefix("torch.")}
                write_facts(work.folder, facts, files, shards, sum(sizes))

            work.run(sizes, make, finish)


@dataclass(frozen=True, slots=True)
class _Part:
    """A chunk of the Megatron checkpoint: what of its parameter begins at `start`."""

    parameter: Parameter
    spans: tuple[Span, ...]  # of the whole parameter
    start: Shape
    box: Box
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.box.size) * self.dtype.itemsize

    def read(self, source: HfSource) -> torch.Tensor:
        out = torch.empty(self.box.shape, dtype=self.dtype)
        source.fill(out, self.parameter, self.spans, self.start)
        return out


def _parts(
    names: Names, source: HfSource, parameter: Parameter, boxes: Sequence[Box], layout: ParallelConfig, dtype: str | None
) -> Iterator[_Part]:
    kinds = {source.dtype(name) for name in parameter.hf}
    if len(kinds) > 1:
        raise UserError(f"{source.path}: {' and '.join(parameter.hf)} have different data types, {' and '.join(sorted(kinds))}")
    rule, spans = parameter.rule, names.spans(parameter, _shape(boxes), 0, 1)
    shards = 1 if rule.split == "replicated" else layout.etp if rule.per_expert else layout.tp
    axis, row = int(rule.split == "row"), 0
    for box in boxes:
        for first, part in box.split(axis, shards):
            start = [row] + [0] * (box.dims - 1)
            start[axis] += first
            yield _Part(parameter, spans, tuple(start), part, _dtype(parameter, kinds.copy().pop(), dtype))
        row += box.shape[0]


@dataclass(frozen=True, slots=True)
class _Whole:
    """A parameter as its Hugging Face tensors."""

    parameter: Parameter
    spans: tuple[Span, ...]
    boxes: Sequence[Box]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return sum(map(math.prod, self.parameter.shapes)) * self.dtype.itemsize

    def read(self, reader: BoxReader) -> Iterator[tuple[str, torch.Tensor]]:
        shard, row = torch.empty(_shape(self.boxes), dtype=reader.dtype(self.boxes[0])), 0
        for box in self.boxes:
            reader.read(box, shard[row : row + box.shape[0]])
            row += box.shape[0]
        tensors = [torch.empty(shape, dtype=self.dtype) for shape in self.parameter.shapes]
        for span in self.spans:
            part = shard.narrow(span.axis, span.local_start, span.length)
            tensors[span.tensor].narrow(span.axis, span.hf_start, span.length).copy_(part)
        return zip(self.parameter.hf, tensors, strict=True)


def _whole(names: Names, parameter: Parameter, boxes: Sequence[Box], reader: BoxReader, dtype: str | None) -> _Whole:
    kind = str(reader.dtype(boxes[0])).removeprefix("torch.")
    return _Whole(parameter, names.spans(parameter, _shape(boxes), 0, 1), boxes, _dtype(parameter, kind, dtype))


def _shape(boxes: Sequence[Box]) -> Shape:
    return (sum(box.shape[0] for box in boxes), *boxes[0].shape[1:])


def _dtype(parameter: Parameter, kind: str, wanted: str | None) -> torch.dtype:
    """The expert bias is steered in steps that a half-precision number would swallow, so that it stays as it is."""
    is_expert_bias = parameter.rule.megatron[0].endswith("expert_bias")
    dtype: torch.dtype = getattr(torch, kind if wanted is None or is_expert_bias else wanted)
    return dtype


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


S = TypeVar("S", bound=_Sized)


def _buckets(entries: Sequence[S], bucket_bytes: int) -> list[list[S]]:
    buckets: list[list[S]] = []
    room = 0
    for entry in entries:
        if entry.nbytes > room:
            buckets.append([])
            room = bucket_bytes
        buckets[-1].append(entry)
        room -= entry.nbytes
    return buckets


def _whole_model(model: ModelConfig) -> tuple[dict[str, tuple[Box, ...]], dict[str, Any]]:
    from megatron_rl.checkpoint.boxes import boxes_of
    from megatron_rl.policy.model import build_chunks

    (chunk,) = build_chunks(model, ParallelConfig(), torch.device("meta"))
    return boxes_of(chunk)


class _Work:
    """What the ranks do together to build `dst`: one lock, one folder, errors for all."""

    def __init__(self, model: ModelConfig, dst: Path) -> None:
        self._model, self._dst, self._stack = model, dst, ExitStack()

    def __enter__(self) -> Self:
        from megatron_rl.checkpoint.building import Building
        from megatron_rl.policy import MegatronRanks

        ranks = MegatronRanks(ParallelConfig(), self._model)
        self._stack.callback(ranks.close)
        self.rank, self._count = ranks.rank, ranks.world_size
        self._building = Building(self._dst)
        self.folder = self._building.folder
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def agree(self, act: Callable[[], T]) -> list[T]:
        """*Collective*: what all ranks return, or the error of one."""
        result, error = None, None
        try:
            result = act()
        except Exception as raised:
            error = raised
        told = error if isinstance(error, (UserError, type(None))) else RuntimeError(f"rank {self.rank}: {error!r}")
        outcomes: list[Any] = [None] * self._count
        dist.all_gather_object(outcomes, (result, told))
        for _, theirs in outcomes:
            if theirs:
                raise error or theirs
        return [theirs for theirs, _ in outcomes]

    def begin(self, **of: Any) -> None:
        """*Collective*"""

        def begin() -> None:
            if self._dst.exists():
                raise UserError(f"--dst={self._dst}: is there already; remove it, or give another name", exit_code=1)
            self._stack.enter_context(rundir.owned("--dst", self._building.root))
            self._building.begin(of)

        self.agree(lambda: begin() if self.rank == 0 else None)

    def run(self, sizes: Sequence[int], make: Callable[[int], Any], finish: Callable[[list[Any]], None]) -> None:
        """*Collective*: every piece by one rank, and the end by rank 0."""
        mine = range(self.rank, len(sizes), self._count)
        what = f"{self._dst}" + (f" (rank 0 of {self._count})" if self._count > 1 else "")

        def work() -> None:
            with progress(what, sum(sizes[piece] for piece in mine), self.rank == 0) as advance:
                for piece in mine:
                    if not self._building.is_done(piece):
                        self._building.done(piece, make(piece))
                    advance(sizes[piece])

        def end() -> None:
            finish(self._building.results(len(sizes)))
            self._building.commit()

        self.agree(self._on_disk(work))
        self.agree(self._on_disk(end) if self.rank == 0 else lambda: None)

    def _on_disk(self, act: Callable[[], None]) -> Callable[[], None]:
        from megatron_rl.checkpoint.disk import why

        def acting() -> None:
            try:
                act()
            except UserError:
                raise
            except (OSError, RuntimeError, SafetensorError) as error:
                reason = why(self._building.root, error)
                done = f"what is done stays in {self._building.root}, and the same command goes on from there"
                raise UserError(f"{self._dst}: cannot write the checkpoint: {reason}; {done}", exit_code=1) from error

        return acting


def _conversion(file: Path, overrides: Sequence[str]) -> Conversion:
    try:
        values = model_values(read_json(file))
    except ValueError as error:
        raise error if isinstance(error, UserError) else UserError(f"{file}: {error}", exit_code=1) from None
    try:
        merged: Any = OmegaConf.to_container(
            OmegaConf.merge({"model": values, "parallel": {}}, OmegaConf.from_dotlist([*overrides]))
        )
    except OmegaConfBaseException as error:
        raise UserError(" ".join(str(error).split())) from None
    layout = merged["parallel"]
    if isinstance(layout, dict) and isinstance(layout.get("tp"), int):
        layout.setdefault("sequence_parallel", layout["tp"] > 1)  # it cuts nothing
    conversion = validate(Conversion, merged)
    parallel = conversion.parallel
    smallest_world = parallel.pp * math.lcm(parallel.tp * parallel.cp, parallel.ep * parallel.etp)
    try:
        parallel.check(smallest_world, conversion.model)
    except ValueError as error:
        raise UserError(str(error)) from None
    return conversion


def _carried(config: Mapping[str, Any], model: ModelConfig) -> dict[str, Any]:
    """config.json of what was read: no longer FP8, and without a prediction layer that was left out."""
    carried = {key: value for key, value in config.items() if key != "quantization_config"}
    return carried | ({"num_nextn_predict_layers": model.num_mtp_layers} if "num_nextn_predict_layers" in config else {})


Described = tuple[ModelConfig, dict[str, Any], list[Path]]  # a model, its config.json, and the files that go with it


def _kept(src: Path) -> Described:
    config = read_json(src / HF / "config.json")
    files = sorted(file for file in (src / HF).iterdir() if file.name != "config.json")
    return validate(ModelConfig, model_values(config)), config, files


def _of_run(src: Path, scratch: Path) -> Described:
    from megatron_rl.data.tokenizer import export_hf_tokenizer, load_tokenizer

    model, its_tokenizer = run_of(src)
    tokenizer = load_tokenizer(its_tokenizer)
    facts = hf_config(model, dtype="float32", eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)
    return model, facts, export_hf_tokenizer(tokenizer, scratch)
