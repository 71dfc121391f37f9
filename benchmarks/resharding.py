"""How fast full Hugging Face tensors come out of a policy's shards, against a plain copy of the same bytes.

    OMP_NUM_THREADS=1 python benchmarks/resharding.py
    OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=lo torchrun --nproc-per-node 2 benchmarks/resharding.py \\
        --layout '{"ep": 2}' --layout '{"tp": 2, "etp": 2, "sequence_parallel": true}' --layout '{"pp": 2}'
    OMP_NUM_THREADS=1 python benchmarks/resharding.py --plan-only ling_1t --ranks 512 \\
        --layout '{"tp": 8, "pp": 16, "ep": 32, "sequence_parallel": true}'

The model is Ling-mini's in layers and experts of their real size, fewer of them; its shards are Megatron's in name and shape, and
lie in memory that has been written. Every round measures, one after the other:
- copy: `torch.Tensor.copy_` of one buffer of the model's size into another, both written before, by rank 0 alone;
- gloo: what crosses ranks, sent raw from rank 1 to rank 0 in messages of 4 MiB, 16 of them under way;
- lent: `Resharder.deliver` to a consumer that does nothing; what lies in a shard as it is wanted is handed out there, uncopied;
- gather: the same through `Resharder.gather`;
- shared: `deliver` into memory that other processes can read, which is there from the round before;
- shared, new: the same, allocated by every delivery in the way of engine/weights.py, so that every page is written a first time;
- loaded: as shared, to a consumer that copies every tensor into memory of its own, as an engine does: a second copy of all bytes.

The floor is the larger of two times, since they can overlap: own bytes at the rate of the copy, crossing bytes at that of gloo.
Extra memory is the process's peak resident set during a delivery less what it was before (VmHWM, /proc/self/clear_refs).

`--plan-only`: CPU seconds of `make_plan`, on one core, from inventories of all ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from megatron_rl.config.model import ModelConfig, ParallelConfig
from megatron_rl.policy import MegatronRanks
from megatron_rl.policy.model import build_chunks, weights
from megatron_rl.resharding.execute import Resharder
from megatron_rl.resharding.families import names_of
from megatron_rl.resharding.gather import Allocate, Tensors
from megatron_rl.resharding.plan import make_plan

ROOT = Path(__file__).resolve().parent.parent
MESSAGE_BYTES, UNDER_WAY = 4 << 20, 16


def read_model(name: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((ROOT / "conf" / "model" / f"{name}.yaml").read_text())
    return values


def smaller_ling_mini(args: argparse.Namespace) -> ModelConfig:
    values = read_model("ling_mini_2_0")
    smaller = {"num_layers": args.layers, "vocab_size": 32768, "num_mtp_layers": 0, "dtype": args.dtype}
    return ModelConfig.model_validate(values | smaller | {"moe": values["moe"] | {"num_experts": args.experts}})


class Peak:
    """Resident bytes beyond those at the start."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew (Linux, proc(5))
        self._before = self._read("VmRSS")

    def extra(self) -> int:
        return self._read("VmHWM") - self._before

    @staticmethod
    def _read(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def shared_memory(nbytes: int, device: torch.device) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device=device).share_memory_()


class Kept:
    """Shared memory that a delivery finds where the one before left it."""

    def __init__(self) -> None:
        self._memory: list[torch.Tensor] = []
        self._taken = 0

    def begin(self) -> None:
        self._taken = 0

    def __call__(self, nbytes: int, device: torch.device) -> torch.Tensor:
        if self._taken == len(self._memory):
            self._memory.append(shared_memory(nbytes, device))
        self._taken += 1
        return self._memory[self._taken - 1]


class Bench:
    def __init__(self, model: ModelConfig, parallel: ParallelConfig, bucket_bytes: int) -> None:
        self.ranks = ranks = MegatronRanks(parallel, model)
        meta = weights(build_chunks(model, parallel, torch.device("meta")))
        shards = {name: torch.ones_like(tensor, device=ranks.device) for name, tensor in meta.items()}
        self.resharder = Resharder(model, parallel, lambda: shards, ranks, bucket_bytes)
        tensors = [tensor for bucket in self.resharder.plan.buckets for tensor in bucket.tensors]
        self.bytes = sum(tensor.nbytes for tensor in tensors)
        self.crossing = sum(tensor.part_bytes(part) for tensor in tensors for part in tensor.parts if part.rank != 0)
        self._source, self._target = (torch.ones(self.bytes if ranks.rank == 0 else 0, dtype=torch.uint8) for _ in range(2))
        self._messages = torch.ones(min(MESSAGE_BYTES * UNDER_WAY, self.crossing), dtype=torch.uint8)

        self._kept = Kept()

    def copy(self) -> None:
        if self.ranks.rank == 0:
            self._target.copy_(self._source)

    def gloo(self) -> None:
        sizes = [min(MESSAGE_BYTES, self.crossing - start) for start in range(0, self.crossing, MESSAGE_BYTES)]
        for first in range(0, len(sizes), UNDER_WAY):
            pieces = self._messages[: sum(sizes[first : first + UNDER_WAY])].split(MESSAGE_BYTES)
            act = [lambda piece: dist.irecv(piece, 1), lambda piece: dist.isend(piece, 0)][self.ranks.rank]
            for work in [act(piece) for piece in pieces]:
                work.wait()

    def deliveries(self) -> dict[str, Callable[[], None]]:
        return {
            "lent": lambda: self._deliver(leave, None),
            "gather": self._gather,
            "shared": lambda: self._deliver(leave, self._kept),
            "shared, new": lambda: self._deliver(leave, shared_memory),
            "loaded": lambda: self._deliver(self._load, self._kept),
        }

    def _gather(self) -> None:
        for tensors in self.resharder.gather():
            leave(tensors)

    def _deliver(self, consume: Callable[[Tensors], None], allocate: Allocate | None) -> None:
        self._kept.begin()
        self._loaded = 0
        self.resharder.deliver(nullcontext(consume) if self.ranks.rank == 0 else None, None, allocate)

    def _load(self, tensors: Tensors) -> None:
        for _, tensor in tensors:
            place = self._target[self._loaded : self._loaded + tensor.nbytes]
            place.view(tensor.dtype).view(tensor.shape).copy_(tensor)
            self._loaded += tensor.nbytes


def leave(tensors: Tensors) -> None:
    """An engine that takes no time."""


def measure(bench: Bench, rounds: int) -> tuple[dict[str, float], dict[str, list[int]]]:
    """Median seconds at rank 0, and the largest extra bytes of every rank, after a round that is not counted."""
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    extra: defaultdict[str, list[int]] = defaultdict(list)
    for number in range(rounds + 1):
        for name, act in {"copy": bench.copy, "gloo": bench.gloo, **bench.deliveries()}.items():
            bench.ranks.barrier(name)
            peak, started = Peak(), time.perf_counter()
            act()
            took = time.perf_counter() - started
            if number > 0:
                seconds[name].append(took)
            extra[name].append(peak.extra())  # of the first round, too: what is kept is allocated there
    everywhere: list[dict[str, int]] = [{} for _ in range(bench.ranks.world_size)]
    dist.all_gather_object(everywhere, {name: max(each) for name, each in extra.items()})
    return {name: statistics.median(each) for name, each in seconds.items()}, {
        name: [rank[name] for rank in everywhere] for name in extra
    }


def report(bench: Bench, layout: str, bucket_bytes: int, seconds: dict[str, float], extra: dict[str, list[int]]) -> None:
    own, copy_rate = bench.bytes - bench.crossing, bench.bytes / seconds["copy"]
    floor = max(own / copy_rate, seconds["gloo"])
    world, threads, buckets = bench.ranks.world_size, torch.get_num_threads(), len(bench.resharder.plan.buckets)
    print(
        f"\n{layout}, {world} ranks of {threads} threads: {bench.bytes / 1e9:.2f} GB in {buckets} buckets of at most "
        f"{bucket_bytes / 1e6:.0f} MB; {bench.crossing / 1e9:.2f} GB cross ranks"
    )
    gloo = f", gloo {bench.crossing / seconds['gloo'] / 1e9:.2f} GB/s" if bench.crossing else ""
    print(f"copy {copy_rate / 1e9:.2f} GB/s{gloo}; floor {floor:.3f} s")
    print("| delivery | s | GB/s | of the copy | of the floor | extra MB at rank 0 | at the others |")
    print("|---|---|---|---|---|---|---|")
    for name in bench.deliveries():
        took, (here, *others) = seconds[name], extra[name]
        fractions = f"{bench.bytes / took / 1e9:.2f} | {seconds['copy'] / took:.2f} | {floor / took:.2f}"
        there = f"{max(others) / 1e6:.0f}" if others else "-"
        print(f"| {name} | {took:.3f} | {fractions} | {here / 1e6:.0f} | {there} |", flush=True)


def time_plan(name: str, world: int, layouts: list[str], bucket_bytes: int) -> None:
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from toy_shards import inventories

    model = ModelConfig.model_validate(read_model(name))
    print("| layout | ranks | tensors | parts | buckets | CPU s |\n|---|---|---|---|---|---|")
    for layout in layouts:
        parallel = ParallelConfig.model_validate_json(layout)
        parallel.check(world, model)
        held = inventories(model, world, parallel, dtype="bfloat16")
        started = time.process_time()
        plan = make_plan(names_of(model), parallel, held, bucket_bytes)
        took = time.process_time() - started
        tensors = [tensor for bucket in plan.buckets for tensor in bucket.tensors]
        parts = sum(len(tensor.parts) for tensor in tensors)
        print(f"| {layout} | {world} | {len(tensors):,} | {parts:,} | {len(plan.buckets):,} | {took:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", action="append", help="of the policy, as JSON; may be repeated (default: {})")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--bucket-mb", type=float, default=256, help="engine.bucket_mb (default: 256)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--plan-only", metavar="MODEL", help="of conf/model; no rank is started")
    parser.add_argument("--ranks", type=int, default=512, help="of the plan")
    args = parser.parse_args()
    layouts, bucket_bytes = args.layout or ["{}"], int(args.bucket_mb * 2**20)
    if args.plan_only:
        time_plan(args.plan_only, args.ranks, layouts, bucket_bytes)
        return
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    for layout in layouts:
        bench = Bench(smaller_ling_mini(args), ParallelConfig.model_validate(json.loads(layout)), bucket_bytes)
        seconds, extra = measure(bench, args.rounds)
        if bench.ranks.rank == 0:
            report(bench, layout, bucket_bytes, seconds, extra)
        bench.ranks.close()
        del bench  # its memory, before the next one's
    if "RANK" in os.environ:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
