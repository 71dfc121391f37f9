"""Under replay, values and gradients are those of the reference implementation with its routing held fixed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from reference_model import logits_by_experts
from safetensors.torch import load_file
from tiny_families import model_of, write_family

from megatron_rl.algorithms.batch import LossOutput, PackedBatch
from megatron_rl.config.model import OptimizerConfig, ParallelConfig
from megatron_rl.policy import MegatronPolicy, MegatronRanks, weights
from megatron_rl.resharding.hf import load_hf

LENGTHS, MOE_LAYERS, TOP_K, EXPERTS = (9, 2, 14), (1, 2, 3), 2, 8
SAME = {
    "model.word_embeddings.weight": "embedding.word_embeddings.weight",
    "model.norm.weight": "decoder.final_layernorm.weight",
} | {
    f"model.layers.{layer}.{theirs}": f"decoder.layers.{layer}.{ours}"  # tensors that both hold in the same form
    for layer in MOE_LAYERS
    for theirs, ours in {
        "mlp.gate.weight": "mlp.router.weight",
        "attention.dense.weight": "self_attention.linear_proj.weight",
        **{f"mlp.experts.{e}.down_proj.weight": f"mlp.experts.local_experts.{e}.linear_fc2.weight" for e in range(EXPERTS)},
    }.items()
}


def weighted_logprobs(logprobs_T: torch.Tensor, entropy_T: torch.Tensor, batch: PackedBatch) -> LossOutput:
    return LossOutput(loss=(batch.fields["weight"] * logprobs_T * batch.loss_mask_T).sum())


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_gradients_are_those_of_a_fixed_routing(recompute: str, tmp_path: Path) -> None:
    path = write_family(tmp_path / "hf", "bailing_moe_v2", seed=0, num_nextn_predict_layers=0)
    config = json.loads((path / "config.json").read_text())
    model, parallel = model_of(config), ParallelConfig(recompute=recompute)  # type: ignore[arg-type]
    random = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    experts_TLK = torch.rand(total, len(MOE_LAYERS), EXPERTS, generator=random).argsort(-1)[..., :TOP_K]
    experts_TLK[torch.rand(total, generator=random) < 0.3] = -1
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    batch = PackedBatch(
        tokens_T=torch.randint(2, 64, (total,), generator=random),
        cu_seqlens=ends.int(),
        loss_mask_T=torch.ones(total).index_fill(0, ends[:-1], 0.0),
        fields={"weight": torch.rand(total, generator=random)},
        experts_TLK=experts_TLK.to(torch.int16),
    )

    tensors = {name: tensor.requires_grad_() for name, tensor in load_file(path / "model.safetensors").items()}
    expected = []
    for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        tokens = batch.tokens_T[start:end].tolist()
        logprobs_TV = logits_by_experts(tensors, config, tokens, experts_TLK[start:end])[:-1].log_softmax(-1)
        expected += [torch.zeros(1), logprobs_TV.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]]
    (batch.fields["weight"] * torch.cat(expected)).sum().backward()

    ranks = MegatronRanks(parallel, model)
    try:
        policy = MegatronPolicy(
            model,
            parallel,
            OptimizerConfig(lr=1e-3, grad_clip=0.0),
            total_steps=1,
            seed=0,
            ranks=ranks,
            load=lambda chunks: load_hf(path, weights(chunks), model, parallel, 0),
            replay="r3",
        )
        (logprobs_T,) = policy.logprobs([batch], 1.0)
        policy.train_step([batch], weighted_logprobs, 1.0)
        gradients = {name.removeprefix("module."): p.main_grad for name, p in policy.chunks[0].named_parameters()}
    finally:
        ranks.close()
    torch.testing.assert_close(logprobs_T, torch.cat(expected).detach(), atol=2e-5, rtol=0)
    for theirs, ours in SAME.items():
        wanted = tensors[theirs].grad
        assert wanted is not None
        torch.testing.assert_close(gradients[ours], wanted, atol=2e-5, rtol=1e-3, msg=lambda text, name=ours: f"{name}: {text}")
    assert all(tensors[f"model.layers.{layer}.mlp.gate.weight"].grad.abs().max() > 1e-2 for layer in MOE_LAYERS)  # type: ignore[union-attr]
