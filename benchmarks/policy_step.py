"""How long a training step of the policy takes, and on what.

    OMP_NUM_THREADS=1 TORCH_COMPILE_DISABLE=1 torchrun --nproc-per-node 2 benchmarks/policy_step.py --parallel '{"ep": 2}'

The default batch is that of an RL step of the quickstart. Rank 0 prints one line of JSON: medians over the steps in milliseconds
(the log-prob pass, the training step and its parts as Megatron's timers see them on rank 0), tokens per second over all ranks, and
`times_floor`, the step's time over that of its matrix products alone at the speed this machine multiplies large matrices with.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_rl.algorithms.batch import PackedBatch
from megatron_rl.algorithms.loss import policy_loss
from megatron_rl.config.model import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_rl.policy import MegatronPolicy, MegatronRanks
from megatron_rl.scheduler.packing import pack

ROOT = Path(__file__).resolve().parent.parent


class Timers:
    """What Megatron asks of its timers: `timers(name, ...).start(...)` and `.stop()`."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def __call__(self, name: str, **_: Any) -> Timer:
        return Timer(self.seconds, name)


class Timer:
    def __init__(self, seconds: defaultdict[str, float], name: str) -> None:
        self._seconds, self._name = seconds, name

    def start(self, **_: Any) -> None:
        self._seconds[self._name] -= time.perf_counter()

    def stop(self) -> None:
        self._seconds[self._name] += time.perf_counter()


def batches(
    model: ModelConfig, args: argparse.Namespace, ranks: MegatronRanks, capacity: int
) -> tuple[list[PackedBatch], int, int]:
    """This replica's microbatches; all tokens and all response tokens over all replicas."""
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(args.shortest, args.longest + 1, (args.sequences,), generator=random).tolist()
    mine = []
    for members in pack(lengths, capacity, ranks.dp_size)[ranks.dp_rank]:
        ends = torch.tensor([0, *(lengths[i] for i in members)]).cumsum(0)
        total = int(ends[-1])
        mask_T = torch.ones(total)
        for start in ends[:-1].tolist():
            mask_T[start : start + args.prompt] = 0.0
        fields = {name: torch.full((total,), -4.0) for name in ("engine_logprobs", "old_logprobs")}
        fields |= {"advantages": torch.randn(total), "weight": mask_T / 1000, "age": torch.zeros(total)}
        mine.append(PackedBatch(torch.randint(model.vocab_size, (total,)), ends.to(torch.int32), mask_T, fields))
    return mine, sum(lengths), sum(lengths) - args.prompt * args.sequences


def matmul_flops_per_token(model: ModelConfig) -> float:
    """Forward and backward, without the attention scores."""
    attention = model.hidden_size * model.head_dim * (2 * model.num_attention_heads + 2 * model.num_kv_heads)
    per_layer = [3 * model.hidden_size * model.ffn_hidden_size] * model.num_layers
    if moe := model.moe:
        routed = 3 * model.hidden_size * moe.ffn_hidden_size * (moe.top_k + moe.num_shared_experts)
        sparse_layers = model.num_layers - moe.first_dense_layers
        per_layer[moe.first_dense_layers :] = [routed + model.hidden_size * moe.num_experts] * sparse_layers
    return 6.0 * (sum(per_layer) + model.num_layers * attention + model.hidden_size * model.vocab_size)


def matmul_flops_per_second(ranks: MegatronRanks) -> float:
    """Of all ranks together, each busy at the same time."""
    a = torch.randn(1024, 1024)
    ranks.barrier("the matrix products")
    started, rounds = time.perf_counter(), 40
    for _ in range(rounds):
        a @ a
    rate = torch.tensor(rounds * 2 * 1024**3 / (time.perf_counter() - started))
    torch.distributed.all_reduce(rate)
    return float(rate)


def timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny_ling")
    parser.add_argument("--parallel", type=json.loads, default={})
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=8, help="tokens of every prompt")
    parser.add_argument("--shortest", type=int, default=12)
    parser.add_argument("--longest", type=int, default=52)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--trace", type=Path, help="write a table of rank 0's operators here")
    args = parser.parse_args()
    model = ModelConfig.model_validate(yaml.safe_load((ROOT / "conf" / "model" / f"{args.model}.yaml").read_text()))
    parallel = ParallelConfig.model_validate(args.parallel)
    ranks = MegatronRanks(parallel, model)
    policy = MegatronPolicy(model, parallel, OptimizerConfig(lr=1e-5), total_steps=args.steps, seed=0, ranks=ranks)
    mine, tokens, response_tokens = batches(model, args, ranks, parallel.microbatch_tokens)
    loss = policy_loss()
    timers = Timers()
    policy.chunks[0].config.timers = policy.optimizer.config.timers = timers
    policy.chunks[0].config.barrier_with_L1_time = policy.optimizer.config.barrier_with_L1_time = False

    seconds: defaultdict[str, list[float]] = defaultdict(list)
    for step in range(args.steps + 3):
        ranks.barrier("a step")
        logprobs = timed(lambda: policy.logprobs(mine, 1.0))
        timers.seconds.clear()
        train = timed(lambda: policy.train_step(mine, loss, 1.0))
        if step >= 3:
            for name, value in {"logprobs": logprobs, "train_step": train, **timers.seconds}.items():
                seconds[name].append(value)
    if args.trace:
        profile(policy, mine, loss, args.trace if ranks.rank == 0 else None)

    medians = {name: statistics.median(values) for name, values in seconds.items()}
    floor = tokens * matmul_flops_per_token(model) / matmul_flops_per_second(ranks)
    if ranks.rank == 0:
        report = {
            "parallel": args.parallel,
            "ranks": ranks.world_size,
            "threads": torch.get_num_threads(),
            "tokens": tokens,
            "response_tokens": response_tokens,
            "tokens_per_s": round(tokens / medians["train_step"]),
            "response_tokens_per_s": round(response_tokens / medians["train_step"]),
            "times_floor": round(medians["train_step"] / floor, 2),
            "ms": {name: round(1000 * value, 1) for name, value in medians.items()},
        }
        print(json.dumps(report))
    ranks.close()


def profile(policy: MegatronPolicy, mine: list[PackedBatch], loss: Any, out: Path | None) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        policy.train_step(mine, loss, 1.0)
    if out:
        out.write_text(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=40, max_name_column_width=60))


if __name__ == "__main__":
    main()
