"""Ranks of tests/dist/test_routing_replay.py: two steps of the same training at one layout and kind of replay after another.

    replay_run.py OUT {"name": {"replay": "r3", "record": "random", "tp": 2, ...}, ...}

`record`: experts drawn at random for two rows in three; `own`: those that this model chooses by itself; absent: none.
Every rank writes OUT/<name>.<rank>.json: metrics of each step, and old log-probs of its microbatches by their number.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from layout_run import MICROBATCHES, MODELS, OPTIMIZER, TEMPERATURE, microbatch

from megatron_rl.algorithms.batch import PackedBatch
from megatron_rl.algorithms.loss import policy_loss
from megatron_rl.config.model import ParallelConfig
from megatron_rl.policy import MegatronPolicy, MegatronRanks

MODEL = MODELS["ling"]
STEPS = 2
assert MODEL.moe
LAYERS, TOP_K, EXPERTS = MODEL.num_layers - MODEL.moe.first_dense_layers, MODEL.moe.top_k, MODEL.moe.num_experts


def random_record(tokens: int, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(1000 + seed)
    experts_TLK = torch.rand(tokens, LAYERS, EXPERTS, generator=random).argsort(-1)[..., :TOP_K].to(torch.int16)
    return experts_TLK.masked_fill((torch.rand(tokens, generator=random) < 1 / 3)[:, None, None], -1)


def own_record(policy: MegatronPolicy, batch: PackedBatch) -> torch.Tensor:
    """What one process without replay chooses: by asking an R2 policy for what it has kept of a pass."""
    policy.logprobs([batch], TEMPERATURE)
    assert policy._routing is not None
    (kept,) = policy._routing._old
    return torch.stack([kept[layer] for layer in range(LAYERS)], 1)


def run(layout: dict[str, object]) -> dict[str, object]:
    kind, record = layout.pop("replay"), layout.pop("record", None)
    parallel = ParallelConfig.model_validate(layout)
    ranks = MegatronRanks(parallel, MODEL)
    batches = [microbatch(seed) for seed in range(STEPS * MICROBATCHES)]
    if record == "random":
        batches = [replace(batch, experts_TLK=random_record(len(batch.tokens_T), seed)) for seed, batch in enumerate(batches)]
    elif record == "own":
        chooser = MegatronPolicy(MODEL, parallel, OPTIMIZER, total_steps=STEPS, seed=3, ranks=ranks, replay="r2")
        batches = [replace(batch, experts_TLK=own_record(chooser, batch)) for batch in batches]
    policy = MegatronPolicy(MODEL, parallel, OPTIMIZER, total_steps=STEPS, seed=3, ranks=ranks, with_reference=True, replay=kind)  # type: ignore[arg-type]
    loss = policy_loss(kl_weight=0.1, entropy_weight=0.05)
    mine = range(ranks.dp_rank, MICROBATCHES, ranks.dp_size)
    steps, logprobs = [], {}
    for step in range(STEPS):
        share = [batches[step * MICROBATCHES + number] for number in mine]
        old = policy.logprobs(share, TEMPERATURE)
        reference = policy.reference_logprobs(share, TEMPERATURE)
        for number, batch, old_T, reference_T in zip(mine, share, old, reference, strict=True):
            batch.fields.update(
                age=torch.zeros_like(old_T), old_logprobs=reference_T, engine_logprobs=old_T, ref_logprobs=reference_T
            )
            logprobs[f"{step}.{number}"] = {"old": old_T.tolist(), "reference": reference_T.tolist()}
        steps.append(policy.train_step(share, loss, TEMPERATURE))
    ranks.close()
    return {"steps": steps, "logprobs": logprobs}


def main() -> None:
    out, layouts = Path(sys.argv[1]), json.loads(sys.argv[2])
    dist.init_process_group("gloo")
    for name, layout in layouts.items():
        (out / f"{name}.{dist.get_rank()}.json").write_text(json.dumps(run(layout)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
