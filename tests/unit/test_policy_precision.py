"""Half precision: fp16 with its loss scale beside fp32, and the output layer's product in fp32 beside float64."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_policy import SMALL
from tiny_families import tiny_model

from megatron_rl.algorithms.batch import LossOutput, PackedBatch
from megatron_rl.checkpoint.store import CheckpointStore
from megatron_rl.config.model import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_rl.policy import MegatronPolicy, MegatronRanks
from megatron_rl.policy.loss_scale import LossScale
from megatron_rl.resharding.families import model_values
from megatron_rl.resharding.hf import hf_config

ALONE, INITIAL = ParallelConfig(), 1024.0
LENGTH = 40


@pytest.fixture(scope="module")
def ranks() -> Iterator[MegatronRanks]:
    ranks = MegatronRanks(ALONE, ModelConfig.model_validate(SMALL))
    yield ranks
    ranks.close()


def policy_of(ranks: MegatronRanks, parallel: ParallelConfig = ALONE, **model: Any) -> MegatronPolicy:
    optimizer = OptimizerConfig(lr=1e-3, grad_clip=0.0, loss_scale_initial=INITIAL, loss_scale_window=3)
    return MegatronPolicy(ModelConfig.model_validate(SMALL | model), parallel, optimizer, total_steps=10, seed=0, ranks=ranks)


def batch() -> PackedBatch:
    tokens_T = torch.randint(32, (LENGTH,), generator=torch.Generator().manual_seed(0))
    mask_T = torch.ones(LENGTH).index_fill(0, torch.tensor([0]), 0.0)
    return PackedBatch(tokens_T, torch.tensor([0, LENGTH], dtype=torch.int32), mask_T)


def surprise(logprobs_T: torch.Tensor, entropy_T: torch.Tensor, batch: PackedBatch) -> LossOutput:
    loss = -(logprobs_T * batch.loss_mask_T).sum() / LENGTH
    return LossOutput(loss, {"loss": loss.detach()})


def huge(logprobs_T: torch.Tensor, entropy_T: torch.Tensor, batch: PackedBatch) -> LossOutput:
    """Finite in fp32, and beyond fp16 times the loss scale."""
    return LossOutput(1e3 * surprise(logprobs_T, entropy_T, batch).loss)


def snapshot(policy: MegatronPolicy) -> list[torch.Tensor]:
    kept = [*policy.weights().values()]
    for part in policy.optimizer.chained_optimizers:
        for main in part.get_parameters():
            state = part.optimizer.state[main]
            kept += [main, *(state[name] for name in ("exp_avg", "exp_avg_sq", "step"))]
    return [tensor.detach().clone() for tensor in kept]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(a.equal(b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("distributed_optimizer", [True, False])
def test_fp16_trains_as_fp32_does(ranks: MegatronRanks, distributed_optimizer: bool) -> None:
    parallel = ParallelConfig(distributed_optimizer=distributed_optimizer)
    fp32, fp16 = policy_of(ranks, parallel), policy_of(ranks, parallel, dtype="float16")
    assert all(t.dtype == torch.float16 for name, t in fp16.weights().items() if not name.endswith("expert_bias"))
    for _ in range(4):
        expected, step = (policy.train_step([batch()], surprise, 1.0) for policy in (fp32, fp16))
        assert step["loss"] == pytest.approx(expected["loss"], rel=2e-3)
        assert step["policy/grad_norm"] == pytest.approx(expected["policy/grad_norm"], rel=1e-2)
        assert step["policy/skipped"] == 0.0 and "policy/loss_scale" not in expected
    assert step["policy/loss_scale"] == 2 * INITIAL  # after a window of three


def test_an_overflow_changes_nothing_and_halves_the_scale(ranks: MegatronRanks) -> None:
    policy = policy_of(ranks, dtype="float16")
    policy.train_step([batch()], surprise, 1.0)
    before = snapshot(policy)
    for halved in (INITIAL / 2, INITIAL / 4):
        metrics = policy.train_step([batch()], huge, 1.0)
        assert metrics["policy/skipped"] == 1.0 and metrics["policy/loss_scale"] == halved and policy.updates == 1
        assert same(snapshot(policy), before)
    metrics = policy.train_step([batch()], surprise, 1.0)
    assert metrics["policy/skipped"] == 0.0 and policy.updates == 2 and not same(snapshot(policy), before)


def test_all_parts_of_an_optimizer_share_one_scale() -> None:
    """Megatron's own would halve it once for each part that saw an overflow, and leave the others'."""
    scale = LossScale(INITIAL, window=2)
    for overflows, expected in (([False, True], 512.0), ([False, False], 512.0), ([False, False], 1024.0), ([True, True], 512.0)):
        for part_saw in overflows:
            scale.update(part_saw)
        scale.after(any(overflows))
        assert scale.scale.item() == expected


def test_a_restored_run_goes_on_with_the_scale(ranks: MegatronRanks, tmp_path: Path) -> None:
    first, second = policy_of(ranks, dtype="float16"), policy_of(ranks, dtype="float16")
    stores = [CheckpointStore(tmp_path, policy, ranks, 1, lambda path: None) for policy in (first, second)]
    first.train_step([batch()], huge, 1.0)
    for _ in range(2):
        first.train_step([batch()], surprise, 1.0)
    stores[0].save(3, {})
    assert stores[1].restore() == (3, {})
    ends = [policy.train_step([batch()], surprise, 1.0) for policy in (first, second)]
    assert ends[0] == ends[1] and ends[1]["policy/loss_scale"] == INITIAL  # halved, and doubled by the third in a row
    assert same(snapshot(first), snapshot(second))

    other = policy_of(ranks, dtype="bfloat16")
    assert CheckpointStore(tmp_path, other, ranks, 1, lambda path: None).restore() == (3, {})
    assert "policy/loss_scale" not in other.train_step([batch()], surprise, 1.0)


@pytest.mark.parametrize("kind", ["plain", "tied", "norm_head"])
def test_logits_of_an_fp32_head_are_products_of_fp32(ranks: MegatronRanks, kind: str) -> None:
    """Value and gradients against float64, from the hidden states and weights that the model has in bf16."""
    changes = {"tied": {"tie_embeddings": True}, "norm_head": {"norm_head": True}}.get(kind, {})
    model = changes | {"dtype": "bfloat16", "init_std": 0.5}
    errors: dict[bool, list[float]] = {}
    for fp32_lm_head in (True, False):
        policy = policy_of(ranks, fp32_lm_head=fp32_lm_head, **model)
        chunk: Any = policy.chunks[0].module.module  # type: ignore[union-attr]
        hidden, logprobs, weights = [], [], []

        def hidden_of(module: Any, args: Any, out: torch.Tensor, kept: list[torch.Tensor] = hidden) -> None:
            out.retain_grad()
            kept.append(out)

        def weight_of(layer: Any, args: Any, kwargs: Any, kept: list[torch.Tensor] = weights) -> None:
            given = kwargs.get("weight")
            kept.append((layer.weight if given is None else given).detach())

        def keep(new_T: torch.Tensor, entropy_T: torch.Tensor, batch: PackedBatch, kept: Any = logprobs) -> LossOutput:
            kept.append(new_T.detach())
            return surprise(new_T, entropy_T, batch)

        chunk.decoder.final_layernorm.register_forward_hook(hidden_of)
        chunk.output_layer.register_forward_pre_hook(weight_of, with_kwargs=True)  # after the departures' own
        policy.train_step([batch()], keep, 1.0)
        assert weights[0].dtype == (torch.float32 if fp32_lm_head else torch.bfloat16)

        x_RH = hidden[0].detach().view(LENGTH, -1).double().requires_grad_()
        weight_VH = weights[0].double().requires_grad_()
        all_RV = torch.log_softmax(x_RH @ weight_VH.T, -1)
        expected_T = torch.cat([torch.zeros(1), all_RV[:-1].gather(1, batch().tokens_T[1:, None]).squeeze(1)])
        (-expected_T.sum() / LENGTH).backward()
        found = {logprobs[0]: expected_T, hidden[0].grad.view(LENGTH, -1): x_RH.grad}
        if kind == "plain":
            found[chunk.output_layer.weight.main_grad] = weight_VH.grad
        errors[fp32_lm_head] = [float((ours.double() - theirs).norm() / theirs.norm()) for ours, theirs in found.items()]
    value, *gradients = errors[True]
    assert value < 1e-6 and max(gradients) < 3e-3, errors  # gradients of what is bf16 end as bf16
    assert errors[False][0] > 1e-4


@pytest.mark.parametrize("family", ["bailing_moe", "bailing_moe_v2"])
def test_engines_and_exports_learn_of_precision_from_config_json(family: str) -> None:
    """What models/bailing_moe.py:206 and layers/logits_processor.py:454 of SGLang look for."""
    model = tiny_model(family)
    facts = hf_config(model, dtype="float16", eos_token_id=1, pad_token_id=0)
    assert facts["router_dtype"] == "fp32" and facts["dtype"] == "float16" and "enable_lm_head_fp32" not in facts
    with_head = hf_config(model.model_copy(update={"fp32_lm_head": True}), dtype="float16", eos_token_id=1, pad_token_id=0)
    assert with_head == facts | {"enable_lm_head_fp32": True}
    assert model_values(with_head) == model_values(facts) | {"fp32_lm_head": True}
