"""The whole policy in one process: against the reference implementation, against itself unpacked, and when gradients are bad."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_policy import SMALL

from megatron_rl.algorithms.batch import LossOutput, PackedBatch, Support
from megatron_rl.config.model import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_rl.policy import MegatronPolicy, MegatronRanks, build_chunks, initialise, weights
from megatron_rl.resharding.families import FAMILIES
from megatron_rl.resharding.hf import load_hf

MODEL, ALONE = ModelConfig.model_validate(SMALL), ParallelConfig()


@pytest.fixture(scope="module")
def ranks() -> Iterator[MegatronRanks]:
    ranks = MegatronRanks(ALONE, MODEL)
    yield ranks
    ranks.close()


def policy_of(ranks: MegatronRanks, model: ModelConfig = MODEL, **options: object) -> MegatronPolicy:
    optimizer = OptimizerConfig(lr=1e-2, grad_clip=0.0)
    return MegatronPolicy(model, ALONE, optimizer, total_steps=10, seed=0, ranks=ranks, **options)  # type: ignore[arg-type]


def packed(*sequences: torch.Tensor) -> PackedBatch:
    ends = torch.tensor([0, *map(len, sequences)]).cumsum(0).to(torch.int32)
    total = int(ends[-1])
    return PackedBatch(torch.cat(sequences), ends, torch.ones(total).index_fill(0, ends[:-1].long(), 0.0))


def sequences(vocab: int, *lengths: int) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randint(vocab, (length,), generator=random) for length in lengths]


def surprise(logprobs_T: torch.Tensor, entropy_T: torch.Tensor, batch: PackedBatch) -> LossOutput:
    loss = -((logprobs_T + 0.1 * entropy_T) * batch.loss_mask_T).sum() / 100
    sums = {"loss": loss.detach(), "tokens": batch.loss_mask_T.sum()}
    return LossOutput(loss, sums, {"longest": batch.cu_seqlens.diff().max().float()})


def gradients(policy: MegatronPolicy) -> dict[str, torch.Tensor]:
    return {name: parameter.main_grad.clone() for name, parameter in policy.chunks[0].named_parameters()}


def test_logprobs_are_those_of_the_reference_implementation(ranks: MegatronRanks, shared_data: Path) -> None:
    folder = shared_data / "golden_bailing_moe_v2"
    model = ModelConfig.model_validate(FAMILIES["bailing_moe_v2"].from_hf_config(json.loads((folder / "config.json").read_text())))
    policy = policy_of(ranks, model, load=lambda chunks: load_hf(folder, weights(chunks), model, ALONE, 0))
    golden = load_file(folder / "golden.safetensors")
    lengths = golden["attention_mask"].sum(-1).tolist()
    batch = packed(*(ids[:length] for ids, length in zip(golden["input_ids"], lengths, strict=True)))
    for temperature, top_k in ((1.0, None), (0.7, None), (0.7, 6)):
        expected, left = [], []
        for logits_LV, ids, length in zip(golden["logits"], golden["input_ids"], lengths, strict=True):
            x_LV, tokens_L1 = logits_LV[: length - 1].double() / temperature, ids[1:length, None]
            left_LV = x_LV >= x_LV.topk(top_k or x_LV.size(1)).values[:, -1:]
            left_LV.scatter_(1, tokens_L1, True)
            all_LV = x_LV.masked_fill(~left_LV, -torch.inf).log_softmax(-1)
            expected += [torch.zeros(1), all_LV.gather(1, tokens_L1).squeeze(1).float()]
            left += [torch.zeros(1, x_LV.size(1), dtype=torch.bool), left_LV]
        tokens_K, ids_K = torch.cat(left).nonzero(as_tuple=True)
        (logprobs_T,) = policy.logprobs([replace(batch, support=Support(ids_K, tokens_K) if top_k else None)], temperature)
        assert (logprobs_T - torch.cat(expected)).abs().max() < 1e-5


def test_packing_changes_neither_loss_nor_gradients(ranks: MegatronRanks) -> None:
    members = sequences(MODEL.vocab_size, 7, 1, 30, 12, 2, 19)
    together, apart = policy_of(ranks), policy_of(ranks)
    one = together.train_step([packed(*members)], surprise, 0.8)
    many = apart.train_step([packed(member) for member in members], surprise, 0.8)
    assert one["loss"] == pytest.approx(many["loss"], rel=1e-6)
    assert one["policy/grad_norm"] == pytest.approx(many["policy/grad_norm"], rel=1e-6)
    assert (one["tokens"], one["longest"]) == (many["tokens"], many["longest"]) == (65.0, 30.0)
    expected = gradients(apart)
    for name, gradient in gradients(together).items():
        assert torch.allclose(gradient, expected[name], rtol=1e-4, atol=1e-7), name


def test_tables_add_up_as_numbers_do_and_an_evaluation_trains_nothing(ranks: MegatronRanks) -> None:
    def by_token(logprobs_T: torch.Tensor, entropy_T: torch.Tensor, batch: PackedBatch) -> LossOutput:
        output = surprise(logprobs_T, entropy_T, batch)
        table = torch.zeros(MODEL.vocab_size, 2).index_add_(0, batch.tokens_T, torch.stack([batch.loss_mask_T, entropy_T], 1))
        return LossOutput(output.loss, output.sums, output.maxima, {"table": table.detach()})

    members = sequences(MODEL.vocab_size, 7, 12, 2, 19)
    policy = policy_of(ranks)
    before = {name: tensor.clone() for name, tensor in policy.weights().items()}
    one, many = (policy.evaluate(batches, by_token, 0.8) for batches in ([packed(*members)], [packed(m) for m in members]))
    assert policy.updates == 0 and all(tensor.equal(before[name]) for name, tensor in policy.weights().items())
    counts = torch.zeros(MODEL.vocab_size).index_add_(0, torch.cat([m[1:] for m in members]), torch.ones(36))
    assert [row[0] for row in one["table"]] == counts.tolist()
    torch.testing.assert_close(torch.tensor(one["table"]), torch.tensor(many["table"]), rtol=1e-5, atol=1e-6)
    trained = policy.train_step([packed(*members)], by_token, 0.8)
    assert trained["table"] == one["table"] and trained["loss"] == one["loss"] and policy.updates == 1


def test_logprobs_are_zero_at_first_tokens_and_need_no_gradient(ranks: MegatronRanks) -> None:
    batch = packed(*sequences(MODEL.vocab_size, 5, 1, 3))
    (logprobs_T,) = policy_of(ranks).logprobs([batch], 1.0)
    assert logprobs_T.eq(0).tolist() == [True, *[False] * 4, True, True, False, False]
    assert not logprobs_T.requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_changes_nothing_and_is_reported(ranks: MegatronRanks, bad: float) -> None:
    model = ModelConfig.model_validate(SMALL | {"moe": SMALL["moe"] | {"expert_bias_update_rate": 0.25}})  # type: ignore[operator]
    policy, batch = policy_of(ranks, model), packed(*sequences(MODEL.vocab_size, 9, 4))

    def spoilt(logprobs_T: torch.Tensor, entropy_T: torch.Tensor, batch: PackedBatch) -> LossOutput:
        return LossOutput(logprobs_T.sum() * bad)

    policy.train_step([batch], surprise, 1.0)
    before = {name: tensor.clone() for name, tensor in policy.weights().items()}
    metrics = policy.train_step([batch], spoilt, 1.0)
    assert metrics["policy/skipped"] == 1.0 and policy.updates == 1
    assert all(tensor.equal(before[name]) for name, tensor in policy.weights().items())
    metrics = policy.train_step([batch], surprise, 1.0)
    assert metrics["policy/skipped"] == 0.0 and policy.updates == 2
    assert all(tensor.isfinite().all() for tensor in policy.weights().values())


def test_initial_weights_depend_on_seed_and_name_alone(ranks: MegatronRanks) -> None:
    first, second = (build_chunks(MODEL, ALONE, ranks.device) for _ in range(2))
    initialise(first, MODEL, seed=5)
    initialise(second, MODEL, seed=5)
    there = weights(second)
    for name, tensor in weights(first).items():
        assert tensor.equal(there[name])
        if tensor.dim() == 2:
            assert tensor.std() == pytest.approx(0.1, rel=0.15) and abs(tensor.mean()) < 0.02, name
    flat = [tensor.flatten()[:8] for tensor in there.values() if tensor.dim() == 2]
    assert len({tuple(values.tolist()) for values in flat}) == len(flat)


def test_weights_are_live_storage_of_everything_the_model_has(ranks: MegatronRanks) -> None:
    policy, batch = policy_of(ranks), packed(*sequences(MODEL.vocab_size, 9, 4))
    ours = policy.weights()
    assert sum(name.endswith("expert_bias") for name in ours) == 1
    assert len(ours) == 1 + sum(1 for _ in policy.chunks[0].parameters())
    assert "decoder.layers.1.mlp.experts.local_experts.3.linear_fc1.weight" in ours
    (before,) = policy.logprobs([batch], 1.0)
    ours["decoder.layers.1.mlp.router.expert_bias"].copy_(torch.tensor([9.0, 9.0, 0.0, 0.0]))
    (after,) = policy.logprobs([batch], 1.0)
    assert not before.equal(after)


@pytest.mark.parametrize("frozen", [True, False])
def test_expert_bias_moves_by_its_rate_only(ranks: MegatronRanks, frozen: bool) -> None:
    rate = 0.0 if frozen else 0.25
    model = ModelConfig.model_validate(SMALL | {"moe": SMALL["moe"] | {"expert_bias_update_rate": rate}})  # type: ignore[operator]
    policy = policy_of(ranks, model)
    policy.train_step([packed(*sequences(model.vocab_size, 30, 20))], surprise, 1.0)
    bias = policy.weights()["decoder.layers.1.mlp.router.expert_bias"]
    assert set(bias.abs().tolist()) <= {0.0, rate} and bias.eq(0).all() == frozen


def test_bf16_keeps_loaded_weights_and_the_expert_bias_in_fp32(ranks: MegatronRanks) -> None:
    """The optimizer's fp32 copies are made of what `load` left, and no cast rounds the bias."""
    bias = torch.tensor([0.1234567, -0.7654321, 1e-5, 3.0])

    def load(chunks: Sequence[torch.nn.Module]) -> None:
        for name, tensor in weights(chunks).items():
            tensor.fill_(0.015625)
            if name.endswith("expert_bias"):
                tensor.copy_(bias)

    model = ModelConfig.model_validate(SMALL | {"dtype": "bfloat16"})
    policy = MegatronPolicy(model, ALONE, OptimizerConfig(lr=1e-9), total_steps=1, seed=0, ranks=ranks, load=load)
    policy.train_step([packed(*sequences(MODEL.vocab_size, 9, 4))], surprise, 1.0)
    for name, tensor in policy.weights().items():
        if name.endswith("expert_bias"):
            assert tensor.dtype == torch.float32 and tensor.equal(bias)
        else:
            assert tensor.dtype == torch.bfloat16 and tensor.eq(0.015625).all(), name


def test_reference_logprobs_stay_those_of_the_start(ranks: MegatronRanks) -> None:
    policy, batch = policy_of(ranks, with_reference=True), packed(*sequences(MODEL.vocab_size, 9, 4))
    (start,) = policy.logprobs([batch], 1.0)
    policy.train_step([batch], surprise, 1.0)
    (now,) = policy.logprobs([batch], 1.0)
    assert not now.equal(start)
    assert policy.reference_logprobs([batch], 1.0)[0].equal(start)
    assert policy.logprobs([batch], 1.0)[0].equal(now)
