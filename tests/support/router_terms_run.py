"""Ranks of tests/dist/test_router_terms.py: two steps with router terms, at one layout after another.

    router_terms_run.py {"layout": {"tp": 2, ...}, ...}

Every rank prints a line of JSON for each layout: its name, and metrics of each step.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from small_policy import DIVISIBLE

from megatron_rl.algorithms.batch import LossOutput, PackedBatch
from megatron_rl.config.model import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_rl.policy import MegatronPolicy, MegatronRanks

MICROBATCHES = 4
MODEL = DIVISIBLE | {"vocab_size": 51}


def microbatch(seed: int) -> PackedBatch:
    """Sequences of a length that no layout pads: rows of padding would be part of the terms."""
    lengths = [24, 8 + 8 * seed]
    tokens_T = torch.randint(51, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return PackedBatch(tokens_T, ends.int(), torch.ones(len(tokens_T)).index_fill(0, ends[:-1], 0.0))


def surprise(logprobs_T: torch.Tensor, entropy_T: torch.Tensor, batch: PackedBatch) -> LossOutput:
    loss = -(logprobs_T * batch.loss_mask_T).sum() / 100
    return LossOutput(loss, {"loss": loss.detach()})


def steps(layout: dict[str, object]) -> list[dict[str, float]]:
    layout, dtype = dict(layout), str(layout.get("dtype", "float32"))
    layout.pop("dtype", None)
    model, parallel = ModelConfig.model_validate(MODEL | {"dtype": dtype}), ParallelConfig.model_validate(layout)
    optimizer = OptimizerConfig(lr=1e-3, loss_scale_initial=1024.0)
    ranks = MegatronRanks(parallel, model)
    try:
        policy = MegatronPolicy(model, parallel, optimizer, total_steps=2, seed=3, ranks=ranks, router_z_loss=0.3, load_balance=0.7)
        share = [microbatch(number) for number in range(ranks.dp_rank, MICROBATCHES, ranks.dp_size)]
        return [policy.train_step(share, surprise, 1.0) for _ in range(2)]
    finally:
        ranks.close()


def main() -> None:
    dist.init_process_group("gloo")
    for name, layout in json.loads(sys.argv[1]).items():
        print(json.dumps([name, steps(layout)]), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
