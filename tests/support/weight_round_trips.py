"""Ranks of tests/dist/test_conversion.py: weights of every family through every layout, and back.

    weight_round_trips.py FOLDER {"family": {"layout": {"tp": 2, ...}, ...}, ...}

FOLDER/<family>/hf is a Hugging Face checkpoint. At every layout it is loaded and exported again, to FOLDER/<family>/<layout>; it is
converted by all ranks together to FOLDER/<family>/megatron, cut for the layout that the family's number picks; that is loaded at
every layout, saved again from there, and loaded at the layout before. Every rank prints what was not the same.
"""

from __future__ import annotations

import itertools
import json
import os
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
from megatron_rl.policy.ranks import MegatronRanks
from megatron_rl.resharding.execute import Resharder
from megatron_rl.resharding.hf import export_hf, load_hf

BUCKET = 200_000  # bytes: a few buckets of each model
WORLDS = itertools.count()


def end_world() -> None:
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def begin_world() -> None:
    """A process group that is left to itself keeps its threads, and those of some layouts together take all the time: each layout
    has a world of its own, which meets at a place of its own in the store."""
    end_world()
    rank, world_size, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    store = dist.TCPStore(os.environ["MASTER_ADDR"], port, is_master=False)
    dist.init_process_group("gloo", store=dist.PrefixStore(f"world {next(WORLDS)}", store), rank=rank, world_size=world_size)


class Layout:
    """The same processes, laid out anew, with a model that holds nothing yet."""

    def __init__(self, model: ModelConfig, layout: dict[str, Any]) -> None:
        self.model, self.parallel = model, ParallelConfig(**layout)
        begin_world()
        self.ranks = MegatronRanks(self.parallel, model)
        self.chunks = build_chunks(model, self.parallel, self.ranks.device)
        self.forget()

    def weights(self) -> dict[str, torch.Tensor]:
        return weights(self.chunks)

    def forget(self) -> None:
        for tensor in self.weights().values():
            tensor.fill_(float("nan"))


def save(layout: Layout, folder: Path) -> None:
    sharded, common = writer.split(sharded_weights(layout.chunks))
    if layout.ranks.rank == 0:
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


def round_trips(folder: Path, layouts: dict[str, dict[str, Any]], cut_for: str) -> None:
    model = model_of(json.loads((folder / "hf/config.json").read_text()))
    overrides = [f"parallel.{key}={json.dumps(value)}" for key, value in layouts[cut_for].items()]
    begin_world()
    hf_to_megatron(folder / "hf", folder / "megatron", overrides, None, BUCKET)
    before: Path | None = None
    for name, layout in layouts.items():
        here = Layout(model, layout)
        load_hf(folder / "hf", here.weights(), model, here.parallel, here.ranks.rank, here.ranks)
        wanted = {key: tensor.clone() for key, tensor in here.weights().items()}
        export_hf(Resharder(model, here.parallel, here.weights, here.ranks, BUCKET), folder / name, here.ranks.rank, {})
        for source in (folder / "megatron", before):
            if source:
                here.forget()
                load_weights(here.chunks, source)
                for wrong in unlike(wanted, here.weights(), model):
                    print(f"WRONG {folder.name}: {wrong} at {name} from {source.name}")
        if before:
            dist.barrier()
            if here.ranks.rank == 0:
                shutil.rmtree(before)
        before = folder / f"saved at {name}"
        save(here, before)
    # the first layout's, from the last
    first = Layout(model, next(iter(layouts.values())))
    load_hf(folder / "hf", first.weights(), model, first.parallel, first.ranks.rank)
    wanted = {key: tensor.clone() for key, tensor in first.weights().items()}
    first.forget()
    assert before
    load_weights(first.chunks, before)
    for wrong in unlike(wanted, first.weights(), model):
        print(f"WRONG {folder.name}: {wrong} at the first layout from {before.name}")


def main() -> None:
    folder, plan = Path(sys.argv[1]), json.loads(sys.argv[2])
    for number, (family, layouts) in enumerate(plan.items()):
        round_trips(folder / family, layouts, [*layouts][number % len(layouts)])
        print(f"{family} done")
    end_world()


if __name__ == "__main__":
    main()
