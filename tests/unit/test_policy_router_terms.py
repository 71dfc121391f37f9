"""Router terms: their gradients against a direct computation in float64, for any split over microbatches, and in fp16."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_policy import SMALL

from megatron_rl.algorithms.batch import LossOutput, PackedBatch
from megatron_rl.config.model import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_rl.policy import MegatronPolicy, MegatronRanks

MODEL = SMALL | {"init_std": 0.3}
EXPERTS, TOP_K, ALONE = SMALL["moe"]["num_experts"], SMALL["moe"]["top_k"], ParallelConfig()
ROUTER = "decoder.layers.1.mlp.router"
Z_LOSS, LOAD_BALANCE = 0.3, 0.7


@pytest.fixture(scope="module")
def ranks() -> Iterator[MegatronRanks]:
    ranks = MegatronRanks(ALONE, ModelConfig.model_validate(MODEL))
    yield ranks
    ranks.close()


def policy_of(ranks: MegatronRanks, parallel: ParallelConfig = ALONE, dtype: str = "float32", **terms: float) -> MegatronPolicy:
    model = ModelConfig.model_validate(MODEL | {"dtype": dtype})
    optimizer = OptimizerConfig(lr=1e-2, grad_clip=0.0, loss_scale_initial=256.0)
    return MegatronPolicy(model, parallel, optimizer, total_steps=10, seed=0, ranks=ranks, **terms)  # type: ignore[arg-type]


def microbatches(*lengths: int) -> list[PackedBatch]:
    random = torch.Generator().manual_seed(0)
    batches = []
    for length in lengths:
        tokens_T = torch.randint(32, (length,), generator=random)
        batches.append(PackedBatch(tokens_T, torch.tensor([0, length], dtype=torch.int32), torch.ones(length)))
    return batches


def nothing(logprobs_T: torch.Tensor, entropy_T: torch.Tensor, batch: PackedBatch) -> LossOutput:
    return LossOutput(0.0 * logprobs_T.sum(), {"loss": torch.zeros(())})


def router_of(policy: MegatronPolicy) -> Any:
    return policy.chunks[0].module.get_submodule(ROUTER)  # type: ignore[union-attr]


def direct(weight: torch.Tensor, hidden: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(z-loss, load balance) of the inputs of one router, microbatch by microbatch."""
    rows = sum(map(len, hidden))
    z_loss = load_balance = torch.zeros((), dtype=torch.float64)
    for hidden_RH in hidden:
        logits_RE = hidden_RH.double() @ weight.T
        z_loss = z_loss + logits_RE.logsumexp(-1).square().sum() / rows
        scores_RE = logits_RE.sigmoid() / logits_RE.sigmoid().sum(-1, keepdim=True)
        chosen_RE = torch.zeros_like(scores_RE).scatter(1, scores_RE.topk(TOP_K).indices, 1.0)
        balance = EXPERTS * (chosen_RE.mean(0) / TOP_K * scores_RE.mean(0)).sum()
        load_balance = load_balance + balance * len(hidden_RH) / rows
    return z_loss, load_balance


@pytest.mark.parametrize("lengths", [(40,), (30, 10)])
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(("z_loss", "load_balance"), [(Z_LOSS, 0.0), (0.0, LOAD_BALANCE), (Z_LOSS, LOAD_BALANCE)])
def test_gradients_are_those_of_the_terms(
    ranks: MegatronRanks, lengths: tuple[int, ...], recompute: str, z_loss: float, load_balance: float
) -> None:
    parallel = ParallelConfig(recompute=recompute)  # type: ignore[arg-type]
    policy = policy_of(ranks, parallel, router_z_loss=z_loss, load_balance=load_balance)
    router, batches, hidden = router_of(policy), microbatches(*lengths), []
    weight = router.weight.detach().double().requires_grad_()
    seen = router.register_forward_pre_hook(lambda module, args: hidden.append(args[0].detach().view(-1, 32)))
    policy.logprobs(batches, 1.0)
    seen.remove()
    metrics = policy.train_step(batches, nothing, 1.0)
    z, balance = direct(weight, hidden)
    (z_loss * z + load_balance * balance).backward()
    torch.testing.assert_close(router.weight.main_grad, weight.grad.float(), rtol=1e-4, atol=1e-7)
    parameters = dict(policy.chunks[0].module.named_parameters())  # type: ignore[union-attr]
    assert parameters["embedding.word_embeddings.weight"].main_grad.abs().max() > 0  # type: ignore[union-attr]
    assert ("router/z_loss" in metrics) == bool(z_loss) and ("router/load_balance" in metrics) == bool(load_balance)
    if len(lengths) == 1:
        assert metrics.get("router/z_loss", float(z)) == pytest.approx(float(z), rel=1e-5)
        assert metrics.get("router/load_balance", float(balance)) == pytest.approx(float(balance), rel=1e-5)


def test_the_loss_scale_of_fp16_scales_them_too(ranks: MegatronRanks) -> None:
    terms = {"router_z_loss": Z_LOSS, "load_balance": LOAD_BALANCE}
    fp32, fp16 = (policy_of(ranks, dtype=dtype, **terms) for dtype in ("float32", "float16"))
    fp32_norm, fp16_norm = (policy.train_step(microbatches(30, 10), nothing, 1.0)["policy/grad_norm"] for policy in (fp32, fp16))
    assert fp16_norm == pytest.approx(fp32_norm, rel=0.02)


def test_without_coefficients_there_are_no_terms(ranks: MegatronRanks) -> None:
    policy = policy_of(ranks)
    metrics = policy.train_step(microbatches(30, 10), nothing, 1.0)
    assert metrics["policy/grad_norm"] == 0.0 and not {"router/z_loss", "router/load_balance"} & metrics.keys()
