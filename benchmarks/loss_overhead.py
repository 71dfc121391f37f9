"""What correction and mismatch report cost: an update with both against one of plain clipped policy gradients, in one process.

    OMP_NUM_THREADS=1 TORCH_COMPILE_DISABLE=1 python benchmarks/loss_overhead.py

The microbatch is the quickstart's largest, 16,384 tokens; updates of both kinds alternate. One line of JSON, in milliseconds of
processor time, which other work on the machine disturbs less than the clock: `update`, medians; `ratio`, the median of the pairs',
and `quartiles` of it; `loss`, the loss alone with its gradient with respect to log-probs and entropies and the step's metrics and
histograms, from the same tensors; `share`, the difference of the two losses over the plain update, for a ratio that is all noise.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_rl.algorithms.batch import LossOutput, PackedBatch
from megatron_rl.algorithms.loss import policy_loss, summarise
from megatron_rl.algorithms.mismatch import mismatch_histograms
from megatron_rl.config.model import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_rl.policy import MegatronPolicy, MegatronRanks
from megatron_rl.ports import TokenLoss

ROOT = Path(__file__).resolve().parent.parent


def plain_loss(new_logprobs_T: torch.Tensor, entropy_T: torch.Tensor, batch: PackedBatch) -> LossOutput:
    """Clipped policy gradients with one number to report."""
    mask_T, fields = batch.loss_mask_T > 0, batch.fields
    ratio_T = torch.where(mask_T, new_logprobs_T - fields["old_logprobs"], 0.0).exp()
    advantages_T = torch.where(mask_T, fields["advantages"], 0.0)
    objective_T = torch.minimum(ratio_T * advantages_T, ratio_T.clamp(0.8, 1.2) * advantages_T)
    return LossOutput(-(fields["weight"] * objective_T).sum(), {"tokens": mask_T.sum().to(new_logprobs_T.dtype)})


def batch_of(model: ModelConfig, tokens: int, length: int, prompt: int) -> PackedBatch:
    random = torch.Generator().manual_seed(0)
    ends = torch.arange(0, tokens + 1, length)
    mask_T = (torch.arange(int(ends[-1])) % length >= prompt).float()
    old_T = -torch.rand(len(mask_T), generator=random) * 3
    fields = {
        "old_logprobs": old_T,
        "engine_logprobs": old_T + 0.05 * torch.randn(len(mask_T), generator=random),
        "advantages": torch.randn(len(mask_T), generator=random),
        "weight": mask_T / mask_T.sum(),
        "age": torch.randint(0, 9, (len(mask_T),), generator=random).float(),
    }
    return PackedBatch(torch.randint(model.vocab_size, (len(mask_T),), generator=random), ends.to(torch.int32), mask_T, fields)


def report_of(totals: dict[str, Any]) -> Any:
    return summarise(totals), mismatch_histograms(totals)


def alone(loss: TokenLoss, batch: PackedBatch, reported: Callable[[dict[str, Any]], Any]) -> float:
    new_T, entropy_T = (batch.fields["old_logprobs"].clone().requires_grad_() for _ in range(2))
    started = time.process_time()
    output = loss(new_T, -entropy_T, batch)
    output.loss.backward()
    reported({name: value.tolist() for name, value in (output.sums | output.maxima | output.tables).items()})
    return time.process_time() - started


def timed(call: Callable[[], Any]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny_ling")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--length", type=int, default=32, help="tokens of every sequence")
    parser.add_argument("--prompt", type=int, default=8, help="of them")
    parser.add_argument("--pairs", type=int, default=15)
    args = parser.parse_args()
    model = ModelConfig.model_validate(yaml.safe_load((ROOT / "conf" / "model" / f"{args.model}.yaml").read_text()))
    parallel = ParallelConfig(microbatch_tokens=args.tokens)
    ranks = MegatronRanks(parallel, model)
    policy = MegatronPolicy(model, parallel, OptimizerConfig(lr=1e-30), total_steps=1, seed=0, ranks=ranks)
    batch = batch_of(model, args.tokens, args.length, args.prompt)

    corrected = policy_loss()
    kinds = {
        "plain": lambda: policy.train_step([batch], plain_loss, 1.0),
        "measured": lambda: report_of(policy.train_step([batch], corrected, 1.0)),
    }
    pairs = [{name: timed(update) for name, update in kinds.items()} for _ in range(args.pairs + 2)][2:]
    losses = {
        "plain": [alone(plain_loss, batch, dict) for _ in range(50)],
        "measured": [alone(corrected, batch, report_of) for _ in range(50)],
    }
    update = {name: statistics.median(pair[name] for pair in pairs) for name in kinds}
    loss = {name: statistics.median(seconds) for name, seconds in losses.items()}
    lower, middle, upper = statistics.quantiles([pair["measured"] / pair["plain"] for pair in pairs], n=4)
    report = {
        "tokens": args.tokens,
        "threads": torch.get_num_threads(),
        "update": {name: round(1000 * seconds, 1) for name, seconds in update.items()},
        "ratio": round(middle, 4),
        "quartiles": [round(lower, 4), round(upper, 4)],
        "loss": {name: round(1000 * seconds, 2) for name, seconds in loss.items()},
        "share": round((loss["measured"] - loss["plain"]) / update["plain"], 4),
    }
    print(json.dumps(report))
    ranks.close()


if __name__ == "__main__":
    main()
