"""Ranks of tests/dist/test_families.py: logits of every family's policy, at one layout after another, against given ones.

    family_logits.py FOLDER {"layout": {"tp": 2, ...}, ...}

FOLDER/<case>/ holds a Hugging Face checkpoint and `expected.safetensors`: tokens_T, lengths_S and logits_TV, for packed segments.
Every rank prints a line of JSON per case and layout: the largest difference over its own rows and columns, and how many those are.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.utils import unwrap_model
from safetensors.torch import load_file
from small_policy import loaded_policy
from tiny_families import model_of

from megatron_rl.algorithms.batch import PackedBatch
from megatron_rl.config.model import ModelConfig, ParallelConfig
from megatron_rl.policy import MegatronRanks
from megatron_rl.policy.packed import rank_inputs


def compare(path: Path, model: ModelConfig, parallel: ParallelConfig, ranks: MegatronRanks) -> dict[str, float]:
    parallel.check(ranks.world_size, model)
    policy = loaded_policy(path, model, parallel, ranks)
    expected = load_file(path / "expected.safetensors")
    cu_seqlens = torch.cat([torch.zeros(1), expected["lengths_S"].cumsum(0)]).int()
    batch = PackedBatch(expected["tokens_T"], cu_seqlens, torch.ones(len(expected["tokens_T"])))
    seen: list[torch.Tensor] = []
    for chunk in unwrap_model(policy.chunks):
        if chunk.post_process:
            chunk.output_layer.register_forward_hook(lambda layer, args, output: seen.append(output[0][:, 0]))
    logprobs_T = policy.logprobs([batch], 1.0)[0]

    differences = [torch.zeros(1)]
    if seen:
        tp, cp = mpu.get_tensor_model_parallel_group(), mpu.get_context_parallel_group()
        inputs = rank_inputs(batch, tp=tp.size() if parallel.sequence_parallel else 1, cp=cp.size(), cp_rank=cp.rank())
        predicted_N, rows_N = inputs.tokens_N[~inputs.first_N], inputs.rows_N[~inputs.first_N]
        logits_NV = seen[0][rows_N]
        first = tp.rank() * logits_NV.size(1)
        expected_NV = expected["logits_TV"][predicted_N - 1, first : first + logits_NV.size(1)]
        differences.append((logits_NV[:, : expected_NV.size(1)] - expected_NV).abs().flatten())
    chosen_T = expected["logits_TV"].log_softmax(-1)[:-1].gather(1, batch.tokens_T[1:, None])[:, 0]
    starts = batch.cu_seqlens[1:-1].long()
    mask_T = torch.ones(len(chosen_T), dtype=torch.bool).index_fill_(0, starts - 1, False)
    differences.append((logprobs_T[1:] - chosen_T)[mask_T].abs())
    return {"difference": float(torch.cat(differences).max()), "compared": sum(len(part) for part in differences)}


def main() -> None:
    folder, layouts = Path(sys.argv[1]), json.loads(sys.argv[2])
    dist.init_process_group("gloo")
    models = {path: model_of(json.loads((path / "config.json").read_text())) for path in sorted(folder.iterdir())}
    for name, layout in layouts.items():
        parallel = ParallelConfig.model_validate(layout)
        ranks = MegatronRanks(parallel, next(model for model in models.values() if model.moe))
        for path, model in models.items():
            if model.moe or parallel.ep == 1:
                result = compare(path, model, parallel, ranks)
                print(json.dumps({"case": path.name, "layout": name, "rank": ranks.rank} | result), flush=True)
        ranks.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
