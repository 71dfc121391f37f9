"""Ranks of tests/dist/test_layouts.py: three steps of the same training, each under another loss, at one layout after another.

    layout_run.py OUT {"model": {"layout": {"tp": 2, ...}, ...}, ...}

Every rank writes OUT/<model>.<layout>.<rank>.json: metrics of each step, and log-probs of its microbatches by their number.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from small_policy import DIVISIBLE
from tiny_families import tiny_model

from megatron_rl.algorithms.batch import PackedBatch, Support
from megatron_rl.algorithms.correction import Correction
from megatron_rl.algorithms.loss import policy_loss
from megatron_rl.algorithms.surrogates import Surrogate
from megatron_rl.config.model import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_rl.policy import MegatronPolicy, MegatronRanks

VOCABULARY = 51  # no multiple of 2: padded under TP2
MODELS = {
    "ling": ModelConfig.model_validate(DIVISIBLE),
    "latent": tiny_model("deepseek_v3_yarn", vocab_size=VOCABULARY),  # and multi-token prediction
    "normalised head": tiny_model("bailing_moe", vocab_size=VOCABULARY),
    "tied, biased": tiny_model("qwen2_tied", vocab_size=VOCABULARY),
}
OPTIMIZER = OptimizerConfig(lr=1e-3, warmup_steps=2, decay="linear", grad_clip=0.5)
LOSSES = {
    "icepop, ppo": policy_loss(kl_weight=0.1, entropy_weight=0.05),
    "all masks, gspo": policy_loss(
        correction=Correction("tis", sequence_band=(0.8, 1.25), off_policy_delta=0.01),
        surrogate=Surrogate("gspo", clip_low=0.03, clip_high=0.04),
        kl_weight=0.1,
        kl_estimator="unbiased",
        entropy_weight=0.05,
    ),
    "icepop, gmpo": policy_loss(surrogate=Surrogate("gmpo", 0.1, 0.1), kl_weight=0.1, kl_estimator="k2", entropy_weight=0.05),
}
STEPS, MICROBATCHES, SEQUENCES = len(LOSSES), 4, 5
TEMPERATURE = 0.9


def supports(tokens_T: torch.Tensor, starts: torch.Tensor, random: torch.Generator) -> Support:
    """Of some two thirds of the tokens that have a row: themselves and about a quarter of the vocabulary."""
    left_TV = torch.rand(len(tokens_T), 48, generator=random) < 0.25
    left_TV[torch.arange(len(tokens_T)), tokens_T] = True
    left_TV[torch.rand(len(tokens_T), generator=random) < 0.35] = False
    left_TV[starts] = False
    tokens_K, ids_K = left_TV.nonzero(as_tuple=True)
    return Support(ids_K, tokens_K)


def microbatch(seed: int) -> PackedBatch:
    """Those of the last step have supports, but for one."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 24, (SEQUENCES,), generator=random)
    total = int(lengths.sum())
    starts = lengths.cumsum(0) - lengths
    mask_T = (torch.rand(total, generator=random) < 0.7).float()
    mask_T[starts] = 0.0
    tokens_T = torch.randint(48, (total,), generator=random)
    return PackedBatch(
        tokens_T=tokens_T,
        cu_seqlens=torch.cat([torch.zeros(1), lengths.cumsum(0)]).to(torch.int32),
        loss_mask_T=mask_T,
        fields={
            "advantages": 1.0 + 0.5 * torch.randn(total, generator=random),
            "weight": torch.full((total,), 0.01),
            "age": torch.zeros(total),
        },
        support=supports(tokens_T, starts, random) if seed > (STEPS - 1) * MICROBATCHES else None,
    )


def run(model: ModelConfig, layout: dict[str, object], device_batches: list[PackedBatch]) -> dict[str, object]:
    parallel = ParallelConfig.model_validate(layout)
    ranks = MegatronRanks(parallel, model)
    policy = MegatronPolicy(model, parallel, OPTIMIZER, total_steps=STEPS, seed=3, ranks=ranks, with_reference=True)
    for name, tensor in policy.weights().items():
        if name.endswith("expert_bias"):
            tensor.copy_(torch.linspace(-0.2, 0.2, len(tensor)))
    mine = range(ranks.dp_rank, MICROBATCHES, ranks.dp_size)
    steps, logprobs = [], {}
    for step, loss in enumerate(LOSSES.values()):
        batches = [device_batches[step * MICROBATCHES + number] for number in mine]
        old = policy.logprobs(batches, TEMPERATURE)
        reference = policy.reference_logprobs(batches, TEMPERATURE)
        for number, batch, now_T, reference_T in zip(mine, batches, old, reference, strict=True):
            # Off-policy on purpose: with old = new no ratio is clipped, and with engine = old no token is masked.
            random = torch.Generator().manual_seed(number)
            stale_T, gap_T = torch.randn(2, len(reference_T), generator=random)
            old_T = reference_T + 0.1 * stale_T
            batch.fields.update(old_logprobs=old_T, engine_logprobs=old_T + 0.5 * gap_T, ref_logprobs=reference_T)
            logprobs[f"{step}.{number}"] = {"old": now_T.tolist(), "reference": reference_T.tolist()}
        steps.append(policy.train_step(batches, loss, TEMPERATURE))
    ranks.close()
    return {"dp": [ranks.dp_rank, ranks.dp_size], "steps": steps, "logprobs": logprobs}


def main() -> None:
    out, layouts = Path(sys.argv[1]), json.loads(sys.argv[2])
    dist.init_process_group("gloo")
    for model, of_model in layouts.items():
        for name, layout in of_model.items():
            batches = [microbatch(seed) for seed in range(STEPS * MICROBATCHES)]
            result = run(MODELS[model], layout, batches)
            (out / f"{model}.{name}.{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
