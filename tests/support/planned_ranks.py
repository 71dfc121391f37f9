"""Ranks of tests/dist/test_planning.py: what ranks hold at one layout after another, and what layers keep for their backward.

    planned_ranks.py OUT {"name": {"model": {...}, "parallel": {...}}, ...} [{"model": {...}, "tokens": 512}, ...]

Every rank writes OUT/<layout>.<rank>.json, and rank 0 OUT/saved.json: the bytes that torch saved in a forward pass of each model of
the last argument.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_rl.algorithms.batch import LossOutput, PackedBatch
from megatron_rl.config.model import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_rl.policy import MegatronPolicy, MegatronRanks
from megatron_rl.policy.model import build_chunks, dtype_of, initialise
from megatron_rl.policy.optimizer import build_optimizer, update, wrap

OPTIMIZER = OptimizerConfig(lr=1e-3)


def held(layout: dict[str, Any]) -> dict[str, int]:
    model, parallel = ModelConfig.model_validate(layout["model"]), ParallelConfig.model_validate(layout["parallel"])
    ranks = MegatronRanks(parallel, model)
    bare = build_chunks(model, parallel, ranks.device)
    initialise(bare, model, seed=0)
    named = [(name, parameter) for chunk in bare for name, parameter in chunk.named_parameters()]
    buffers = [buffer for chunk in bare for name, buffer in chunk.named_buffers() if name.endswith("expert_bias")]
    trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    experts = sum(parameter.numel() for name, parameter in trained if ".experts." in name)
    count = {
        "dense": sum(parameter.numel() for _, parameter in trained) - experts,
        "experts": experts,
        "frozen": sum(parameter.numel() for _, parameter in named if not parameter.requires_grad),
        "buffers": sum(buffer.numel() for buffer in buffers),
        "weights": sum(parameter.nbytes for _, parameter in named) + sum(buffer.nbytes for buffer in buffers),
        "tensors": len(trained),
    }
    chunks = wrap(bare, parallel)
    dtype = dtype_of(model, ranks.device)
    optimizer = build_optimizer(chunks, OPTIMIZER, parallel, dtype)
    for chunk in chunks:
        chunk.zero_grad_buffer()
    update(optimizer, 1e-3, 0.0)  # Adam's moments come into being
    count["gradients"] = sum(
        buffer.grad_data.nbytes for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
    )
    count["optimizer"] = sum(_state_bytes(part.optimizer, dtype) for part in optimizer.chained_optimizers if part.optimizer)
    from megatron.core import parallel_state as mpu

    count["pipeline_rank"] = mpu.get_pipeline_model_parallel_rank()
    ranks.close()
    return count


def _state_bytes(optimizer: torch.optim.Optimizer, dtype: torch.dtype) -> int:
    """Adam's moments, and in bfloat16 the fp32 weights, which are the optimizer's own."""
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]] if dtype == torch.bfloat16 else []
    return sum(tensor.nbytes for tensor in (*moments, *own))


def saved_bytes(case: dict[str, Any]) -> int:
    """Of distinct memory that autograd keeps in one forward pass, but for the parameters."""
    model, parallel = ModelConfig.model_validate(case["model"]), ParallelConfig()
    ranks = MegatronRanks(parallel, model)
    policy = MegatronPolicy(model, parallel, OPTIMIZER, total_steps=1, seed=0, ranks=ranks)
    parameters = {tensor.untyped_storage().data_ptr() for chunk in policy.chunks for tensor in chunk.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage  # alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        policy.train_step([_one_sequence(model, case["tokens"])], _loss, 1.0)
    ranks.close()
    return sum(storage.nbytes() for storage in kept.values())


def _one_sequence(model: ModelConfig, tokens: int) -> PackedBatch:
    tokens_T = torch.randint(model.vocab_size, (tokens,), generator=torch.Generator().manual_seed(0))
    return PackedBatch(tokens_T, torch.tensor([0, tokens], dtype=torch.int32), torch.ones(tokens))


def _loss(logprobs_T: torch.Tensor, entropy_T: torch.Tensor, batch: PackedBatch) -> LossOutput:
    return LossOutput(loss=-logprobs_T.sum(), sums={}, maxima={})


def main() -> None:
    out, layouts, cases = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
    dist.init_process_group("gloo")
    for name, layout in layouts.items():
        (out / f"{name}.{dist.get_rank()}.json").write_text(json.dumps(held(layout)))
    saved = [saved_bytes(case) for case in cases]
    if dist.get_rank() == 0:
        (out / "saved.json").write_text(json.dumps(saved))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
