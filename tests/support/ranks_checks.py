"""Ranks of tests/dist/test_policy_ranks.py; each check prints one line of JSON per rank."""

from __future__ import annotations

import json
import sys
import time

import torch
import torch.distributed as dist
from layout_run import MODELS
from megatron_rl_kernels.logprob import token_logprobs

from megatron_rl.config.model import ParallelConfig
from megatron_rl.policy import MegatronRanks
from megatron_rl.policy.logprobs import row_logprobs


def late(seconds: float, limit: float) -> dict[str, object]:
    """Rank 0 comes `seconds` late to a broadcast."""
    ranks = MegatronRanks(ParallelConfig(timeout_s=limit), MODELS["ling"])
    if ranks.rank == 0:
        time.sleep(seconds)
    started, busy = time.monotonic(), time.process_time()
    try:
        got = ranks.broadcast({"groups": [1, 2]} if ranks.rank == 0 else None, "the rollout phase of step 3")
    except RuntimeError as error:
        return {"rank": ranks.rank, "error": str(error)}
    return {"rank": ranks.rank, "got": got, "waited": time.monotonic() - started, "busy": time.process_time() - busy}


def vocabulary() -> dict[str, object]:
    """The largest differences to the unsplit vocabulary, of values and of the logits' gradients."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    vocabulary = 12 * world - 3  # and padding
    logits_RV = 20 * torch.randn(50, 12 * world)
    tokens_R = torch.randint(vocabulary, (50,))
    grads = [torch.randn(50), torch.randn(50)]
    mine, whole = logits_RV.chunk(world, 1)[rank].clone().requires_grad_(), logits_RV.clone().requires_grad_()
    ours = row_logprobs(mine, tokens_R, 0.7, dist.group.WORLD, vocabulary)
    expected = token_logprobs(whole[:, :vocabulary].contiguous(), tokens_R, 0.7)
    torch.autograd.backward(ours, grads)
    torch.autograd.backward(expected, grads)
    pairs = [*zip(ours, expected, strict=True), (mine.grad, whole.grad.chunk(world, 1)[rank])]
    return {"rank": rank, "differences": [float((a - b).abs().max()) for a, b in pairs]}


def main() -> None:
    check, *numbers = sys.argv[1:]
    result = late(*map(float, numbers)) if check == "late" else vocabulary()
    print(json.dumps(result), flush=True)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
