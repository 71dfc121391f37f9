"""Ranks of tests/integration/test_engine_replay.py: an engine's rollouts under a policy with the same weights.

    engine_replay_run.py FOLDER {"layout": {"tp": 2, ...}, ...}

FOLDER holds hf/ and rollouts.json: prompt, tokens, engine_logprobs and experts (base64) of each. Prints a line of JSON per layout,
kind of replay and rank: |engine - policy| of the rank's tokens, and how many of the record's choices its routers made.
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model
from small_policy import loaded_policy
from tiny_families import model_of

from megatron_rl.config.model import ModelConfig, ParallelConfig
from megatron_rl.loops.batches import TrainSequence, microbatches
from megatron_rl.policy import MegatronRanks
from megatron_rl.policy.packed import rank_inputs
from megatron_rl.types import RoutingShape


def compare(folder: Path, kind: str, model: ModelConfig, parallel: ParallelConfig, ranks: MegatronRanks) -> dict[str, object]:
    assert model.moe
    shape = RoutingShape(model.num_layers, model.moe.first_dense_layers, model.moe.top_k, model.moe.num_experts)
    rollouts = json.loads((folder / "rollouts.json").read_text())
    sequences = [
        TrainSequence(
            tuple(r["prompt"]),
            tuple(r["tokens"]),
            {"engine_logprobs": torch.tensor(r["engine_logprobs"])},
            experts=base64.b64decode(r["experts"]),
        )
        for r in rollouts
    ]
    share = microbatches(sequences, capacity=256, replicas=ranks.dp_size, replica=ranks.dp_rank, device=ranks.device, routing=shape)
    policy = loaded_policy(folder / "hf", model, parallel, ranks, replay=kind)
    maps: dict[int, list[torch.Tensor]] = {}
    (chunk,) = unwrap_model(policy.chunks)
    for layer in chunk.decoder.layers:
        kept = maps.setdefault(layer.layer_number - 1, [])
        layer.mlp.router.register_forward_hook(lambda router, args, output, kept=kept: kept.append(output[1]))
    old = policy.logprobs(share, 1.0)
    gaps, same, choices = [], 0, 0
    for number, (batch, old_T) in enumerate(zip(share, old, strict=True)):
        gaps += (old_T - batch.fields["engine_logprobs"])[batch.loss_mask_T > 0].abs().tolist()
        inputs = rank_inputs(batch, tp=parallel.tp, cp=1, cp_rank=0)
        assert batch.experts_TLK is not None
        record_LRK = inputs.experts_of_rows(batch.experts_TLK, ranks.rank % parallel.tp, parallel.tp).long()
        for layer, record_RK in enumerate(record_LRK):
            known_R = record_RK[:, 0] >= 0
            same += int(maps[layer][number][known_R].gather(1, record_RK[known_R]).sum())
            choices += int(known_R.sum()) * shape.top_k
    return {"kind": kind, "gaps": gaps, "same": same, "choices": choices}


def main() -> None:
    folder, layouts = Path(sys.argv[1]), json.loads(sys.argv[2])
    dist.init_process_group("gloo")
    model = model_of(json.loads((folder / "hf" / "config.json").read_text()))
    for name, layout in layouts.items():
        parallel = ParallelConfig.model_validate(layout)
        ranks = MegatronRanks(parallel, model)
        for kind in ("off", "r3"):
            print(json.dumps({"layout": name} | compare(folder, kind, model, parallel, ranks)), flush=True)
        ranks.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
