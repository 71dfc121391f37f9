"""Ranks of tests/dist/test_conversion.py: weights of every family through every layout, and back.

    weight_round_trips.py FOLDER {"family": {"layout": {"tp": 2, ...}, ...}, ...}

FOLDER/<family>/hf is a Hugging Face checkpoint. At every layout it is loaded and exported again, to FOLDER/<family>/<layout>; it is
converted by all ranks together to FOLDER/<family>/megatron, cut for the layout that the family's number picks; that is loaded at
every layout, saved again from there, and loaded at the layout before. Every rank prints what was not the same.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from tiny_families import model_of

from megatron_rl.checkpoint import writer
from megatron_rl.checkpoint.weights import load_weights, sharded_weights
from megatron_rl.config.model import ModelConfig, ParallelConfig
from megatron_rl.convert import hf_to_megatron
from megatron_rl.policy.model import build_chunks, weights
from megatron_rl.policy.ranks import MegatronRanks, _init_megatron
from megatron_rl.resharding.execute import Resharder
from megatron_rl.resharding.hf import export_hf, load_hf

BUCKET = 200_000  # bytes: a few buckets of each model


class Layout:
    """The same ranks, laid out anew, with a model that holds nothing yet."""

    def __init__(self, model: ModelConfig, layout: dict[str, Any], ranks: MegatronRanks) -> None:
        self.model, self.parallel = model, ParallelConfig(**layout)
        self.parallel.check(ranks.world_size, model)
        parallel_state.destroy_model_parallel()
        _init_megatron(self.parallel, seed=0)
        self.chunks = build_chunks(model, self.parallel, ranks.device)
        self.forget()

    def weights(self) -> dict[str, torch.Tensor]:
        return weights(self.chunks)

    def forget(self) -> None:
        for tensor in self.weights().values():
            tensor.fill_(float("nan"))


def save(layout: Layout, folder: Path, rank: int) -> None:
    sharded, common = writer.split(sharded_weights(layout.chunks))
    if rank == 0:
        folder.mkdir()
        writer.write_common(common, folder)
    dist.barrier()
    writer.write_sharded(sharded, folder)


def unlike(wanted: dict[str, torch.Tensor], found: dict[str, torch.Tensor], model: ModelConfig) -> list[str]:
    """Names of shards that differ; of a vocabulary the padding may."""
    names = []
    for name, tensor in wanted.items():
        real = ~tensor.isnan()
        if tensor.dtype != found[name].dtype or not torch.equal(tensor[real], found[name][real]):
            names.append(name)
        elif not real.all() and name not in ("embedding.word_embeddings.weight", "output_layer.weight"):
            names.append(f"{name} (not loaded)")
    return names


def round_trips(folder: Path, layouts: dict[str, dict[str, Any]], cut_for: str, ranks: MegatronRanks) -> None:
    model = model_of(json.loads((folder / "hf/config.json").read_text()))
    parallel_state.destroy_model_parallel()
    cut = layouts[cut_for]
    overrides = [f"parallel.{key}={json.dumps(value)}" for key, value in cut.items()]
    hf_to_megatron(folder / "hf", folder / "megatron", overrides, None, BUCKET)
    before: Path | None = None
    for name, layout in layouts.items():
        here = Layout(model, layout, ranks)
        load_hf(folder / "hf", here.weights(), model, here.parallel, ranks.rank, ranks)
        wanted = {key: tensor.clone() for key, tensor in here.weights().items()}
        export_hf(Resharder(model, here.parallel, here.weights, ranks, BUCKET), folder / name, ranks.rank, {})
        for source in (folder / "megatron", before):
            if source:
                here.forget()
                load_weights(here.chunks, source)
                for wrong in unlike(wanted, here.weights(), model):
                    print(f"WRONG {folder.name}: {wrong} at {name} from {source.name}")
        if before:
            dist.barrier()
            if ranks.rank == 0:
                shutil.rmtree(before)
        before = folder / f"saved at {name}"
        save(here, before, ranks.rank)
    # the first layout's, from the last
    first = Layout(model, next(iter(layouts.values())), ranks)
    load_hf(folder / "hf", first.weights(), model, first.parallel, ranks.rank)
    wanted = {key: tensor.clone() for key, tensor in first.weights().items()}
    first.forget()
    assert before
    load_weights(first.chunks, before)
    for wrong in unlike(wanted, first.weights(), model):
        print(f"WRONG {folder.name}: {wrong} at the first layout from {before.name}")


def main() -> None:
    folder, plan = Path(sys.argv[1]), json.loads(sys.argv[2])
    dist.init_process_group("gloo")
    model = model_of(json.loads((folder / next(iter(plan)) / "hf/config.json").read_text()))
    ranks = MegatronRanks(ParallelConfig(), model)
    for number, (family, layouts) in enumerate(plan.items()):
        round_trips(folder / family, layouts, [*layouts][number % len(layouts)], ranks)
    print(f"rank {ranks.rank} done")


if __name__ == "__main__":
    main()
